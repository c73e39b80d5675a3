// The tensors of weight_importance as a table that fits into a kernel's arguments, and which block works on what.
// Plain arithmetic, the same on the host and on the device.
//
// A weight and its gradient that lie alike and without gaps are [outer][segment][inner], whatever the order of their
// strides: the kept dimension, what lies outside it and what lies inside. Each index of the kept dimension is one sum
// over outer and inner.
//   outer == 1   a sum is one run (filters, a vector's elements): a few neighbouring threads share it
//   outer > 1    (the input side of a layer): a block walks down a slab of `per_unit` neighbouring segments
// Pairs that lie differently, or have gaps, go into a second table with strides.

#pragma once

#include <algorithm>

#include "../common.h"
#include "host_device.h"
#include "table.h"

namespace taylor {

constexpr int kTableItems = 640;  // 640 * 48 bytes: a kernel's arguments may take 32,764
constexpr int kStridedItems = 200;
constexpr int kWeightLoops = 4;
constexpr int64_t kLongRun = 8192;  // a run from this length on is a whole block's
constexpr int64_t kUnitElements = 8192;

struct WeightItem {
  const void* weight;
  const void* gradient;
  void* out;
  int32_t outer;
  int32_t segments;
  int32_t inner;
  int32_t per_unit;    // segments of one block
  int32_t vector;      // elements of a wide load, or 1
  int32_t first_unit;  // the first block that works on this item
};

struct StridedItem {
  const void* weight;
  const void* gradient;
  void* out;
  Loop segment;
  Loop rest[kWeightLoops];  // innermost first
  int32_t loops;
  int32_t first_unit;
};

using WeightTable = Table<WeightItem, kTableItems>;
using StridedTable = Table<StridedItem, kStridedItems>;
static_assert(sizeof(WeightTable) + 64 <= 32764 && sizeof(StridedTable) + 64 <= 32764,
              "the limit of a kernel's arguments");

// The threads that share one run: few for short runs, so that a block has many of them.
TAYLOR_HD int run_lanes(int64_t inner, int vector) {
  if (inner >= kLongRun) return kThreads;
  return static_cast<int>(
      lesser<int64_t>(kWarp, power_of_two(ceil_div<int64_t>(inner, vector > 1 ? vector : kUnroll))));
}

struct WeightUnit {
  int32_t first;  // segment
  int32_t count;
};

TAYLOR_HD WeightUnit weight_unit(const WeightItem& item, int32_t block) {
  const int32_t first = (block - item.first_unit) * item.per_unit;
  return {first, lesser(item.per_unit, item.segments - first)};
}

// A slab's threads: `across` side by side, each holding `vector` columns, and `down` the rows.
struct Slab {
  int32_t columns;
  int32_t across;
  int32_t down;
  int64_t start;   // offset of the slab's first element
  int64_t stride;  // from row to row
};

TAYLOR_HD Slab slab_of(const WeightItem& item, const WeightUnit& unit) {
  const int32_t columns = unit.count * item.inner, across = ceil_div(columns, item.vector);
  return {columns, across, kThreads / across, static_cast<int64_t>(unit.first) * item.inner,
          static_cast<int64_t>(item.segments) * item.inner};
}

TAYLOR_HD int64_t rest_length(const StridedItem& item) {
  int64_t length = 1;
  for (int i = 0; i < item.loops; ++i) length *= item.rest[i].size;
  return length;
}

// Where element `at` of a segment lies, from the segment's first one.
TAYLOR_HD void strided_offsets(const StridedItem& item, int64_t at, int64_t& weight, int64_t& gradient) {
  weight = 0;
  gradient = 0;
  for (int i = 0; i < item.loops; ++i) {
    const int64_t outer = quotient(at, item.rest[i].size), inner = at - outer * item.rest[i].size;
    weight += inner * item.rest[i].stride_a;
    gradient += inner * item.rest[i].stride_g;
    at = outer;
  }
}

namespace planning {

// The segments of a slab: near 64 columns, or few enough that tall weights still make many blocks.
inline int64_t slab_segments(int64_t outer, int64_t inner, int vector) {
  const int64_t columns = inner > 1 ? 48 : (outer >= 1024 ? 16 : 32);
  return round_up(ceil_div(columns, inner), vector > 1 ? std::max<int64_t>(vector, 8) : 1);
}

// [outer][segment][inner] of a pair that lies alike and without gaps; false for any other, or sizes that need 64 bits.
inline bool dense_form(const Walk& walk, WeightItem& item) {
  int64_t outer = 1, inner = 1, segment_stride = walk.channel.stride_a;
  if (walk.channel.size > 1 && walk.channel.stride_a != walk.channel.stride_g) return false;
  if (walk.channel.size == 1) segment_stride = 1;
  for (int64_t i = static_cast<int64_t>(walk.rest.size()) - 1; i >= 0; --i) {  // innermost first
    const Loop& loop = walk.rest[i];
    if (loop.stride_a != loop.stride_g) return false;
    if (walk.channel.size == 1 || loop.stride_a < segment_stride) {
      if (loop.stride_a != inner) return false;
      inner *= loop.size;
    } else {
      if (loop.stride_a != inner * walk.channel.size * outer) return false;
      outer *= loop.size;
    }
  }
  if (walk.channel.size > 1 && segment_stride != inner) return false;
  if (std::max({outer, inner, walk.channel.size}) > INT32_MAX / 2) return false;
  item.outer = static_cast<int32_t>(outer);
  item.segments = static_cast<int32_t>(walk.channel.size);
  item.inner = static_cast<int32_t>(inner);
  return true;
}

// Chooses loads and blocks; `wide` elements fill 16-byte loads of both operands. False for a slab that is too broad for
// a block.
inline bool divide(WeightItem& item, int wide) {
  const int64_t row = item.outer > 1 ? static_cast<int64_t>(item.segments) * item.inner : item.inner;
  const uintptr_t bases = reinterpret_cast<uintptr_t>(item.weight) | reinterpret_cast<uintptr_t>(item.gradient);
  item.vector = bases % 16 == 0 && row % wide == 0 ? wide : 1;
  if (item.outer > 1) {
    const int64_t segments = std::min<int64_t>(item.segments, slab_segments(item.outer, item.inner, item.vector));
    item.per_unit = static_cast<int32_t>(segments);
    return ceil_div<int64_t>(segments * item.inner, item.vector) <= kThreads;
  }
  const int lanes = run_lanes(item.inner, item.vector), at_once = kThreads / lanes;
  const int64_t passes =
      std::clamp<int64_t>(kUnitElements / std::max<int64_t>(1, int64_t{at_once} * item.inner), 1, 16);
  item.per_unit = static_cast<int32_t>(lanes == kThreads ? 1 : at_once * passes);
  return true;
}

inline StridedItem strided_form(const Walk& walk) {
  StridedItem item{};
  item.segment = walk.channel;
  item.loops = static_cast<int32_t>(walk.rest.size());
  for (int i = 0; i < item.loops; ++i) item.rest[i] = walk.rest[item.loops - 1 - i];
  return item;
}

}  // namespace planning

inline int64_t units_of(const WeightItem& item) { return ceil_div<int64_t>(item.segments, item.per_unit); }
inline int64_t units_of(const StridedItem& item) { return ceil_div<int64_t>(item.segment.size, kThreads / kWarp); }

inline int64_t unit_work(const WeightItem& item) {
  return static_cast<int64_t>(item.outer) * item.per_unit * item.inner;
}
inline int64_t unit_work(const StridedItem& item) { return rest_length(item) * (kThreads / kWarp); }

}  // namespace taylor
