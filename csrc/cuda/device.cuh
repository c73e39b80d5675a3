// What the kernels share: wide loads, sums over a warp, the current stream.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common.h"
#include "host_device.h"

namespace taylor {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float element_of(uint32_t word, int, float) { return __uint_as_float(word); }
__device__ __forceinline__ float element_of(uint32_t word, int half, Half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half ? word >> 16 : word)));
}
__device__ __forceinline__ float element_of(uint32_t word, int half, BFloat16) {
  return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}

// kCount neighbours, loaded 16 bytes at a time. They stay as raw words until they are used: as elements, 16-bit types
// would take twice the registers.
template <typename T, int kCount>
struct Pack {
  static constexpr int kQuads = sizeof(T) * kCount / 16;
  uint4 quad[kQuads];

  __device__ __forceinline__ void load_if(const T* source, bool inside) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      quad[q] = inside ? __ldg(reinterpret_cast<const uint4*>(source) + q) : uint4{0, 0, 0, 0};
    }
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& q = quad[i / 4];
    return i % 4 == 0 ? q.x : (i % 4 == 1 ? q.y : (i % 4 == 2 ? q.z : q.w));
  }
  __device__ __forceinline__ Accumulator<T> get(int i) const {
    if constexpr (sizeof(T) == 8) {
      return __hiloint2double(word(2 * i + 1), word(2 * i));
    } else {
      return element_of(word(i * sizeof(T) / 4), i * sizeof(T) / 2 % 2, T());
    }
  }
};

template <typename T>
struct Pack<T, 1> {
  T value;

  __device__ __forceinline__ void load_if(const T* source, bool inside) { value = inside ? *source : T(0); }
  __device__ __forceinline__ Accumulator<T> get(int) const { return static_cast<Accumulator<T>>(value); }
};

// What a kernel sums, as far as it is known at compile time: a·g, which needs one fused multiply-add per element; one
// of the other terms; or several of them, each in a plane of its own.
enum class Mode { kPlain, kOther, kTwo, kThree };

constexpr int planes_of(Mode mode) { return mode == Mode::kThree ? 3 : (mode == Mode::kTwo ? 2 : 1); }

// Adds the terms of one product to sum[v], sum[v + kVector], ...
template <Mode mode, int kVector, typename Acc>
__device__ __forceinline__ void add_terms(Acc (&sum)[planes_of(mode) * kVector], int v, Acc a, Acc g, Term term) {
  if constexpr (mode == Mode::kOther) {
    const Acc product = a * g;
    sum[v] += term == Term::kSquare ? product * product : fabs(product);
  } else {
    sum[v] = fma(a, g, sum[v]);
  }
  if constexpr (planes_of(mode) > 1) {
    const Acc product = a * g;
    sum[v + kVector] += product * product;
    if constexpr (planes_of(mode) > 2) sum[v + 2 * kVector] += fabs(product);
  }
}

// The sum over `lanes` neighbouring lanes (a power of two), in the first of them. Every lane of the warp must call it.
template <typename Acc>
__device__ __forceinline__ Acc sum_lanes(Acc value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline unsigned grid_size(int64_t blocks, const char* op) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": more than 2**31 - 1 blocks");
  return static_cast<unsigned>(blocks);
}

}  // namespace taylor
