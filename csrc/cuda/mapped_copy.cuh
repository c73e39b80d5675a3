// Copies between tensors that differ in what they keep, tile by tile: see mapped_plan.h. Each element is written by one
// thread: no atomics. What the lists say is read on the device.

#pragma once

#include <type_traits>

#include "device.cuh"
#include "mapped_plan.h"

namespace taylor {

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, kCount>& pack) {
  if constexpr (kCount == 1) {
    *target = pack.value;
  } else {
#pragma unroll
    for (int q = 0; q < Pack<T, kCount>::kQuads; ++q) reinterpret_cast<uint4*>(target)[q] = pack.quad[q];
  }
}

__device__ __forceinline__ uint32_t bits_of_element(Half value) { return value.x; }
__device__ __forceinline__ uint32_t bits_of_element(BFloat16 value) { return value.x; }

// Word i of a pack of T: the values that `get` gives, rounded to nearest even.
template <typename T, typename From, int kCount>
__device__ __forceinline__ uint32_t word_of(const Pack<From, kCount>& from, int i) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(from.get(i));
  } else {
    return bits_of_element(static_cast<T>(from.get(2 * i))) | bits_of_element(static_cast<T>(from.get(2 * i + 1)))
                                                                  << 16;
  }
}

template <typename To, typename From, int kCount>
__device__ __forceinline__ Pack<To, kCount> converted(const Pack<From, kCount>& from) {
  if constexpr (std::is_same_v<From, To>) {
    return from;
  } else if constexpr (kCount == 1) {
    Pack<To, 1> to;
    to.value = static_cast<To>(static_cast<float>(from.value));  // from float64 too, as PyTorch casts
    return to;
  } else {
    Pack<To, kCount> to;
#pragma unroll
    for (int q = 0; q < Pack<To, kCount>::kQuads; ++q) {
      to.quad[q] = uint4{word_of<To>(from, 4 * q), word_of<To>(from, 4 * q + 1), word_of<To>(from, 4 * q + 2),
                         word_of<To>(from, 4 * q + 3)};
    }
    return to;
  }
}

// Where the packs of one thread lie.
struct Lane {
  int32_t row;    // first of its outer places in the tile
  int32_t at;     // its elements in the inner part of the walked tensor
  int32_t other;  // and in that of the other one; -1: nowhere
  bool active;
};

template <Places kPlaces>
__device__ __forceinline__ Lane lane_of(const MappedItem& item, const MappedTile& tile, const int64_t* keep) {
  Lane lane;
  lane.row = threadIdx.x / tile.across;
  const int32_t pack = tile.start + threadIdx.x - lane.row * tile.across;
  lane.active = lane.row < tile.down && pack < tile.packs;
  lane.at = pack * item.vector;
  lane.other = lane.active ? other_inner<kPlaces>(item, keep, lane.at) : -1;
  return lane;
}

// The walked tensor is written: every element of it, with 0 where it has no counterpart.
template <typename From, typename To, int kCount>
__device__ __forceinline__ void copy_to_walked(const MappedItem& item, const MappedTile& tile, const Lane& lane,
                                               const int32_t* rows) {
  const int64_t step = static_cast<int64_t>(item.lines) * item.length;
  const int64_t other_step = static_cast<int64_t>(item.other_lines) * item.other_length;
  const From* const from = static_cast<const From*>(item.other) + lane.other;
  To* const to = static_cast<To*>(const_cast<void*>(item.walked)) + tile.first * step + lane.at;
  for (int32_t row = lane.row; row < tile.count; row += rows_together(tile)) {
    Pack<From, kCount> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t at = row + u * tile.down, other = at < tile.count ? rows[at] : -1;
      packs[u].load_if(from + other * other_step, other >= 0 && lane.other >= 0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t at = row + u * tile.down;
      if (at >= tile.count) continue;
      store_pack(to + at * step, converted<To>(packs[u]));
    }
  }
}

// The walked tensor is read, and what has a counterpart is written to it.
template <typename From, typename To, int kCount>
__device__ __forceinline__ void copy_from_walked(const MappedItem& item, const MappedTile& tile, const Lane& lane,
                                                 const int32_t* rows) {
  const int64_t step = static_cast<int64_t>(item.lines) * item.length;
  const int64_t other_step = static_cast<int64_t>(item.other_lines) * item.other_length;
  const From* const from = static_cast<const From*>(item.walked) + tile.first * step + lane.at;
  To* const to = static_cast<To*>(const_cast<void*>(item.other)) + lane.other;
  if (lane.other < 0) return;
  for (int32_t row = lane.row; row < tile.count; row += rows_together(tile)) {
    Pack<From, kCount> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t at = row + u * tile.down;
      packs[u].load_if(from + at * step, at < tile.count && rows[at] >= 0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t at = row + u * tile.down, other = at < tile.count ? rows[at] : -1;
      if (other < 0) continue;
      store_pack(to + other * other_step, converted<To>(packs[u]));
    }
  }
}

// One tile. All threads of the block take part; `rows` is shared memory for kMostRows numbers.
template <Places kPlaces>
__device__ __forceinline__ Lane begin_tile(const MappedItem& item, const MappedTile& tile, const int64_t* keep,
                                           int32_t* rows) {
  for (int32_t i = threadIdx.x; i < tile.count; i += kThreads) {
    rows[i] = other_place<kPlaces>(keep, item.list_outer, item.other_outer, tile.first + i);
  }
  const Lane lane = lane_of<kPlaces>(item, tile, keep);
  __syncthreads();
  return lane;
}

template <Walked kWalked, typename From, typename To, int kCount>
__device__ __forceinline__ void copy_tile(const MappedItem& item, const MappedTile& tile, const Lane& lane,
                                          const int32_t* rows) {
  if constexpr (kWalked == Walked::kWritten) {
    if (lane.active) copy_to_walked<From, To, kCount>(item, tile, lane, rows);
  } else {
    copy_from_walked<From, To, kCount>(item, tile, lane, rows);
  }
}

}  // namespace taylor
