// Walks every thread of every tile of mapped copies between large tensors, which are too large to run here: each pack
// of the walked tensor must have one thread, wide packs must lie on 16-byte borders in both tensors and within a run,
// and no tile may have more rows than its shared memory. Prints what does not hold.

#include <cstdio>
#include <string>

#include "cuda/mapped_plan.h"

namespace taylor {

int failures = 0;

void expect(bool holds, const char* what, const std::string& where) {
  if (holds) return;
  if (++failures < 50) std::printf("%s: %s\n", where.c_str(), what);
}

using planning::Level;

constexpr uintptr_t kAligned = 1 << 20;

void check(const std::string& name, const std::vector<Level>& levels, int wide, int64_t wanted, int vector) {
  MappedItem item{};
  item.walked = item.other = reinterpret_cast<const void*>(kAligned);
  expect(planning::plan_item(item, levels, wide, wanted), "not planned", name);
  expect(item.vector == vector, "packs of another width than expected", name);
  int64_t elements = 1;
  for (const Level& level : levels) elements *= level.size;
  expect(int64_t{item.outer} * item.lines * item.length == elements, "the sizes of the three levels", name);
  expect(item.across >= 1 && item.across <= kThreads, "a tile that is too broad", name);
  expect(item.length % item.vector == 0, "a pack in two runs", name);
  expect(item.vector == 1 || (item.list_length < 0 && item.other_length == item.length), "a pack of a mapped run",
         name);
  std::vector<uint8_t> seen(int64_t{item.outer} * inner_packs(item));
  const int64_t units = units_of(item);
  for (int64_t unit = 0; unit < units; ++unit) {
    const MappedTile tile = mapped_tile(item, static_cast<int32_t>(unit));
    expect(tile.count > 0 && tile.count <= kMostRows, "rows of a tile", name);
    expect(tile.across * tile.down <= kThreads, "threads of a tile", name);
    for (int thread = 0; thread < kThreads; ++thread) {
      const int32_t row = thread / tile.across, pack = tile.start + thread - row * tile.across;
      if (row >= tile.down || pack >= tile.packs) continue;
      for (int32_t first = row; first < tile.count; first += rows_together(tile)) {
        for (int32_t r = first; r < tile.count && r < first + kUnroll * tile.down; r += tile.down) {
          ++seen[int64_t{tile.first + r} * tile.packs + pack];
        }
      }
    }
  }
  for (const uint8_t count : seen) expect(count == 1, "a pack that has not one thread", name);
  std::printf("# %s: %lld tiles, %d x %d packs of %d\n", name.c_str(), static_cast<long long>(units), item.per_unit,
              item.across, item.vector);
}

Level kept(int64_t size, int64_t other) { return {size, other, 0}; }
Level whole(int64_t size) { return {size, size, -1}; }

void check_activations() {
  for (const int wide : {2, 4, 8}) {
    for (const int64_t channels : {1, 24, 64, 130, 300, 2048}) {
      const std::string name = std::to_string(channels) + " of 16/" + std::to_string(wide) + " bytes";
      check("nchw 28x28, " + name, {whole(64), kept(channels, 77), whole(784)}, wide, 4096, wide);
      check("nchw 7x7, " + name, {whole(64), kept(channels, 4096), whole(49)}, wide, 4096, 1);
      check("nhwc, " + name, {whole(64 * 784), kept(channels, 77)}, wide, 4096, 1);
    }
  }
}

void check_weights() {
  for (const int wide : {2, 4, 8}) {
    for (const int64_t rows : {1, 3, 64, 1000, 2048}) {
      const std::string name = std::to_string(rows) + " rows of 16/" + std::to_string(wide) + " bytes";
      check("3x3, " + name, {kept(rows, 5), kept(512, 256), whole(9)}, wide, 512, 1);
      check("3x3 nhwc, " + name, {kept(rows, 5), whole(9), kept(512, 256)}, wide, 512, 1);
      check("1x1, " + name, {kept(rows, 5), kept(2048, 1024)}, wide, 512, 1);
      check("rows only, " + name, {kept(rows, 5), whole(4608)}, wide, 512, wide);
      check("vector, " + name, {kept(rows, 5)}, wide, 512, 1);
    }
    for (const int64_t size : {1, 7, 1000, 4096, 64 * 64 * 9, 2048 * 512}) {
      check("whole", {whole(size)}, wide, 512, size % wide == 0 ? wide : 1);
    }
  }
}

void check_others() {
  MappedItem item{};
  const std::vector<Level> four{whole(2), kept(3, 1), whole(4), kept(5, 1)};
  item.walked = item.other = reinterpret_cast<const void*>(kAligned);
  expect(!planning::plan_item(item, four, 4, 512), "four levels were planned", "four levels");
  item.other = reinterpret_cast<const void*>(kAligned + 8);
  expect(planning::plan_item(item, {kept(8, 8), whole(64)}, 4, 512) && item.vector == 1, "wide off a border", "off");
  const int64_t list[] = {1, 4, 5, 9, -1, -1};
  for (int32_t place = 0; place < 12; ++place) {
    int32_t expected = -1;
    for (int32_t k = 0; k < 4; ++k) expected = list[k] == place ? k : expected;
    expect(position_of(list, 6, place) == expected, "a place is not found", "search");
    expect(position_of(list + 4, 2, place) == -1 && position_of(list, 0, place) == -1, "found in nothing", "search");
  }
}

}  // namespace taylor

int main() {
  taylor::check_activations();
  taylor::check_weights();
  taylor::check_others();
  return taylor::failures == 0 ? 0 : 1;
}
