// Computes     out[n, c] = sum_l a[n, c, l] * g[n, c, l]                  see ops/reference.py
// Shapes       a, g [N, C, *spatial], L = product of spatial; out [N, C]
// Strides      any; 16-byte loads for aligned channels_last, [N, L, C] and NCHW of any L, single elements otherwise
// Dtypes       a, g: fp32, fp16, bf16, fp64 (equal). Sums and out: fp32 (fp64 for fp64)
// Bytes        2*N*C*L*itemsize read, 4*N*C written; with S > 1 splits 8*N*S*C more for the partial sums
// Launches     1, or 2 with S > 1
// Determinism  yes: no atomics; splits follow from shape, strides, type and alignment
// Error        at most 8 eps32 * sum|a*g|                                 (tests/gpu)
// Source       arXiv:1906.10771

#include "finish.cuh"

namespace taylor {

template void launch_channel_sums<float, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                       const Sink<float>&, cudaStream_t);
template void launch_channel_sums<Half, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                      const Sink<float>&, cudaStream_t);
template void launch_channel_sums<BFloat16, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                          const Sink<float>&, cudaStream_t);
template void launch_channel_sums<double, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                        const Sink<double>&, cudaStream_t);

namespace {

template <typename T>
void run(const Pair& pair, const Tensor& out, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const ChannelPlan p = plan_of(pair, false);
  const int64_t channels = pair.activation.size(1);
  const Sink<Acc> result{static_cast<Acc*>(out.mutable_data_ptr()), channels, 0, 1, false};
  if (p.splits == 1) {
    return launch_channel_sums<T, Mode::kPlain>(pair.activation, pair.gradient, p, Term::kProduct, result, stream);
  }
  const Tensor partial = torch::stable::new_empty(out, {p.samples, p.splits, channels});
  const Sink<Acc> sink = partial_sink<Acc>(partial);
  launch_channel_sums<T, Mode::kPlain>(pair.activation, pair.gradient, p, Term::kProduct, sink, stream);
  launch_finish_samples(static_cast<const Acc*>(partial.const_data_ptr()), finish_of<Acc>(p), result, stream);
}

Tensor channel_sums_cuda(const Tensor& activation, const Tensor& gradient) {
  check_activation_pair(activation, gradient, "channel_sums");
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device_index());
  const ScalarType type = result_type(activation.scalar_type());
  const std::vector<int64_t> shape{activation.size(0), activation.size(1)};
  if (activation.numel() == 0) return torch::stable::new_zeros(activation, shape, type);
  Tensor out = torch::stable::new_empty(activation, shape, type);
  const Pair pair = walkable(activation, gradient);
  const cudaStream_t stream = current_stream(activation.get_device_index());
  for_type(activation.scalar_type(), [&](auto zero) { run<decltype(zero)>(pair, out, stream); });
  return out;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("channel_sums", TORCH_BOX(&taylor::channel_sums_cuda));
}
