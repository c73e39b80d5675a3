// From partial sums t[n, s, c] to the result: one launch, in a fixed order.

#pragma once

#include "channel_sums.cuh"

namespace taylor {

// What is done with the sum of one sample before samples are added up, and with the total.
enum class Post : int32_t { kNone, kSquare, kAbs };

template <typename Acc>
struct Finish {
  int64_t samples;
  int64_t splits;
  int64_t channels;
  int32_t split_threads;
  Post per_sample;
  bool square_total;
  Acc scale;
};

template <typename Acc>
__device__ __forceinline__ Acc apply(Post post, Acc value) {
  if (post == Post::kSquare) return value * value;
  return post == Post::kAbs ? fabs(value) : value;
}

// The sum over neighbouring rows of threads that share a sample; the first of them gets it. All threads take part.
template <typename Acc>
__device__ __forceinline__ Acc sum_shares(Acc sum, Acc (*buffer)[kWarp], int row, int lane, int shares) {
  buffer[row][lane] = sum;
  for (int half = shares / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row % shares < half) buffer[row][lane] = sum += buffer[row + half][lane];
  }
  __syncthreads();
  return sum;
}

// Calls visit(sum_s t[n, s, c]) for all samples n of this thread, c being the channel of its lane; reads kSamples at a
// time. A block has 32 channels side by side and 32 rows of threads, which share samples, or with few samples also
// splits.
template <int kSamples, typename Acc, typename F>
__device__ __forceinline__ void for_each_sample(const Acc* __restrict__ t, const Finish<Acc>& f, int64_t c,
                                                Acc (*buffer)[kWarp], const F& visit) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int share = row & (f.split_threads - 1), step = kWarp / f.split_threads;
  const int64_t sample = f.splits * f.channels;
  for (int64_t base = 0; base < f.samples; base += kSamples * step) {
    const int64_t first = base + row / f.split_threads;
    Acc sum[kSamples] = {};
    for (int64_t s = share; s < f.splits; s += f.split_threads) {
#pragma unroll
      for (int u = 0; u < kSamples; ++u) {
        const int64_t n = first + u * step;
        if (n < f.samples && c < f.channels) sum[u] += t[n * sample + s * f.channels + c];
      }
    }
#pragma unroll
    for (int u = 0; u < kSamples; ++u) {
      if (f.split_threads > 1) sum[u] = sum_shares(sum[u], buffer, row, lane, f.split_threads);
      if (share == 0) visit(sum[u]);
    }
  }
}

// out[c] = total(sum_n post(sum_s t[n, s, c])).
template <typename Acc>
__global__ void __launch_bounds__(kWarp* kWarp)
    finish_channels_kernel(const Acc* __restrict__ t, const __grid_constant__ Finish<Acc> f, Sink<Acc> sink) {
  __shared__ Acc buffer[kWarp][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  Acc total = 0;
  for_each_sample<8>(t, f, c, buffer, [&](Acc sum) { total += apply(f.per_sample, sum); });
  total = sum_shares(total, buffer, row, lane, kWarp);
  if (row == 0 && c < f.channels) sink.store(0, 0, c, f.scale * (f.square_total ? total * total : total));
}

// out[r, c] for the four reductions, from planes of t: the sums of a·g and of (a·g)². With `three`, the sum of |a·g| is
// there too, and samples have one position, so that every sum may go over all of them.
template <typename Acc>
__global__ void __launch_bounds__(kWarp* kWarp)
    finish_all_kernel(const Acc* __restrict__ t, const __grid_constant__ Finish<Acc> f, bool three, Sink<Acc> sink) {
  __shared__ Acc buffer[kWarp][kWarp];
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + lane, plane = f.samples * f.splits * f.channels;
  Acc total[kReductions] = {};  // in the order of Reduction
  for_each_sample<4>(t, f, c, buffer, [&](Acc sum) {
    total[0] += sum;
    total[1] += sum * sum;
    total[2] += fabs(sum);
  });
  for_each_sample<4>(t + plane, f, c, buffer, [&](Acc sum) { total[3] += sum; });
  if (three) {
    total[1] = total[3];
    total[2] = 0;
    for_each_sample<4>(t + 2 * plane, f, c, buffer, [&](Acc sum) { total[2] += sum; });
  }
#pragma unroll
  for (int r = 0; r < kReductions; ++r) total[r] = sum_shares(total[r], buffer, row, lane, kWarp);
  if (row == 0 && c < f.channels) {
    sink.store(0, 0, c, total[0] * total[0]);
    sink.store(1, 0, c, total[1]);
    sink.store(2, 0, c, f.scale * total[2]);
    sink.store(3, 0, c, total[3]);
  }
}

// out[n, c] = sum_s t[n, s, c]
template <typename Acc>
__global__ void __launch_bounds__(kThreads)
    finish_samples_kernel(const Acc* __restrict__ t, const __grid_constant__ Finish<Acc> f, Sink<Acc> sink) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t n = quotient(i, f.channels), c = i - n * f.channels;
  if (n >= f.samples) return;
  const Acc* from = t + n * f.splits * f.channels + c;
  Acc sum = 0;
#pragma unroll 8
  for (int64_t s = 0; s < f.splits; ++s) sum += from[s * f.channels];
  sink.store(n, 0, c, sum);
}

template <typename Acc>
void launch_finish_channels(const Acc* t, Finish<Acc> f, const Sink<Acc>& sink, cudaStream_t stream) {
  if (f.per_sample == Post::kNone) {  // then splits are added up as samples are
    f.samples *= f.splits;
    f.splits = 1;
  }
  f.split_threads = finish_split_threads(f.samples, f.splits);
  const unsigned grid = grid_size(ceil_div<int64_t>(f.channels, kWarp), "finish_channels");
  finish_channels_kernel<Acc><<<grid, kWarp * kWarp, 0, stream>>>(t, f, sink);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Acc>
void launch_finish_all(const Acc* t, Finish<Acc> f, bool three, const Sink<Acc>& sink, cudaStream_t stream) {
  f.split_threads = finish_split_threads(f.samples, f.splits);
  const unsigned grid = grid_size(ceil_div<int64_t>(f.channels, kWarp), "finish_all");
  finish_all_kernel<Acc><<<grid, kWarp * kWarp, 0, stream>>>(t, f, three, sink);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Acc>
void launch_finish_samples(const Acc* t, const Finish<Acc>& f, const Sink<Acc>& sink, cudaStream_t stream) {
  const unsigned grid = grid_size(ceil_div<int64_t>(f.samples * f.channels, kThreads), "finish_samples");
  finish_samples_kernel<Acc><<<grid, kThreads, 0, stream>>>(t, f, sink);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Acc>
Finish<Acc> finish_of(const ChannelPlan& p) {
  return {p.samples, p.splits, p.channel.size, 1, Post::kNone, false, Acc(1)};
}

// The places of t[n, s, c], or of planes of it, in a contiguous tensor.
template <typename Acc>
Sink<Acc> partial_sink(const Tensor& partial) {
  const int64_t n = partial.dim() - 3;
  return {static_cast<Acc*>(partial.mutable_data_ptr()), partial.stride(n), partial.stride(n + 1), 1, false};
}

// The two tensors of a channel op, and their walk.
struct Pair {
  Tensor activation;
  Tensor gradient;
  Walk walk;
};

// Tensors of so many dimensions that don't merge that a plan can't hold them are copied first.
inline Pair walkable(const Tensor& activation, const Tensor& gradient) {
  Pair pair{activation, gradient, walk_activation(activation, gradient)};
  if (pair.walk.rest.size() > kMaxLoops) {
    pair.activation = torch::stable::contiguous(activation);
    pair.gradient = torch::stable::contiguous(gradient);
    pair.walk = walk_activation(pair.activation, pair.gradient);
  }
  return pair;
}

inline ChannelPlan plan_of(const Pair& pair, bool fold) {
  const planning::Operands operands{static_cast<int64_t>(pair.activation.element_size()),
                                    reinterpret_cast<uintptr_t>(pair.activation.const_data_ptr()),
                                    reinterpret_cast<uintptr_t>(pair.gradient.const_data_ptr())};
  return plan_channels(pair.walk, operands, fold);
}

// Calls f with a value of the C++ type.
template <typename F>
void for_type(ScalarType type, const F& f) {
  if (type == ScalarType::Float) return f(float());
  if (type == ScalarType::Half) return f(Half());
  if (type == ScalarType::BFloat16) return f(BFloat16());
  f(double());
}

}  // namespace taylor
