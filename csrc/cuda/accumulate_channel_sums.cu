// Computes     sums[n, c] += sum_l a[n, c, l] * g[n, c, l], or sums[c] += the same over n too    see ops/reference.py
// Shapes       a, g [N, C, *spatial], L = product of spatial; sums [N, C] or [C], contiguous
// Strides      a, g: any, as channel_sums
// Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). sums: fp32 (fp64 for fp64)
// Bytes        2*N*C*L*itemsize read, 8 bytes for each of sums; 8 bytes more for each partial sum
// Launches     1 where one block sums what belongs together, else 2
// Determinism  yes: no atomics; each of sums is changed by one thread
// Error        at most 8 eps32 * (sum|a*g| + |sums|)                      (tests/gpu)
// Source       arXiv:1906.10771

#include "finish.cuh"

namespace taylor {
namespace {

template <typename T>
void run(const Pair& pair, const Tensor& sums, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const bool per_sample = sums.dim() == 2;
  const ChannelPlan p = plan_of(pair, !per_sample);
  const int64_t channels = pair.activation.size(1);
  const Sink<Acc> result{static_cast<Acc*>(sums.mutable_data_ptr()), per_sample ? channels : 0, 0, 1, true};
  if (p.splits == 1 && (per_sample || p.samples == 1)) {
    return launch_channel_sums<T, Mode::kPlain>(pair.activation, pair.gradient, p, Term::kProduct, result, stream);
  }
  const Tensor partial = torch::stable::new_empty(sums, {p.samples, p.splits, channels});
  const Sink<Acc> sink = partial_sink<Acc>(partial);
  launch_channel_sums<T, Mode::kPlain>(pair.activation, pair.gradient, p, Term::kProduct, sink, stream);
  const Acc* t = static_cast<const Acc*>(partial.const_data_ptr());
  if (per_sample) {
    launch_finish_samples(t, finish_of<Acc>(p), result, stream);
  } else {
    launch_finish_channels(t, finish_of<Acc>(p), result, stream);
  }
}

void accumulate_channel_sums_cuda(const Tensor& activation, const Tensor& gradient, const Tensor& sums) {
  check_activation_pair(activation, gradient, "accumulate_channel_sums");
  check_sums(activation, sums);
  STD_TORCH_CHECK(sums.is_cuda() && sums.get_device_index() == activation.get_device_index(),
                  "accumulate_channel_sums: sums is on another device than the activation");
  if (activation.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const Pair pair = walkable(activation, gradient);
  const cudaStream_t stream = current_stream(activation.get_device_index());
  for_type(activation.scalar_type(), [&](auto zero) { run<decltype(zero)>(pair, sums, stream); });
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("accumulate_channel_sums", TORCH_BOX(&taylor::accumulate_channel_sums_cuda));
}
