// Computes     gx = 0 where output <= 0, else gradient; sums[n, c] += sum_l output * gradient, or sums[c] += the same
//              over n too; skip_sums likewise of skip * gx                see ops/reference.py
// Shapes       output, gradient, skip, gx [N, C, *spatial], L = product of spatial; sums, skip_sums [N, C] or [C]
// Strides      gx: those of empty_like(output). 16-byte loads and stores for aligned channels_last, [N, L, C] and NCHW
//              of any L where the gradient lies as gx does or repeats whole pixels; single elements otherwise. An
//              output with gaps, and a skip that lies otherwise, are copied first
// Dtypes       output, gradient, skip, gx: fp32, fp16, bf16, fp64 (equal). Sums: fp32 (fp64 for fp64)
// Bytes        3*N*C*L*itemsize (what threshold_backward moves), one more with skip; 8 for each of the sums, 8 more for
//              each partial sum
// Launches     1 where one block sums what belongs together, else 2; with skip 3
// Determinism  yes: no atomics; splits follow from shape, strides, type and alignment
// Error        gx: none. Sums: at most 8 eps32 * (sum of the absolute terms + |sums|)    (tests/gpu)
// Source       arXiv:1906.10771

#include "../relu.h"
#include "finish.cuh"
#include "score_relu_backward.cuh"

namespace taylor {
namespace {

template <typename T, bool kSkip>
void launch(const ReluPointers<T>& x, const ChannelPlan& p, const ReluSinks<Accumulator<T>>& sinks,
            cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const unsigned grid = grid_size(p.blocks, "score_relu_backward");
  if (p.path == Path::kPacked) {
    packed_relu_kernel<T, kWide, kSkip><<<grid, kThreads, 0, stream>>>(x, p, sinks);
  } else if (p.path == Path::kRows && p.vector > 1) {
    row_relu_kernel<T, kWide, kSkip><<<grid, kThreads, 0, stream>>>(x, p, sinks);
  } else if (p.path == Path::kRows) {
    row_relu_kernel<T, 1, kSkip><<<grid, kThreads, 0, stream>>>(x, p, sinks);
  } else if (p.vector > 1) {
    column_relu_kernel<T, kWide, true, kSkip><<<grid, kThreads, 0, stream>>>(x, p, sinks);
  } else {
    column_relu_kernel<T, 1, false, kSkip><<<grid, kThreads, 0, stream>>>(x, p, sinks);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The plan of a sum over gx's layout and the gradient's, and what this op asks of it beyond that.
template <typename T>
ChannelPlan relu_plan(const Walk& walk, const ReluPointers<T>& x, bool fold) {
  const auto address = [](const T* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const uintptr_t output = address(x.output), gradient = address(x.gradient);
  const uintptr_t skip = x.skip == nullptr ? output : address(x.skip);
  const bool together = (output - address(x.gx)) % 16 == 0 && (output - skip) % 16 == 0;
  // An operand one byte off the other shares no 16-byte border with it: the plan reads element by element.
  const planning::Operands single{sizeof(T), gradient + 1, gradient};
  ChannelPlan p = plan_channels(walk, together ? planning::Operands{sizeof(T), output, gradient} : single, fold);
  if (p.path == Path::kColumns && !p.linear) p = plan_channels(walk, single, fold);
  if (p.path == Path::kPacked && x.skip != nullptr) {
    p.rows_per_block = static_cast<int32_t>(kReluPackedElements<T, true> / p.length / p.vector * p.vector);
    p.blocks = ceil_div<int64_t>(p.samples * p.channel.size, p.rows_per_block);
  }
  return p;
}

template <typename T>
void run(const Relu& relu, const Walk& walk, const Tensor& sums, const std::optional<Tensor>& skip_sums,
         cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const bool per_sample = sums.dim() == 2, skips = skip_sums.has_value();
  const ReluPointers<T> x{static_cast<const T*>(relu.output.const_data_ptr()),
                          static_cast<const T*>(relu.gradient.const_data_ptr()),
                          skips ? static_cast<const T*>(relu.skip->const_data_ptr()) : nullptr,
                          static_cast<T*>(relu.gx.mutable_data_ptr())};
  const ChannelPlan p = relu_plan(walk, x, !per_sample);
  const int64_t channels = relu.gx.size(1);
  const auto result_of = [&](const Tensor& result) {
    return Sink<Acc>{static_cast<Acc*>(result.mutable_data_ptr()), per_sample ? channels : 0, 0, 1, true};
  };
  const Sink<Acc> result = result_of(sums), skip_result = skips ? result_of(*skip_sums) : result;
  ReluSinks<Acc> sinks{result, skip_result};
  const bool direct = p.splits == 1 && (per_sample || p.samples == 1);
  const int64_t places = p.samples * p.splits * channels;
  Tensor partial = relu.gx;
  if (!direct) {
    partial = torch::stable::new_empty(sums, {skips ? 2 : 1, p.samples, p.splits, channels});
    Acc* const t = static_cast<Acc*>(partial.mutable_data_ptr());
    sinks.sums = {t, p.splits * channels, channels, 1, false};
    sinks.skip_sums = {t + places, p.splits * channels, channels, 1, false};
  }
  if (skips) {
    launch<T, true>(x, p, sinks, stream);
  } else {
    launch<T, false>(x, p, sinks, stream);
  }
  if (direct) return;
  for (int i = 0; i < (skips ? 2 : 1); ++i) {
    const Acc* t = static_cast<const Acc*>(partial.const_data_ptr()) + i * places;
    if (per_sample) {
      launch_finish_samples(t, finish_of<Acc>(p), i == 0 ? result : skip_result, stream);
    } else {
      launch_finish_channels(t, finish_of<Acc>(p), i == 0 ? result : skip_result, stream);
    }
  }
}

Tensor score_relu_backward_cuda(const Tensor& output, const Tensor& gradient, const Tensor& sums,
                                std::optional<Tensor> skip, std::optional<Tensor> skip_sums) {
  check_relu(output, gradient, sums, skip, skip_sums);
  const int32_t device = output.get_device_index();
  const auto is_beside = [&](const Tensor& x) { return x.is_cuda() && x.get_device_index() == device; };
  STD_TORCH_CHECK(is_beside(sums) && (!skip_sums.has_value() || is_beside(*skip_sums)),
                  "score_relu_backward: sums are on another device than the output");
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (output.numel() == 0) return torch::stable::empty_like(output);
  Relu relu = relu_of(output, gradient, skip);
  if (relu.walk.rest.size() > kMaxLoops) {  // laid as gx, it has at most three
    relu.gradient = laid_as(relu.gradient, relu.gx);
    relu.walk = walk_activation(relu.gx, relu.gradient);
  }
  const cudaStream_t stream = current_stream(device);
  for_type(output.scalar_type(), [&](auto zero) { run<decltype(zero)>(relu, relu.walk, sums, skip_sums, stream); });
  return relu.gx;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("score_relu_backward", TORCH_BOX(&taylor::score_relu_backward_cuda));
}
