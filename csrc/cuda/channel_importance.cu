// Computes     with t[n, c] = sum_l a[n, c, l] * g[n, c, l]:  "batch" (sum_n t)^2   "sample" sum_n t^2
//              "abs" mean_n |t / L|   "element" sum_{n,l} (a*g)^2         see ops/reference.py
// Shapes       a, g [N, C, *spatial], L = product of spatial; out [C]
// Strides      any; 16-byte loads for aligned channels_last, [N, L, C] and NCHW of any L, single elements otherwise
// Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). Sums and out: fp32 (fp64 for fp64)
// Bytes        2*N*C*L*itemsize read, 8*P*C for P partial sums of a channel, 4*C written
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
    launch_channel_sums<T, false>(pair.activation, pair.gradient, p, term, sink, stream);
  } else {
    launch_channel_sums<T, true>(pair.activation, pair.gradient, p, term, sink, stream);
  }
  const Sink<Acc> result{static_cast<Acc*>(out.mutable_data_ptr()), 0, 0, 1, false};
  launch_finish_channels(static_cast<const Acc*>(partial.const_data_ptr()), f, result, stream);
}

Tensor channel_importance_cuda(const Tensor& activation, const Tensor& gradient, std::string reduction) {
  check_activation_pair(activation, gradient, "channel_importance");
  const Reduction kind = channel_reduction(reduction);
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const ScalarType type = result_type(activation.scalar_type());
  const std::vector<int64_t> shape{activation.size(1)};
  if (activation.numel() == 0) return torch::stable::new_zeros(activation, shape, type);
  Tensor out = torch::stable::new_empty(activation, shape, type);
  const Pair pair = walkable(activation, gradient);
  const cudaStream_t stream = current_stream(activation.get_device_index());
  for_type(activation.scalar_type(), [&](auto zero) { run<decltype(zero)>(pair, kind, out, stream); });
  return out;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("channel_importance", TORCH_BOX(&taylor::channel_importance_cuda));
}
