// Walks every thread of every block of the plans of large shapes, which are too large to run: each element must be read
// exactly once, each sum written exactly once, within bounds, and wide loads must lie on 16-byte borders. Prints what
// does not hold.

#include <cstdio>
#include <string>

#include "cuda/channel_plan.h"
#include "cuda/weight_table.h"

namespace taylor {

int failures = 0;

void expect(bool holds, const char* what, const std::string& where = "weights") {
  if (holds) return;
  ++failures;
  std::printf("%s: %s\n", where.c_str(), what);
}

// What one (n, s, c) gets, over all threads.
struct Seen {
  int64_t elements = 0;
  int64_t writers = 0;
};

struct Case {
  std::string name;
  std::vector<int64_t> size;
  std::vector<int64_t> stride_a;
  std::vector<int64_t> stride_g;
  int64_t itemsize;
  Path path;
};

std::vector<int64_t> contiguous(const std::vector<int64_t>& size, const std::vector<int>& order) {
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  for (size_t i = order.size(); i-- > 0;) {
    stride[order[i]] = next;
    next *= size[order[i]];
  }
  return stride;
}

Walk walk_of(const Case& k, size_t kept, bool samples) {
  Walk walk;
  walk.channel = {k.size[kept], k.stride_a[kept], k.stride_g[kept]};
  if (samples) walk.sample = {k.size[0], k.stride_a[0], k.stride_g[0]};
  for (size_t d = samples ? 1 : 0; d < k.size.size(); ++d) {
    if (d != kept) walk.rest.push_back({k.size[d], k.stride_a[d], k.stride_g[d]});
  }
  walk.rest = merged(walk.rest);
  return walk;
}

int64_t last_offset(const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  int64_t last = 0;
  for (size_t d = 0; d < size.size(); ++d) last += (size[d] - 1) * stride[d];
  return last;
}

void check_span(const Case& k, const ChannelPlan& p, const ChannelTask& t, bool vectors_along_channels) {
  const Offsets start = row_start(p, t.n, t.c);
  const int64_t last = t.first + (t.end - 1 - t.first) / t.step * t.step;
  const int64_t extra = vectors_along_channels ? p.vector - 1 : 0;
  for (const int64_t l : {t.first, last}) {
    const Offsets o = element_offsets(p, l);
    expect(start.a + o.a >= 0 && start.a + o.a + extra <= last_offset(k.size, k.stride_a), "activation out of bounds",
           k.name);
    expect(start.g + o.g >= 0 && start.g + o.g + extra <= last_offset(k.size, k.stride_g), "gradient out of bounds",
           k.name);
    if (vectors_along_channels && p.vector > 1) {
      expect((start.a + o.a) * k.itemsize % 16 == 0 && (start.g + o.g) * k.itemsize % 16 == 0, "off a border", k.name);
    }
  }
  expect((t.end - t.first) / t.step <= kMaxChain, "a long chain of additions", k.name);
}

// Adds the share of each thread (columns) or warp (rows) to what its (n, s, c) has seen.
void visit(const Case& k, const ChannelPlan& p, std::vector<Seen>& seen) {
  const bool columns = p.path == Path::kColumns;
  for (int64_t block = 0; block < p.blocks; ++block) {
    for (int thread = 0; thread < kThreads; thread += columns ? 1 : kWarp) {
      const uint32_t index = static_cast<uint32_t>(block);
      const ChannelTask t = columns ? column_task(p, index, thread) : row_task(p, index, thread);
      if (!t.active) continue;
      for (int64_t v = 0; v < (columns ? p.vector : 1); ++v) {
        Seen& place = seen[(t.n * p.splits + t.s) * p.channel.size + t.c + v];
        if (t.first < t.end) place.elements += columns ? ceil_div(t.end - t.first, t.step) : t.end - t.first;
        place.writers += columns ? column_row(p, thread) == 0 : 1;
      }
      if (t.first < t.end) check_span(k, p, t, columns);
    }
  }
}

void visit_packed(const Case& k, const ChannelPlan& p, std::vector<Seen>& seen) {
  for (int64_t block = 0; block < p.blocks; ++block) {
    const PackedTask t = packed_task(p, static_cast<uint32_t>(block));
    expect(t.rows > 0 && t.elements <= kPackedElements, "a block's rows don't fit", k.name);
    expect(t.first_row * p.length * k.itemsize % 16 == 0, "a block starts off a border", k.name);
    for (int32_t row = 0; row < t.rows; ++row) {
      seen[t.first_row + row].elements += p.length;
      seen[t.first_row + row].writers += 1;
    }
  }
}

void check_channels(const Case& k, bool fold) {
  const ChannelPlan p = plan_channels(walk_of(k, 1, true), {k.itemsize, 0, 0}, fold);
  expect(p.path == k.path, "another path than expected", k.name);
  expect(p.blocks > 0 && p.blocks <= INT32_MAX, "blocks", k.name);
  const int64_t wide = 16 / k.itemsize;
  const bool divides = k.path != Path::kColumns || k.size[1] % wide == 0;
  expect(p.vector == (divides ? wide : 1), "loads of another width than expected", k.name);
  std::vector<Seen> seen(p.samples * p.splits * p.channel.size);
  if (p.path == Path::kPacked) {
    visit_packed(k, p, seen);
  } else {
    visit(k, p, seen);
  }
  int64_t total = 0;
  for (const Seen& place : seen) {
    total += place.elements;
    expect(place.writers == 1, "a sum that is not written once", k.name);
  }
  int64_t numel = 1;
  for (const int64_t size : k.size) numel *= size;
  expect(total == numel, "not every element is read once", k.name);
  std::printf("# %s%s: %lld blocks, %lld splits, %d per load\n", k.name.c_str(), fold ? ", folded" : "",
              static_cast<long long>(p.blocks), static_cast<long long>(p.splits), p.vector);
}

void check_all_channels() {
  const std::vector<int> nchw{0, 1, 2, 3}, nhwc{0, 2, 3, 1};
  struct Shape {
    const char* name;
    std::vector<int64_t> size;
    Path contiguous_path;
  };
  const std::vector<Shape> shapes{
      {"56x56", {256, 64, 56, 56}, Path::kRows},    {"28x28", {64, 512, 28, 28}, Path::kRows},
      {"14x14", {64, 1024, 14, 14}, Path::kPacked}, {"7x7", {256, 512, 7, 7}, Path::kPacked},
      {"27x27", {8, 13, 27, 27}, Path::kRows},      {"1x1", {300, 1000, 1, 1}, Path::kColumns},
      {"2**31 of a sample", {3, 8, 16384, 16400}, Path::kRows}, {"2**31 of a channel", {1, 8, 46400, 46400}, Path::kRows}};
  for (const Shape& shape : shapes) {
    for (const int64_t itemsize : {2, 4}) {
      if (itemsize == 4 && shape.size[3] > 10000) continue;
      const std::string name = std::string(shape.name) + (itemsize == 2 ? " of 16 bits" : " of 32 bits");
      const auto rows = contiguous(shape.size, nchw), columns = contiguous(shape.size, nhwc);
      for (const bool fold : {false, true}) {
        check_channels({name, shape.size, rows, rows, itemsize, shape.contiguous_path}, fold);
        check_channels({name + " nhwc", shape.size, columns, columns, itemsize, Path::kColumns}, fold);
      }
    }
  }
}

// [N, C], and tokens: [N, L, C] seen as [N, C, L].
void check_flat_channels() {
  for (const bool fold : {false, true}) {
    for (const int64_t itemsize : {2, 4}) {
      for (const int64_t channels : {768, 770, 3072}) {
        const std::vector<int64_t> batch{4096, channels}, tokens{64, channels, 197};
        const auto flat = contiguous(batch, {0, 1}), last = contiguous(tokens, {0, 2, 1});
        check_channels({"[N, C]", batch, flat, flat, itemsize, Path::kColumns}, fold);
        check_channels({"[N, L, C]", tokens, last, last, itemsize, Path::kColumns}, fold);
      }
    }
  }
}

// Weights of many sizes in one list, as blocks find them.
void check_weights() {
  std::vector<WeightItem> items;
  std::vector<std::vector<int>> written;
  const std::vector<std::vector<int64_t>> shapes{
      {64, 3, 7, 7},   {512, 512, 3, 3},  {2048, 512, 1, 1}, {1000, 2048, 1, 1}, {32, 1, 3, 3},      {64, 64, 1, 1},
      {1280, 7, 5, 5}, {70000, 64, 1, 1}, {8, 40000, 1, 1},  {3, 5, 7, 11},      {4096, 25088, 1, 1}};
  for (int copy = 0; copy < 10; ++copy) {
    for (const auto& shape : shapes) {
      for (const std::vector<int>& order : {std::vector<int>{0, 1, 2, 3}, std::vector<int>{0, 2, 3, 1}}) {
        for (const size_t dim : {size_t{0}, size_t{1}}) {
          for (const int wide : {2, 4, 8}) {
            const auto stride = contiguous(shape, order);
            WeightItem item{};
            item.out = reinterpret_cast<void*>(written.size());
            expect(planning::dense_form(walk_of({"", shape, stride, stride, 0, Path::kRows}, dim, false), item),
                   "not dense");
            expect(static_cast<int64_t>(item.outer) * item.segments * item.inner ==
                           shape[0] * shape[1] * shape[2] * shape[3] &&
                       item.segments == shape[dim],
                   "the sizes of the three loops");
            if (!planning::divide(item, wide)) continue;
            items.push_back(item);
            written.emplace_back(item.segments);
          }
        }
      }
    }
  }
  const auto tables = tables_of<WeightTable>(items, kTableItems);
  expect(tables.size() == (items.size() + kTableItems - 1) / kTableItems, "the number of tables");
  for (const WeightTable& table : tables) {
    int64_t previous = INT64_MAX;
    for (int32_t block = 0; block < table.units; ++block) {
      const WeightItem& item = table.item[find_item(table, block)];
      const WeightUnit unit = weight_unit(item, block);
      expect(unit.count > 0 && unit.first >= 0 && unit.first + unit.count <= item.segments, "segments out of bounds");
      const int64_t work = unit_work(item);
      expect(work <= previous, "a block with more to do starts later");
      previous = work;
      for (int32_t i = unit.first; i < unit.first + unit.count; ++i)
        ++written[reinterpret_cast<uintptr_t>(item.out)][i];
      if (item.outer == 1) continue;
      const Slab slab = slab_of(item, unit);
      expect(slab.down >= 1 && slab.across * slab.down <= kThreads, "a slab that is too broad");
      expect(slab.columns * slab.down <= kThreads * item.vector, "a slab's sums don't fit into shared memory");
      expect(item.vector == 1 || (slab.start % item.vector == 0 && slab.stride % item.vector == 0),
             "a slab off a border");
      expect(item.vector == 1 || slab.columns % item.vector == 0, "a slab with part of a wide load");
    }
  }
  for (const auto& segments : written) {
    for (const int count : segments) expect(count == 1, "a segment that is not summed once");
  }
}

}  // namespace taylor

int main() {
  taylor::check_all_channels();
  taylor::check_flat_channels();
  taylor::check_weights();
  return taylor::failures == 0 ? 0 : 1;
}
