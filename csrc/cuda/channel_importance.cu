// Computes     with t[n, c] = sum_l a[n, c, l] * g[n, c, l]:  "batch" (sum_n t)^2   "sample" sum_n t^2
//              "abs" mean_n |t / L|   "element" sum_{n,l} (a*g)^2         see ops/reference.py
//              "all" these four
// Shapes       a, g [N, C, *spatial], L = product of spatial; out [C], or [4, C] for "all"
// Strides      any; 16-byte loads for aligned channels_last, [N, L, C] and NCHW of any L, single elements otherwise
// Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). Sums and out: fp32 (fp64 for fp64)
// Bytes        2*N*C*L*itemsize read, 8*P*C for P partial sums of a channel, 4*C written; for "all" P >= N (but for
//              L = 1), 16*P*C and 16*C
// Launches     2: partial sums, then the finish
// Determinism  yes: no atomics; splits follow from shape, strides, type and alignment
// Error        of each sum at most 8 eps32 * (sum of the absolute terms)  (tests/gpu)
// Source       arXiv:1906.10771, arXiv:1611.06440

#include "finish.cuh"

namespace taylor {
namespace {

template <typename T>
void run(const Pair& pair, Reduction reduction, const Tensor& out, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const int64_t channels = pair.activation.size(1), per_channel = pair.activation.numel() / channels;
  const bool single =
      per_channel == pair.activation.size(0);  // one element per (n, c): its sum needs no place of its own
  const bool linear = reduction == Reduction::kBatch || reduction == Reduction::kElement;
  const ChannelPlan p = plan_of(pair, single || linear);
  Term term = reduction == Reduction::kElement ? Term::kSquare : Term::kProduct;
  Finish<Acc> f = finish_of<Acc>(p);
  f.square_total = reduction == Reduction::kBatch;
  if (reduction == Reduction::kAbs) f.scale = Acc(1.0 / static_cast<double>(per_channel));
  if (single && !linear) {
    term = reduction == Reduction::kSample ? Term::kSquare : Term::kAbs;
  } else if (!linear) {
    f.per_sample = reduction == Reduction::kSample ? Post::kSquare : Post::kAbs;
  }
  const Tensor partial = torch::stable::new_empty(out, {p.samples, p.splits, channels});
  const Sink<Acc> sink = partial_sink<Acc>(partial);
  if (term == Term::kProduct) {
    launch_channel_sums<T, Mode::kPlain>(pair.activation, pair.gradient, p, term, sink, stream);
  } else {
    launch_channel_sums<T, Mode::kOther>(pair.activation, pair.gradient, p, term, sink, stream);
  }
  const Sink<Acc> result{static_cast<Acc*>(out.mutable_data_ptr()), 0, 0, 1, false};
  launch_finish_channels(static_cast<const Acc*>(partial.const_data_ptr()), f, result, stream);
}

// One pass leaves two planes of sums, with samples apart. Where these have one position, that would write as much as it
// reads: there three planes over all samples do, except for the few layouts that are no columns.
template <typename T>
void run_all(const Pair& pair, const Tensor& out, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const int64_t channels = pair.activation.size(1), per_channel = pair.activation.numel() / channels;
  ChannelPlan p = plan_of(pair, true);
  const bool three = per_channel == pair.activation.size(0) && p.path == Path::kColumns;
  if (!three) p = plan_of(pair, false);
  const Tensor partial = torch::stable::new_empty(out, {three ? 3 : 2, p.samples, p.splits, channels});
  const Sink<Acc> sink = partial_sink<Acc>(partial);
  if (three) {
    launch_channel_sums<T, Mode::kThree>(pair.activation, pair.gradient, p, Term::kThree, sink, stream);
  } else {
    launch_channel_sums<T, Mode::kTwo>(pair.activation, pair.gradient, p, Term::kTwo, sink, stream);
  }
  Finish<Acc> f = finish_of<Acc>(p);
  f.scale = Acc(1.0 / static_cast<double>(per_channel));
  const Sink<Acc> result{static_cast<Acc*>(out.mutable_data_ptr()), channels, 0, 1, false};
  launch_finish_all(static_cast<const Acc*>(partial.const_data_ptr()), f, three, result, stream);
}

Tensor channel_importance_cuda(const Tensor& activation, const Tensor& gradient, std::string reduction) {
  check_activation_pair(activation, gradient, "channel_importance");
  const Reduction kind = channel_reduction(reduction);
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const ScalarType type = result_type(activation.scalar_type());
  std::vector<int64_t> shape{activation.size(1)};
  if (kind == Reduction::kAll) shape.insert(shape.begin(), kReductions);
  if (activation.numel() == 0) return torch::stable::new_zeros(activation, shape, type);
  Tensor out = torch::stable::new_empty(activation, shape, type);
  const Pair pair = walkable(activation, gradient);
  const cudaStream_t stream = current_stream(activation.get_device_index());
  for_type(activation.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    kind == Reduction::kAll ? run_all<T>(pair, out, stream) : run<T>(pair, kind, out, stream);
  });
  return out;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("channel_importance", TORCH_BOX(&taylor::channel_importance_cuda));
}
