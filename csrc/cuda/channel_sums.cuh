// t[n, s, c] = the sum over a split of a·g, (a·g)² or |a·g|, or of several of them at once: the kernels behind every
// channel op. What each thread reads is in channel_plan.h. Each number is summed by one thread, warp or block in a
// fixed order: no atomics.

#pragma once

#include "channel_plan.h"
#include "device.cuh"

namespace taylor {

// Where the sums go, one plane of samples after another. With `add` they are added to what is there; one thread owns
// each place.
template <typename Acc>
struct Sink {
  Acc* out;
  int64_t stride_n;
  int64_t stride_s;
  int64_t stride_c;
  bool add;

  __device__ __forceinline__ void store(int64_t n, int64_t s, int64_t c, Acc value) const {
    Acc* place = out + n * stride_n + s * stride_s + c * stride_c;
    *place = add ? *place + value : value;
  }
};

// Sums over the rows of threads of a block; the first row holds them. All threads take part.
template <typename Acc, int kSums>
__device__ __forceinline__ void sum_rows_of_threads(Acc (&sum)[kSums], const ChannelPlan& p) {
  __shared__ Acc buffer[kSums][kThreads];
  const int row = column_row(p, threadIdx.x);
#pragma unroll
  for (int v = 0; v < kSums; ++v) buffer[v][threadIdx.x] = sum[v];
  for (int half = (1 << p.row_bits) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) {
#pragma unroll
      for (int v = 0; v < kSums; ++v) {
        sum[v] += buffer[v][threadIdx.x + (half << p.channel_bits)];
        buffer[v][threadIdx.x] = sum[v];
      }
    }
  }
}

template <typename T, int kVector, bool kLinear, Mode mode>
__global__ void __launch_bounds__(kThreads, (kLinear || kVector == 1) && planes_of(mode) == 1 ? 3 : 2)
    column_sums_kernel(const T* __restrict__ a, const T* __restrict__ g, const __grid_constant__ ChannelPlan p,
                       Term term, Sink<Accumulator<T>> sink) {
  using Acc = Accumulator<T>;
  const ChannelTask t = column_task(p, blockIdx.x, threadIdx.x);
  Acc sum[planes_of(mode) * kVector] = {};
  if (t.active) {
    const Offsets start = row_start(p, t.n, t.c);
    const int64_t step_a = t.step * p.rest[0].stride_a, step_g = t.step * p.rest[0].stride_g;
    a += start.a + (kLinear ? t.first * p.rest[0].stride_a : 0);
    g += start.g + (kLinear ? t.first * p.rest[0].stride_g : 0);
    for (int64_t l = t.first; l < t.end; l += kUnroll * t.step) {
      Pack<T, kVector> x[kUnroll], y[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = l + u * t.step;
        const Offsets o = kLinear ? Offsets{u * step_a, u * step_g} : element_offsets(p, at);
        x[u].load_if(a + o.a, at < t.end);
        y[u].load_if(g + o.g, at < t.end);
      }
      if (kLinear) {
        a += kUnroll * step_a;
        g += kUnroll * step_g;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) add_terms<mode, kVector>(sum, v, x[u].get(v), y[u].get(v), term);
      }
    }
  }
  sum_rows_of_threads(sum, p);
  if (t.active && column_row(p, threadIdx.x) == 0) {
    for (int v = 0; v < kVector; ++v) {
#pragma unroll
      for (int plane = 0; plane < planes_of(mode); ++plane) {
        sink.store(t.n + plane * p.samples, t.s, t.c + v, sum[v + plane * kVector]);
      }
    }
  }
}

// Adds the part of a row that one lane sums with wide loads: single elements up to the first 16-byte border and after
// the last one.
template <typename T, int kVector, Mode mode>
__device__ __forceinline__ void sum_run(const T* a, const T* g, int64_t length, Term term,
                                        Accumulator<T> (&sum)[planes_of(mode)]) {
  using Acc = Accumulator<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t to_border = (16 - reinterpret_cast<uintptr_t>(a) % 16) % 16 / sizeof(T);
  const int64_t head = lesser(length, to_border), packs = (length - head) / kVector, tail = head + packs * kVector;
  if (lane < head) add_terms<mode, 1>(sum, 0, static_cast<Acc>(a[lane]), static_cast<Acc>(g[lane]), term);
  for (int64_t pack = lane; pack < packs; pack += kUnroll * kWarp) {
    Pack<T, kVector> x[kUnroll], y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = pack + u * kWarp;
      x[u].load_if(a + head + at * kVector, at < packs);
      y[u].load_if(g + head + at * kVector, at < packs);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) add_terms<mode, 1>(sum, 0, x[u].get(v), y[u].get(v), term);
    }
  }
  if (tail + lane < length) {
    add_terms<mode, 1>(sum, 0, static_cast<Acc>(a[tail + lane]), static_cast<Acc>(g[tail + lane]), term);
  }
}

// A warp for each (n, s, c).
template <typename T, int kVector, Mode mode>
__global__ void __launch_bounds__(kThreads, 3)
    row_sums_kernel(const T* __restrict__ a, const T* __restrict__ g, const __grid_constant__ ChannelPlan p, Term term,
                    Sink<Accumulator<T>> sink) {
  using Acc = Accumulator<T>;
  const ChannelTask t = row_task(p, blockIdx.x, threadIdx.x);
  if (!t.active) return;  // a whole warp
  const Offsets start = row_start(p, t.n, t.c);
  Acc sum[planes_of(mode)] = {};
  if constexpr (kVector > 1) {
    sum_run<T, kVector, mode>(a + start.a + t.first, g + start.g + t.first, t.end - t.first, term, sum);
  } else {
#pragma unroll 4
    for (int64_t l = t.first + threadIdx.x % kWarp; l < t.end; l += t.step) {
      const Offsets o = element_offsets(p, l);
      add_terms<mode, 1>(sum, 0, static_cast<Acc>(a[start.a + o.a]), static_cast<Acc>(g[start.g + o.g]), term);
    }
  }
#pragma unroll
  for (int plane = 0; plane < planes_of(mode); ++plane) {
    const Acc total = sum_lanes(sum[plane], kWarp);
    if (threadIdx.x % kWarp == 0) sink.store(t.n + plane * p.samples, t.s, t.c, total);
  }
}

// The term that the packed path keeps of each element: with several terms the product, for the others follow from it.
template <Mode mode, typename Acc>
__device__ __forceinline__ Acc kept_term(Acc a, Acc g, Term term) {
  Acc kept[1] = {};
  add_terms<mode == Mode::kOther ? Mode::kOther : Mode::kPlain, 1>(kept, 0, a, g, term);
  return kept[0];
}

// The terms of a block's run of rows, in the order in which they lie.
template <typename T, int kVector, Mode mode>
__device__ __forceinline__ void store_terms(const T* a, const T* g, int elements, Term term, Accumulator<T>* terms) {
  using Acc = Accumulator<T>;
  const int whole = elements / kVector * kVector;
  for (int i = threadIdx.x * kVector; i < whole; i += 2 * kThreads * kVector) {
    Pack<T, kVector> x[2], y[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int at = i + u * kThreads * kVector;
      x[u].load_if(a + at, at < whole);
      y[u].load_if(g + at, at < whole);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int at = i + u * kThreads * kVector;
      if (at < whole) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) terms[at + v] = kept_term<mode>(x[u].get(v), y[u].get(v), term);
      }
    }
  }
  const int rest = whole + threadIdx.x;
  if (rest < elements) terms[rest] = kept_term<mode>(static_cast<Acc>(a[rest]), static_cast<Acc>(g[rest]), term);
}

template <typename T, int kVector, Mode mode>
__global__ void __launch_bounds__(kThreads)
    packed_sums_kernel(const T* __restrict__ a, const T* __restrict__ g, const __grid_constant__ ChannelPlan p,
                       Term term, Sink<Accumulator<T>> sink) {
  using Acc = Accumulator<T>;
  alignas(16) __shared__ Acc terms[kPackedElements];
  const PackedTask t = packed_task(p, blockIdx.x);
  const int length = static_cast<int>(p.length), lanes = p.lanes_per_row, lane = threadIdx.x % lanes;
  store_terms<T, kVector, mode>(a + t.first_row * length, g + t.first_row * length, t.elements, term, terms);
  __syncthreads();
  for (int base = 0; base < t.rows; base += kThreads / lanes) {
    const int row = base + threadIdx.x / lanes;
    Acc sum[planes_of(mode)] = {};
    if (row < t.rows) {
      for (int l = lane; l < length; l += lanes) {
        const Acc kept = terms[row * length + l];
        sum[0] += kept;
        if constexpr (planes_of(mode) > 1) sum[1] += kept * kept;
      }
    }
    const int64_t flat = t.first_row + row, n = quotient(flat, p.channel.size);
#pragma unroll
    for (int plane = 0; plane < planes_of(mode); ++plane) {
      const Acc total = sum_lanes(sum[plane], lanes);
      if (row < t.rows && lane == 0) sink.store(n + plane * p.samples, 0, flat - n * p.channel.size, total);
    }
  }
}

// With Mode::kThree, columns at one stride only: those of plans that `fold` samples of one position.
template <typename T, Mode mode>
void launch_channel_sums(const Tensor& activation, const Tensor& gradient, const ChannelPlan& p, Term term,
                         const Sink<Accumulator<T>>& sink, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const unsigned grid = grid_size(p.blocks, "channel_sums");
  const T* a = static_cast<const T*>(activation.const_data_ptr());
  const T* g = static_cast<const T*>(gradient.const_data_ptr());
  if (p.path == Path::kColumns && p.vector == 1) {
    column_sums_kernel<T, 1, false, mode><<<grid, kThreads, 0, stream>>>(a, g, p, term, sink);
  } else if (p.path == Path::kColumns && p.linear) {
    column_sums_kernel<T, kWide, true, mode><<<grid, kThreads, 0, stream>>>(a, g, p, term, sink);
  } else if constexpr (mode != Mode::kThree) {
    if (p.path == Path::kPacked) {
      packed_sums_kernel<T, kWide, mode><<<grid, kThreads, 0, stream>>>(a, g, p, term, sink);
    } else if (p.path == Path::kRows && p.vector > 1) {
      row_sums_kernel<T, kWide, mode><<<grid, kThreads, 0, stream>>>(a, g, p, term, sink);
    } else if (p.path == Path::kRows) {
      row_sums_kernel<T, 1, mode><<<grid, kThreads, 0, stream>>>(a, g, p, term, sink);
    } else {
      column_sums_kernel<T, kWide, false, mode><<<grid, kThreads, 0, stream>>>(a, g, p, term, sink);
    }
  } else {
    STD_TORCH_CHECK(false, "channel_sums: three terms at once are summed in columns only");
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The plain sums of every type are compiled in channel_sums.cu, once.
extern template void launch_channel_sums<float, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                              const Sink<float>&, cudaStream_t);
extern template void launch_channel_sums<Half, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                             const Sink<float>&, cudaStream_t);
extern template void launch_channel_sums<BFloat16, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                                 const Sink<float>&, cudaStream_t);
extern template void launch_channel_sums<double, Mode::kPlain>(const Tensor&, const Tensor&, const ChannelPlan&, Term,
                                                               const Sink<double>&, cudaStream_t);

}  // namespace taylor
