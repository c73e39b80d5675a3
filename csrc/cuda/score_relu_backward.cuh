// gx = 0 where output <= 0, else the gradient, and on the way t[n, s, c] = the sums over a split of output·gradient and
// skip·gx. What each thread reads and writes is in channel_plan.h: output, skip and gx are its operand `a`, the
// gradient is `g`. Each sum is formed by one thread, warp or block in a fixed order: no atomics.

#pragma once

#include "channel_sums.cuh"

namespace taylor {

template <typename T>
struct ReluPointers {
  const T* output;
  const T* gradient;
  const T* skip;
  T* gx;
};

// The places of both sums.
template <typename Acc>
struct ReluSinks {
  Sink<Acc> sums;
  Sink<Acc> skip_sums;
};

// The gradient's own bits or 0, for the numbers of one word. NaN is not <= 0.
__device__ __forceinline__ uint32_t masked_word(uint32_t output, uint32_t gradient, float) {
  return __uint_as_float(output) <= 0 ? 0 : gradient;
}
template <typename T>
__device__ __forceinline__ uint32_t masked_word(uint32_t output, uint32_t gradient, T zero) {
  const uint32_t low = element_of(output, 0, zero) <= 0 ? 0 : gradient & 0xffffu;
  return low | (element_of(output, 1, zero) <= 0 ? 0 : gradient & 0xffff0000u);
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> masked(const Pack<T, kCount>& output, const Pack<T, kCount>& gradient) {
  Pack<T, kCount> gx;
  if constexpr (kCount == 1) {
    gx.value = output.get(0) <= 0 ? T(0) : gradient.value;
  } else if constexpr (sizeof(T) == 8) {
    static_assert(kCount == 2, "one 16-byte load");
    const bool first = output.get(0) <= 0, second = output.get(1) <= 0;
    const uint4& g = gradient.quad[0];
    gx.quad[0] = uint4{first ? 0 : g.x, first ? 0 : g.y, second ? 0 : g.z, second ? 0 : g.w};
  } else {
    static_assert(Pack<T, kCount>::kQuads == 1, "one 16-byte load");
    const uint4 &o = output.quad[0], &g = gradient.quad[0];
    gx.quad[0] = uint4{masked_word(o.x, g.x, T()), masked_word(o.y, g.y, T()), masked_word(o.z, g.z, T()),
                       masked_word(o.w, g.w, T())};
  }
  return gx;
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* target, const Pack<T, kCount>& pack) {
  if constexpr (kCount == 1) {
    *target = pack.value;
  } else {
    *reinterpret_cast<uint4*>(target) = pack.quad[0];
  }
}

// One element of every operand, as a pack of one.
template <bool kSkip, typename T>
__device__ __forceinline__ void relu_element(const ReluPointers<T>& x, int64_t at, int64_t at_g, Accumulator<T>& sum,
                                             Accumulator<T>& skip_sum) {
  using Acc = Accumulator<T>;
  const T o = x.output[at], g = x.gradient[at_g], gx = static_cast<Acc>(o) <= 0 ? T(0) : g;
  x.gx[at] = gx;
  sum = fma(static_cast<Acc>(o), static_cast<Acc>(g), sum);
  if constexpr (kSkip) skip_sum = fma(static_cast<Acc>(x.skip[at]), static_cast<Acc>(gx), skip_sum);
}

// As many packs as are in flight together: all loads come first, for the compiler moves none past a store. Sums are one
// for each place of a pack, or a single one.
template <bool kSkip, int kVector, int kSums, typename T>
__device__ __forceinline__ void relu_packs(const ReluPointers<T>& x, const Offsets (&at)[kUnroll],
                                           const bool (&inside)[kUnroll], Accumulator<T> (&sum)[kSums],
                                           Accumulator<T> (&skip_sum)[kSums]) {
  Pack<T, kVector> output[kUnroll], gradient[kUnroll], skip[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    output[u].load_if(x.output + at[u].a, inside[u]);
    gradient[u].load_if(x.gradient + at[u].g, inside[u]);
    if constexpr (kSkip) skip[u].load_if(x.skip + at[u].a, inside[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Pack<T, kVector> gx = masked(output[u], gradient[u]);
    if (inside[u]) store(x.gx + at[u].a, gx);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sum[v % kSums] = fma(output[u].get(v), gradient[u].get(v), sum[v % kSums]);
      if constexpr (kSkip) skip_sum[v % kSums] = fma(skip[u].get(v), gx.get(v), skip_sum[v % kSums]);
    }
  }
}

template <typename T, int kVector, bool kLinear, bool kSkip>
__global__ void __launch_bounds__(kThreads, kSkip ? 2 : 3)
    column_relu_kernel(const ReluPointers<T> x, const __grid_constant__ ChannelPlan p,
                       const ReluSinks<Accumulator<T>> sinks) {
  using Acc = Accumulator<T>;
  const ChannelTask t = column_task(p, blockIdx.x, threadIdx.x);
  Acc sum[kVector] = {}, skip_sum[kVector] = {};
  if (t.active) {
    const Offsets start = row_start(p, t.n, t.c);
    const int64_t step_a = t.step * p.rest[0].stride_a, step_g = t.step * p.rest[0].stride_g;
    int64_t a = start.a + (kLinear ? t.first * p.rest[0].stride_a : 0);
    int64_t g = start.g + (kLinear ? t.first * p.rest[0].stride_g : 0);
    for (int64_t l = t.first; l < t.end; l += kUnroll * t.step) {
      Offsets at[kUnroll];
      bool inside[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Offsets o = kLinear ? Offsets{u * step_a, u * step_g} : element_offsets(p, l + u * t.step);
        at[u] = {a + o.a, g + o.g};
        inside[u] = l + u * t.step < t.end;
      }
      relu_packs<kSkip, kVector>(x, at, inside, sum, skip_sum);
      if (kLinear) {
        a += kUnroll * step_a;
        g += kUnroll * step_g;
      }
    }
  }
  sum_rows_of_threads(sum, p);
  if constexpr (kSkip) {
    __syncthreads();  // the same shared memory again
    sum_rows_of_threads(skip_sum, p);
  }
  if (t.active && column_row(p, threadIdx.x) == 0) {
    for (int v = 0; v < kVector; ++v) {
      sinks.sums.store(t.n, t.s, t.c + v, sum[v]);
      if constexpr (kSkip) sinks.skip_sums.store(t.n, t.s, t.c + v, skip_sum[v]);
    }
  }
}

// The part of a row that one lane has with wide loads and stores: single elements up to the first 16-byte border and
// after the last one. The pointers are those of the row.
template <bool kSkip, int kVector, typename T>
__device__ __forceinline__ void relu_run(const ReluPointers<T>& x, int64_t length, Accumulator<T> (&sum)[1],
                                         Accumulator<T> (&skip_sum)[1]) {
  const int lane = threadIdx.x % kWarp;
  const int64_t to_border = (16 - reinterpret_cast<uintptr_t>(x.output) % 16) % 16 / sizeof(T);
  const int64_t head = lesser(length, to_border), packs = (length - head) / kVector, tail = head + packs * kVector;
  if (lane < head) relu_element<kSkip>(x, lane, lane, sum[0], skip_sum[0]);
  for (int64_t pack = lane; pack < packs; pack += kUnroll * kWarp) {
    Offsets at[kUnroll];
    bool inside[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = head + (pack + u * kWarp) * kVector;
      at[u] = {first, first};
      inside[u] = pack + u * kWarp < packs;
    }
    relu_packs<kSkip, kVector>(x, at, inside, sum, skip_sum);
  }
  if (tail + lane < length) relu_element<kSkip>(x, tail + lane, tail + lane, sum[0], skip_sum[0]);
}

// A warp for each (n, s, c).
template <typename T, int kVector, bool kSkip>
__global__ void __launch_bounds__(kThreads, kSkip ? 2 : 3)
    row_relu_kernel(const ReluPointers<T> x, const __grid_constant__ ChannelPlan p,
                    const ReluSinks<Accumulator<T>> sinks) {
  using Acc = Accumulator<T>;
  const ChannelTask t = row_task(p, blockIdx.x, threadIdx.x);
  if (!t.active) return;  // a whole warp
  const Offsets start = row_start(p, t.n, t.c);
  Acc sum[1] = {}, skip_sum[1] = {};
  if constexpr (kVector > 1) {
    const int64_t at = start.a + t.first;
    const ReluPointers<T> row{x.output + at, x.gradient + start.g + t.first, kSkip ? x.skip + at : nullptr, x.gx + at};
    relu_run<kSkip, kVector>(row, t.end - t.first, sum, skip_sum);
  } else {
    for (int64_t l = t.first + threadIdx.x % kWarp; l < t.end; l += kUnroll * t.step) {
      Offsets at[kUnroll];
      bool inside[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Offsets o = element_offsets(p, l + u * t.step);
        at[u] = {start.a + o.a, start.g + o.g};
        inside[u] = l + u * t.step < t.end;
      }
      relu_packs<kSkip, 1>(x, at, inside, sum, skip_sum);
    }
  }
  sum[0] = sum_lanes(sum[0], kWarp);
  if constexpr (kSkip) skip_sum[0] = sum_lanes(skip_sum[0], kWarp);
  if (threadIdx.x % kWarp == 0) {
    sinks.sums.store(t.n, t.s, t.c, sum[0]);
    if constexpr (kSkip) sinks.skip_sums.store(t.n, t.s, t.c, skip_sum[0]);
  }
}

// Elements of a block of the packed path: the terms of both sums fit into 32 KiB of shared memory.
template <typename T, bool kSkip>
constexpr int kReluPackedElements = kSkip && sizeof(T) == 8 ? kPackedElements / 2 : static_cast<int>(kPackedElements);

// gx, and the terms of a block's run of rows in the order in which they lie; those of the skip come `stride` later.
template <typename T, int kVector, bool kSkip>
__device__ __forceinline__ void store_relu_terms(const ReluPointers<T>& x, int elements, Accumulator<T>* terms,
                                                 int stride) {
  using Acc = Accumulator<T>;
  const int whole = elements / kVector * kVector;
  for (int i = threadIdx.x * kVector; i < whole; i += 2 * kThreads * kVector) {
    Pack<T, kVector> output[2], gradient[2], skip[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int at = i + u * kThreads * kVector;
      output[u].load_if(x.output + at, at < whole);
      gradient[u].load_if(x.gradient + at, at < whole);
      if constexpr (kSkip) skip[u].load_if(x.skip + at, at < whole);
    }
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int at = i + u * kThreads * kVector;
      if (at < whole) {
        const Pack<T, kVector> gx = masked(output[u], gradient[u]);
        store(x.gx + at, gx);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          terms[at + v] = output[u].get(v) * gradient[u].get(v);
          if constexpr (kSkip) terms[stride + at + v] = skip[u].get(v) * gx.get(v);
        }
      }
    }
  }
  const int rest = whole + threadIdx.x;
  if (rest < elements) {
    Acc term = 0, skip_term = 0;
    relu_element<kSkip>(x, rest, rest, term, skip_term);
    terms[rest] = term;
    if constexpr (kSkip) terms[stride + rest] = skip_term;
  }
}

template <typename T, int kVector, bool kSkip>
__global__ void __launch_bounds__(kThreads)
    packed_relu_kernel(const ReluPointers<T> x, const __grid_constant__ ChannelPlan p,
                       const ReluSinks<Accumulator<T>> sinks) {
  using Acc = Accumulator<T>;
  constexpr int kElements = kReluPackedElements<T, kSkip>;
  alignas(16) __shared__ Acc terms[(kSkip ? 2 : 1) * kElements];
  const PackedTask t = packed_task(p, blockIdx.x);
  const int length = static_cast<int>(p.length), lanes = p.lanes_per_row, lane = threadIdx.x % lanes;
  const int64_t at = t.first_row * length;
  const ReluPointers<T> run{x.output + at, x.gradient + at, kSkip ? x.skip + at : nullptr, x.gx + at};
  store_relu_terms<T, kVector, kSkip>(run, t.elements, terms, kElements);
  __syncthreads();
  for (int base = 0; base < t.rows; base += kThreads / lanes) {
    const int row = base + threadIdx.x / lanes;
    Acc sum = 0, skip_sum = 0;
    if (row < t.rows) {
      for (int l = lane; l < length; l += lanes) {
        sum += terms[row * length + l];
        if constexpr (kSkip) skip_sum += terms[kElements + row * length + l];
      }
    }
    sum = sum_lanes(sum, lanes);
    if constexpr (kSkip) skip_sum = sum_lanes(skip_sum, lanes);
    const int64_t flat = t.first_row + row, n = quotient(flat, p.channel.size), c = flat - n * p.channel.size;
    if (row < t.rows && lane == 0) {
      sinks.sums.store(n, 0, c, sum);
      if constexpr (kSkip) sinks.skip_sums.store(n, 0, c, skip_sum);
    }
  }
}

}  // namespace taylor
