// Which thread of a channel sum reads which elements. Plain arithmetic, the same on the host and on the device.
//
// A sum over two tensors [N, C, ...] is cut as t[n, s, c]: samples n, splits s of the summed elements, channels c.
// There are three paths:
//   columns  the channels lie side by side (channels_last, [N, L, C], [N, C]): a thread holds `vector` channels and
//            walks down the rows
//   rows     the summed elements of one (n, c) lie side by side (NCHW, [N, C, L]): a warp walks along
//   packed   as rows, but short and end to end (7x7 of 16 bits is 98 bytes, so most rows start off a 16-byte border):
//            a block reads a run of whole rows from an aligned start and sorts the products into rows in shared memory
// Any other strides take columns or rows, element by element. Everything follows from shapes, strides, types and
// alignment, never from the device: two runs are bit-equal, on any two GPUs.

#pragma once

#include <algorithm>
#include <vector>

#include "../common.h"
#include "host_device.h"

namespace taylor {

constexpr int kMaxLoops = 6;             // summed dimensions that do not merge
constexpr int64_t kTargetBlocks = 1024;  // a few waves of a large GPU; more would only make the finish longer
constexpr int64_t kMaxChain = 1024;      // fp32 additions one after another: bounds the rounding error
constexpr int64_t kPackedElements = 4096;
constexpr int64_t kPackedLength = 512;

enum class Path : int32_t { kColumns, kRows, kPacked };

struct ChannelPlan {
  Path path = Path::kColumns;
  bool linear = true;  // the summed elements lie at one stride
  int32_t vector = 1;  // elements of a 16-byte load, or 1
  int32_t loops = 0;
  int64_t samples = 1;
  int64_t length = 1;  // summed elements of one (sample, channel)
  int64_t splits = 1;
  int64_t per_split = 1;
  int64_t blocks = 1;
  int32_t tiles = 1;           // columns: blocks side by side
  int32_t channel_bits = 0;    // columns: log2 of the threads of a block side by side, ...
  int32_t row_bits = 0;        // ... and down the rows; the rest of its threads are for further samples
  int32_t rows_per_block = 1;  // packed
  int32_t lanes_per_row = 1;   // packed
  Loop sample;
  Loop channel;
  Loop rest[kMaxLoops];  // innermost first
};

struct Offsets {
  int64_t a;
  int64_t g;
};

// Where the l-th summed element lies, from the first one of its (sample, channel).
TAYLOR_HD Offsets element_offsets(const ChannelPlan& p, int64_t l) {
  Offsets at{0, 0};
  for (int i = 0; i + 1 < p.loops; ++i) {
    const int64_t outer = quotient(l, p.rest[i].size), inner = l - outer * p.rest[i].size;
    at.a += inner * p.rest[i].stride_a;
    at.g += inner * p.rest[i].stride_g;
    l = outer;
  }
  if (p.loops > 0) {
    at.a += l * p.rest[p.loops - 1].stride_a;
    at.g += l * p.rest[p.loops - 1].stride_g;
  }
  return at;
}

TAYLOR_HD Offsets row_start(const ChannelPlan& p, int64_t n, int64_t c) {
  return {n * p.sample.stride_a + c * p.channel.stride_a, n * p.sample.stride_g + c * p.channel.stride_g};
}

// The share of one thread or warp: elements first, first + step, ... below end, of channel c (and vector - 1 more) of
// sample n.
struct ChannelTask {
  int64_t n;
  int64_t s;
  int64_t c;
  int64_t first;
  int64_t end;
  int64_t step;
  bool active;
};

TAYLOR_HD int column_row(const ChannelPlan& p, int thread) {
  return thread >> p.channel_bits & ((1 << p.row_bits) - 1);
}

TAYLOR_HD ChannelTask column_task(const ChannelPlan& p, uint32_t block, int thread) {
  const uint32_t tiles = static_cast<uint32_t>(p.tiles), splits = static_cast<uint32_t>(p.splits);
  const uint32_t group = block / tiles, samples = group / splits;
  const int column = thread & ((1 << p.channel_bits) - 1), bits = p.channel_bits + p.row_bits;
  ChannelTask t;
  t.n = static_cast<int64_t>(samples) * (kThreads >> bits) + (thread >> bits);
  t.s = group - samples * splits;
  t.c = ((static_cast<int64_t>(block - group * tiles) << p.channel_bits) + column) * p.vector;
  t.first = t.s * p.per_split + column_row(p, thread);
  t.end = lesser(p.length, (t.s + 1) * p.per_split);
  t.step = 1 << p.row_bits;
  t.active = t.n < p.samples && t.c < p.channel.size;
  return t;
}

TAYLOR_HD ChannelTask row_task(const ChannelPlan& p, uint32_t block, int thread) {
  const int64_t item = static_cast<int64_t>(block) * (kThreads / kWarp) + thread / kWarp;
  const int64_t group = quotient(item, p.channel.size);
  ChannelTask t;
  t.c = item - group * p.channel.size;
  t.n = quotient(group, p.splits);
  t.s = group - t.n * p.splits;
  t.first = t.s * p.per_split;
  t.end = lesser(p.length, t.first + p.per_split);
  t.step = kWarp;
  t.active = t.n < p.samples;
  return t;
}

// The run of rows of one block of the packed path; row r is sample r / C, channel r % C.
struct PackedTask {
  int64_t first_row;
  int32_t rows;
  int32_t elements;
};

TAYLOR_HD PackedTask packed_task(const ChannelPlan& p, uint32_t block) {
  const int64_t first = static_cast<int64_t>(block) * p.rows_per_block;
  const int64_t rows = lesser<int64_t>(p.rows_per_block, p.samples * p.channel.size - first);
  return {first, static_cast<int32_t>(rows), static_cast<int32_t>(rows * p.length)};
}

// How the 32 rows of threads of a finishing block share samples and splits: `split_threads` of them add up the splits
// of a sample.
TAYLOR_HD int finish_split_threads(int64_t samples, int64_t splits) {
  const int64_t spare = kWarp / lesser<int64_t>(kWarp, power_of_two(samples));
  return static_cast<int>(lesser(spare, power_of_two(splits)));
}

namespace planning {

struct Operands {
  int64_t itemsize;
  uintptr_t a;
  uintptr_t g;
};

inline bool aligned(int64_t elements, const Operands& o) { return elements * o.itemsize % 16 == 0; }

inline bool aligned(const Loop& loop, const Operands& o) {
  return loop.size <= 1 || (aligned(loop.stride_a, o) && aligned(loop.stride_g, o));
}

inline bool aligned_bases(const Operands& o) { return o.a % 16 == 0 && o.g % 16 == 0; }

inline void split(ChannelPlan& p, int64_t least, int64_t most, int64_t unit) {
  p.per_split = round_up(std::clamp(p.per_split, least, most), unit);
  p.splits = ceil_div(p.length, p.per_split);
  p.per_split = round_up(ceil_div(p.length, p.splits), unit);
  p.splits = ceil_div(p.length, p.per_split);
}

inline void plan_columns(ChannelPlan& p, const Operands& o) {
  const int64_t wide = 16 / o.itemsize;
  bool vectors = p.channel.stride_a == 1 && p.channel.stride_g == 1 && p.channel.size % wide == 0;
  vectors = vectors && aligned_bases(o) && aligned(p.sample, o);
  for (int i = 0; i < p.loops; ++i) vectors = vectors && aligned(p.rest[i], o);
  p.path = Path::kColumns;
  p.vector = static_cast<int32_t>(vectors ? wide : 1);
  const int64_t columns = power_of_two(std::min<int64_t>(kWarp, ceil_div<int64_t>(p.channel.size, p.vector)));
  const int64_t rows = std::min(kThreads / columns, power_of_two(ceil_div<int64_t>(p.length, kUnroll)));
  p.channel_bits = bits_of(columns);
  p.row_bits = bits_of(rows);
  const int64_t tiles = ceil_div(p.channel.size, columns * p.vector),
                groups = ceil_div(p.samples, kThreads / (columns * rows));
  p.tiles = static_cast<int32_t>(tiles);
  const int64_t unsplit = tiles * groups;  // half the target will do: a finish costs a launch, and splits are uneven
  p.per_split = unsplit >= kTargetBlocks / 2 ? p.length : ceil_div(p.length * unsplit, kTargetBlocks);
  split(p, rows * kUnroll, rows * kMaxChain, rows * kUnroll);
  p.blocks = unsplit * p.splits;
}

inline bool rows_end_to_end(const ChannelPlan& p) {
  const int64_t sample = p.length * p.channel.size;
  const bool channels = p.channel.size == 1 || (p.channel.stride_a == p.length && p.channel.stride_g == p.length);
  return channels && (p.samples == 1 || (p.sample.stride_a == sample && p.sample.stride_g == sample));
}

inline void plan_packed(ChannelPlan& p, int64_t wide) {
  p.path = Path::kPacked;
  p.vector = static_cast<int32_t>(wide);
  p.rows_per_block = static_cast<int32_t>(kPackedElements / p.length / wide * wide);
  p.lanes_per_row = static_cast<int32_t>(std::min<int64_t>(kWarp, power_of_two(ceil_div<int64_t>(p.length, 8))));
  p.splits = 1;
  p.per_split = p.length;
  p.blocks = ceil_div<int64_t>(p.samples * p.channel.size, p.rows_per_block);
}

inline void plan_rows(ChannelPlan& p, const Operands& o) {
  const int64_t wide = 16 / o.itemsize;
  const bool runs = p.loops == 1 && p.rest[0].stride_a == 1 && p.rest[0].stride_g == 1;
  if (runs && p.length <= kPackedLength && rows_end_to_end(p) && aligned_bases(o)) return plan_packed(p, wide);
  // Both operands of a row must reach a 16-byte border at the same element.
  const Loop sample{p.samples, p.sample.stride_a - p.sample.stride_g, 0};
  const Loop channel{p.channel.size, p.channel.stride_a - p.channel.stride_g, 0};
  const bool vectors = runs && o.a % 16 == o.g % 16 && aligned(sample, o) && aligned(channel, o);
  p.path = Path::kRows;
  p.vector = static_cast<int32_t>(vectors ? wide : 1);
  const int64_t rows = p.samples * p.channel.size, unit = kWarp * wide;
  p.per_split = ceil_div(p.length * rows, 2 * kTargetBlocks * kThreads / kWarp);
  split(p, 2 * unit, kWarp * kMaxChain, unit);
  p.blocks = ceil_div<int64_t>(rows * p.splits, kThreads / kWarp);
}

}  // namespace planning

// The plan of a sum over two tensors seen as `walk`. With `fold` samples need not be kept apart and are summed too,
// where that leaves one stride. walk.rest holds at most kMaxLoops loops; no size is 0.
inline ChannelPlan plan_channels(const Walk& walk, const planning::Operands& operands, bool fold) {
  std::vector<Loop> rest = walk.rest;
  ChannelPlan p;
  p.sample = walk.sample;
  p.channel = walk.channel;
  p.samples = walk.sample.size;
  if (fold) {
    std::vector<Loop> all = rest;
    all.push_back(walk.sample);
    all = merged(all);
    if (all.size() <= 1) {
      rest = all;
      p.sample = Loop{};
      p.samples = 1;
    }
  }
  p.loops = static_cast<int32_t>(rest.size());
  p.linear = p.loops <= 1;
  for (int i = 0; i < p.loops; ++i) {
    p.rest[i] = rest[p.loops - 1 - i];
    p.length *= p.rest[i].size;
  }
  const int64_t along = p.loops == 0 ? INT64_MAX : p.rest[0].stride_a + p.rest[0].stride_g;
  const bool columns = p.loops == 0 || (p.channel.size > 1 && p.channel.stride_a + p.channel.stride_g <= along);
  if (columns) {
    planning::plan_columns(p, operands);
  } else {
    planning::plan_rows(p, operands);
  }
  return p;
}

}  // namespace taylor
