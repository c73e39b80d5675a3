// The order of keep_mask, as whole numbers: what stays first has the lowest rank. Plain arithmetic on the bits, the
// same on the host and on the device, where a comparison of floats might flush denormals.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TAYLOR_RANK __host__ __device__ __forceinline__
#else
#define TAYLOR_RANK inline
#endif

namespace taylor {

// NaN gets 0, then come positive numbers, the largest first; 0.0 and -0.0 share one rank; then negative ones.
template <typename Bits>
TAYLOR_RANK Bits rank_of(Bits bits, Bits infinity) {
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1), kMagnitude = static_cast<Bits>(~kSign);
  const Bits magnitude = bits & kMagnitude;
  if (magnitude > infinity) return 0;
  return (bits & kSign) != 0 && magnitude != 0 ? bits : magnitude ^ kMagnitude;
}

// The bits of the number with this rank, or of a quiet NaN.
template <typename Bits>
TAYLOR_RANK Bits bits_of_rank(Bits rank, Bits infinity) {
  constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1), kMagnitude = static_cast<Bits>(~kSign);
  if (rank == 0) return infinity | (infinity & (0 - infinity)) >> 1;
  return (rank & kSign) != 0 ? rank : rank ^ kMagnitude;
}

constexpr uint32_t kInfinity32 = 0x7f800000u;
constexpr uint64_t kInfinity64 = 0x7ff0000000000000u;

}  // namespace taylor
