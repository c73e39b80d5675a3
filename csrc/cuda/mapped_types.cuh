// The types of a mapped copy, chosen by each block: a network has tensors of several, and they share a launch.

#pragma once

#include "mapped_copy.cuh"

namespace taylor {

template <Walked kWalked, typename From, typename To>
__device__ __forceinline__ void copy_widths(const MappedItem& item, const MappedTile& tile, const Lane& lane,
                                            const int32_t* rows) {
  constexpr bool kCastsDouble = !std::is_same_v<From, To> && (sizeof(From) == 8 || sizeof(To) == 8);
  if constexpr (!kCastsDouble) {
    constexpr int kWide = 16 / lesser(sizeof(From), sizeof(To));
    if (item.vector > 1) return copy_tile<kWalked, From, To, kWide>(item, tile, lane, rows);
  }
  copy_tile<kWalked, From, To, 1>(item, tile, lane, rows);
}

template <Walked kWalked, typename From>
__device__ __forceinline__ void copy_cast(const MappedItem& item, const MappedTile& tile, const Lane& lane,
                                          const int32_t* rows) {
  const Kind to = static_cast<Kind>(item.type_to);
  if constexpr (!std::is_same_v<From, float>) {
    if (to == Kind::kFloat) return copy_widths<kWalked, From, float>(item, tile, lane, rows);
  }
  if constexpr (!std::is_same_v<From, Half>) {
    if (to == Kind::kHalf) return copy_widths<kWalked, From, Half>(item, tile, lane, rows);
  }
  if constexpr (!std::is_same_v<From, BFloat16>) {
    if (to == Kind::kBFloat16) return copy_widths<kWalked, From, BFloat16>(item, tile, lane, rows);
  }
  if constexpr (!std::is_same_v<From, double>) copy_widths<kWalked, From, double>(item, tile, lane, rows);
}

// A copy of bits needs no more than the size of an element.
template <Walked kWalked>
__device__ __forceinline__ void copy_types(const MappedItem& item, const MappedTile& tile, const Lane& lane,
                                           const int32_t* rows) {
  const Kind from = static_cast<Kind>(item.type_from);
  if (item.type_from == item.type_to) {
    if (from == Kind::kFloat) return copy_widths<kWalked, uint32_t, uint32_t>(item, tile, lane, rows);
    if (from == Kind::kDouble) return copy_widths<kWalked, uint64_t, uint64_t>(item, tile, lane, rows);
    return copy_widths<kWalked, uint16_t, uint16_t>(item, tile, lane, rows);
  }
  if (from == Kind::kFloat) return copy_cast<kWalked, float>(item, tile, lane, rows);
  if (from == Kind::kHalf) return copy_cast<kWalked, Half>(item, tile, lane, rows);
  if (from == Kind::kBFloat16) return copy_cast<kWalked, BFloat16>(item, tile, lane, rows);
  copy_cast<kWalked, double>(item, tile, lane, rows);
}

}  // namespace taylor
