// Which thread copies what between two tensors that differ in what they keep. Plain arithmetic, the same on the host
// and on the device.
//
// A copy walks one of the two tensors: the one that it writes, or where what is not kept stays as it is, the one that
// it reads. The walked tensor is [outer][lines][length] in the order of its memory, without gaps, and so is the other
// one with other sizes. Each of the three has a keep list or none; without one both sizes are equal. A block's tile is
// `per_unit` outer places times `across` neighbouring packs of `vector` elements of the inner part.

#pragma once

#include <algorithm>
#include <vector>

#include "../kept.h"
#include "host_device.h"
#include "table.h"

namespace taylor {

constexpr int kMappedItems = 400;  // 400 * 80 bytes: a kernel's arguments may take 32,764
constexpr int kMostRows = 256;     // outer places of a tile, whose places in the other tensor lie in shared memory
constexpr int kLevels = 3;

// Which of the two tensors is walked.
enum class Walked { kWritten, kRead };

// How the places of the walked tensor become those of the other one.
enum class Places {
  kListed,   // place k of a list is where entry k points to
  kInverse,  // place c is the position of c among the entries
};

enum class Kind : uint8_t { kFloat, kHalf, kBFloat16, kDouble };

struct MappedItem {
  const void* walked;
  const void* other;
  int32_t outer;
  int32_t lines;
  int32_t length;
  int32_t other_outer;
  int32_t other_lines;
  int32_t other_length;
  int32_t list_outer;  // where the list begins in keep, or -1
  int32_t list_lines;
  int32_t list_length;
  int32_t per_unit;
  int32_t chunks;  // tiles side by side
  int32_t first_unit;
  int16_t across;
  uint8_t vector;
  uint8_t type_from;  // a Kind
  uint8_t type_to;
};

using MappedTable = Table<MappedItem, kMappedItems>;
static_assert(sizeof(MappedTable) + 64 <= 32764, "the limit of a kernel's arguments");

struct MappedTile {
  int32_t first;  // outer place
  int32_t count;
  int32_t across;  // packs side by side
  int32_t down;    // outer places at once
  int32_t start;   // first pack of the inner part
  int32_t packs;   // of the whole inner part
};

TAYLOR_HD int32_t inner_packs(const MappedItem& item) { return item.lines * item.length / item.vector; }

TAYLOR_HD MappedTile mapped_tile(const MappedItem& item, int32_t unit) {
  const int32_t row = unit / item.chunks, chunk = unit - row * item.chunks, first = row * item.per_unit;
  return {first,
          lesser(item.per_unit, item.outer - first),
          item.across,
          kThreads / item.across,
          chunk * item.across,
          inner_packs(item)};
}

// From the outer places that a thread copies together to its next ones: kUnroll of them, tile.down apart.
TAYLOR_HD int32_t rows_together(const MappedTile& tile) { return kUnroll * tile.down; }

// The position of `place` among entries, or -1. They ascend but for negative ones, which may be anywhere: of those in
// the middle, the next one that isn't decides.
TAYLOR_HD int32_t position_of(const int64_t* entries, int32_t count, int32_t place) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    int32_t at = middle;
    while (at < high && entries[at] < 0) ++at;
    if (at < high && entries[at] == place) return at;
    if (at < high && entries[at] < place) {
      low = at + 1;
    } else {
      high = middle;
    }
  }
  return -1;
}

// Where a place of the walked tensor is in the other one, -1 for nowhere. `count` is the other tensor's.
template <Places kPlaces>
TAYLOR_HD int32_t other_place(const int64_t* keep, int32_t list, int32_t count, int32_t place) {
  if (list < 0) return place;
  if (kPlaces == Places::kInverse) return position_of(keep + list, count, place);
  const int64_t entry = keep[list + place];
  return entry < 0 ? -1 : static_cast<int32_t>(entry);
}

// Where an element of the inner part is in that of the other tensor, -1 for nowhere.
template <Places kPlaces>
TAYLOR_HD int32_t other_inner(const MappedItem& item, const int64_t* keep, int32_t at) {
  const int32_t line = at / item.length, i = at - line * item.length;
  const int32_t other_line = other_place<kPlaces>(keep, item.list_lines, item.other_lines, line);
  const int32_t other_i = other_place<kPlaces>(keep, item.list_length, item.other_length, i);
  return other_line < 0 || other_i < 0 ? -1 : other_line * item.other_length + other_i;
}

inline int64_t units_of(const MappedItem& item) { return ceil_div<int64_t>(item.outer, item.per_unit) * item.chunks; }
inline int64_t unit_work(const MappedItem& item) { return int64_t{item.per_unit} * item.across * item.vector; }

namespace planning {

// One dimension of the walked tensor, or several without lists that lie end to end.
struct Level {
  int64_t size = 1;
  int64_t other = 1;
  int64_t list = -1;
};

// Outermost first, from the dimensions of the walked tensor; dimensions of length 1 vanish.
inline std::vector<Level> levels_of(const Tensor& walked, const Tensor& other, const KeptLists& lists,
                                    const std::vector<size_t>& order) {
  std::vector<Level> levels;
  for (size_t i = order.size(); i-- > 0;) {
    const size_t d = order[i];
    const Level level{walked.size(d), other.size(d), d < kDims && lists[d].given ? lists[d].begin : -1};
    if (level.list < 0 && level.size == 1) continue;
    Level* const outside = levels.empty() ? nullptr : &levels.back();
    if (outside != nullptr && outside->list < 0 && level.list < 0 && outside->size * level.size <= INT32_MAX) {
      outside->size *= level.size;
      outside->other *= level.size;
    } else {
      levels.push_back(level);
    }
  }
  return levels;
}

// A single level without a list is cut in two, so that a thread has several packs to copy.
inline void cut_level(std::vector<Level>& levels, int64_t vector) {
  if (levels.size() != 1 || levels[0].list >= 0) return;
  for (const int64_t parts : {16, 8, 4, 2}) {
    const int64_t size = levels[0].size / parts;
    if (levels[0].size % (parts * vector) != 0 || size < 1024) continue;
    levels = {{parts, parts, -1}, {size, size, -1}};
    return;
  }
}

inline int32_t fitting(int64_t size) {
  STD_TORCH_CHECK(size <= INT32_MAX, "a dimension of 2**31 elements or more");
  return static_cast<int32_t>(size);
}

// Tiles as broad as a block, or a few more narrower ones where that leaves fewer threads idle.
inline void set_across(MappedItem& item) {
  const int64_t packs = inner_packs(item), least = ceil_div<int64_t>(packs, kThreads);
  int64_t best = 0;
  for (int64_t chunks = least; chunks <= least + 4; ++chunks) {
    const int64_t across = ceil_div(packs, chunks), busy = packs * (kThreads / across) * 1000 / (chunks * kThreads);
    if (busy <= best) continue;
    best = busy;
    item.across = static_cast<int16_t>(across);
    item.chunks = static_cast<int32_t>(ceil_div(packs, across));
  }
}

// More outer places for each tile of a large tensor, as long as about `wanted` tiles are left.
inline void set_rows(MappedItem& item, int64_t wanted) {
  int64_t rows = std::min<int64_t>(int64_t{kThreads / item.across} * kUnroll, kMostRows);
  while (rows * 2 <= kMostRows && ceil_div<int64_t>(item.outer, rows) * item.chunks > 2 * wanted) rows *= 2;
  item.per_unit = static_cast<int32_t>(std::min<int64_t>(rows, item.outer));
}

// False for more levels than an item has. `wide` elements fill 16 bytes of the narrower type; 1 if none may.
inline bool plan_item(MappedItem& item, std::vector<Level> levels, int wide, int64_t wanted) {
  const uintptr_t bases = reinterpret_cast<uintptr_t>(item.walked) | reinterpret_cast<uintptr_t>(item.other);
  const bool whole = !levels.empty() && levels.back().list < 0 && levels.back().size % wide == 0 && bases % 16 == 0;
  cut_level(levels, whole ? wide : 1);
  if (levels.size() > kLevels) return false;
  if (levels.size() < 2) levels.insert(levels.begin(), Level{});
  if (levels.size() < 2) levels.push_back(Level{});
  if (levels.size() < kLevels) levels.insert(levels.begin() + 1, Level{});
  item.outer = fitting(levels[0].size);
  item.lines = fitting(levels[1].size);
  item.length = fitting(levels[2].size);
  item.other_outer = fitting(levels[0].other);
  item.other_lines = fitting(levels[1].other);
  item.other_length = fitting(levels[2].other);
  fitting(levels[1].size * levels[2].size);
  fitting(levels[1].other * levels[2].other);
  item.list_outer = fitting(levels[0].list);
  item.list_lines = fitting(levels[1].list);
  item.list_length = fitting(levels[2].list);
  item.vector = static_cast<uint8_t>(whole ? wide : 1);
  set_across(item);
  set_rows(item, wanted);
  return true;
}

}  // namespace planning
}  // namespace taylor
