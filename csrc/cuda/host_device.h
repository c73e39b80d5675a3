// What lets the index arithmetic of the kernels compile, and be tested, without a GPU or nvcc.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TAYLOR_HD __host__ __device__ __forceinline__
#else
#define TAYLOR_HD inline
#endif

namespace taylor {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // loads of one thread, per operand, that are in flight together

template <typename I>
TAYLOR_HD I ceil_div(I x, I y) {
  return (x + y - 1) / y;
}

template <typename I>
TAYLOR_HD I round_up(I x, I y) {
  return ceil_div(x, y) * y;
}

template <typename I>
TAYLOR_HD constexpr I lesser(I x, I y) {
  return x < y ? x : y;
}

// x / y of numbers that are not negative. Most fit into 32 bits, where a division costs a quarter.
TAYLOR_HD int64_t quotient(int64_t x, int64_t y) {
  return ((x | y) >> 32) == 0 ? static_cast<int64_t>(static_cast<uint32_t>(x) / static_cast<uint32_t>(y)) : x / y;
}

// The least power of two that is not below x.
TAYLOR_HD int64_t power_of_two(int64_t x) {
  int64_t p = 1;
  while (p < x) p *= 2;
  return p;
}

// The least b with 2**b >= x.
TAYLOR_HD int32_t bits_of(int64_t x) {
  int32_t bits = 0;
  while ((int64_t{1} << bits) < x) ++bits;
  return bits;
}

}  // namespace taylor
