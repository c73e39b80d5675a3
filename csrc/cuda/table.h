// Lists of tensors as tables that fit into a kernel's arguments, and which block works on what. An item has a
// first_unit; units_of(item) says how many blocks work on it, and unit_work(item) how much each has to do.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host_device.h"

namespace taylor {

template <typename Item, int kCapacity>
struct Table {
  Item item[kCapacity];
  int32_t items;
  int32_t units;
};

// The item that a block works on: the last one whose first unit is not after it.
template <typename Item, int kCapacity>
TAYLOR_HD int find_item(const Table<Item, kCapacity>& table, int32_t block) {
  int low = 0, high = table.items - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.item[middle].first_unit <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// As many tables as the items need, one launch each. The blocks with most to do come first, so that none of them starts
// last.
template <typename TableOf, typename Item>
std::vector<TableOf> tables_of(std::vector<Item> items, size_t capacity) {
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& x, const Item& y) { return unit_work(x) > unit_work(y); });
  std::vector<TableOf> tables;
  int64_t units = 0;
  for (Item& item : items) {
    const int64_t more = units_of(item);
    if (tables.empty() || static_cast<size_t>(tables.back().items) == capacity || units + more > INT32_MAX) {
      tables.emplace_back();
      tables.back().items = 0;
      units = 0;
    }
    TableOf& table = tables.back();
    item.first_unit = static_cast<int32_t>(units);
    table.item[table.items++] = item;
    units += more;
    table.units = static_cast<int32_t>(units);
  }
  return tables;
}

}  // namespace taylor
