// Cuts the copies into pieces of about equal size and runs them on all threads.

#include "cpu/mapped_copy.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>

#include "cpu/parallel.h"

namespace taylor {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kInlineSize = 1 << 14;  // elements below which waking a second thread costs more than it saves
constexpr int64_t kPieceSize = 1 << 15;
constexpr int64_t kLongRun = 256;  // elements of a run from which on it is worth a walk over the outer dimensions
constexpr int kRowsAtOnce = 4;

// The innermost part of a copy: `lines` of the destination, of which those in `line_to` have a source, each a run of
// `length` elements.
struct Inner {
  int64_t lines = 1;
  int64_t stride_from = 0;  // from line to line
  int64_t stride_to = 0;
  bool mapped = false;
  std::vector<int32_t> line_from;  // ascending in line_to; of mapped lines only
  std::vector<int32_t> line_to;
  int64_t length = 1;
  int64_t step_from = 1;  // within a run
  int64_t step_to = 1;
  int64_t rows = 1;  // places of an outer dimension, whose lines are copied side by side
  int64_t row_from = 0;
  int64_t row_to = 0;

  bool covers() const { return !mapped || static_cast<int64_t>(line_to.size()) == lines; }
};

// Rows [first_row, last_row), of each lines [first_line, last_line), and of these elements [first, last). Entries
// [first_pair, last_pair) of line_from and line_to are these lines'.
struct Block {
  int64_t first_row;
  int64_t last_row;
  int64_t first_line;
  int64_t last_line;
  int64_t first;
  int64_t last;
  int64_t first_pair;
  int64_t last_pair;
};

template <typename To>
void clear_block(const Inner& inner, const Block& block, To* to) {
  const int64_t length = block.last - block.first;
  if (inner.step_to == 1 && (length == inner.stride_to || block.last_line - block.first_line == 1)) {
    std::memset(to + block.first_line * inner.stride_to + block.first, 0,
                sizeof(To) * (block.last_line - block.first_line) * length);
    return;
  }
  for (int64_t line = block.first_line; line < block.last_line; ++line) {
    for (int64_t i = block.first; i < block.last; ++i) to[line * inner.stride_to + i * inner.step_to] = To(0);
  }
}

template <typename From, typename To>
To cast(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return static_cast<To>(static_cast<float>(value));  // from float64 too: PyTorch's casts go through float32
  }
}

template <typename From, typename To>
void copy_run(const From* from, To* to, int64_t length) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, sizeof(To) * length);
  } else {
    for (int64_t i = 0; i < length; ++i) to[i] = cast<From, To>(from[i]);
  }
}

// The lines that have a source, as a function of (line of from, line of to).
template <typename F>
void for_each_line(const Inner& inner, const Block& block, const F& body) {
  if (!inner.mapped) {
    for (int64_t line = block.first_line; line < block.last_line; ++line) body(line, line);
    return;
  }
  const int32_t *from = inner.line_from.data(), *to = inner.line_to.data();
  if (inner.covers()) {
    for (int64_t k = block.first_pair; k < block.last_pair; ++k) body(int64_t{from[k]}, k);
  } else {
    for (int64_t k = block.first_pair; k < block.last_pair; ++k) body(int64_t{from[k]}, int64_t{to[k]});
  }
}

template <typename From, typename To, int64_t kLength>
void copy_short(const Inner& inner, const Block& block, const From* from, To* to) {
  for_each_line(inner, block, [&](int64_t f, int64_t t) {
    copy_run(from + f * inner.stride_from, to + t * inner.stride_to, kLength);
  });
}

// Lines of single elements, of several rows together: where they lie is looked up once.
template <typename From, typename To, int kRows>
void copy_rows(const Inner& inner, const Block& block, const From* from, To* to, bool clear) {
  const From* rows_from[kRows];
  To* rows_to[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows_from[r] = from + r * inner.row_from;
    rows_to[r] = to + r * inner.row_to;
    if (clear && !inner.covers()) clear_block(inner, block, rows_to[r]);
  }
  for_each_line(inner, block, [&](int64_t f, int64_t t) {
    From values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = rows_from[r][f];
    for (int r = 0; r < kRows; ++r) rows_to[r][t] = cast<From, To>(values[r]);
  });
}

bool has_unit_lines(const Inner& inner) { return inner.length == 1 && inner.stride_from == 1 && inner.stride_to == 1; }

// Writes a block of one row. `from` is null where an outer dimension has no source.
template <typename From, typename To>
void copy_row(const Inner& inner, const Block& block, const From* from, To* to, bool clear) {
  if (clear && (from == nullptr || !inner.covers())) clear_block(inner, block, to);
  if (from == nullptr) return;
  const int64_t length = block.last - block.first;
  if (has_unit_lines(inner)) {
    for_each_line(inner, block, [&](int64_t f, int64_t t) { to[t] = cast<From, To>(from[f]); });
  } else if (inner.length == 1) {
    for_each_line(inner, block,
                  [&](int64_t f, int64_t t) { to[t * inner.stride_to] = cast<From, To>(from[f * inner.stride_from]); });
  } else if (inner.step_from != 1 || inner.step_to != 1) {
    for_each_line(inner, block, [&](int64_t f, int64_t t) {
      const From* run_from = from + f * inner.stride_from;
      To* run_to = to + t * inner.stride_to;
      for (int64_t i = block.first; i < block.last; ++i) {
        run_to[i * inner.step_to] = cast<From, To>(run_from[i * inner.step_from]);
      }
    });
  } else if (length == 9) {
    copy_short<From, To, 9>(inner, block, from, to);
  } else {
    for_each_line(inner, block, [&](int64_t f, int64_t t) {
      copy_run(from + f * inner.stride_from + block.first, to + t * inner.stride_to + block.first, length);
    });
  }
}

template <typename From, typename To>
void copy_block(const Inner& inner, const Block& block, const void* source, void* destination, bool clear) {
  const From* from = static_cast<const From*>(source);
  To* to = static_cast<To*>(destination) + block.first_row * inner.row_to;
  if (from != nullptr) from += block.first_row * inner.row_from;
  int64_t left = block.last_row - block.first_row;
  for (; left >= kRowsAtOnce && from != nullptr; left -= kRowsAtOnce) {
    copy_rows<From, To, kRowsAtOnce>(inner, block, from, to, clear);
    from += kRowsAtOnce * inner.row_from;
    to += kRowsAtOnce * inner.row_to;
  }
  for (; left > 0; --left, to += inner.row_to) {
    copy_row(inner, block, from, to, clear);
    if (from != nullptr) from += inner.row_from;
  }
}

using Kernel = void (*)(const Inner&, const Block&, const void*, void*, bool);

template <typename From>
Kernel kernel_from(ScalarType type) {
  if (type == ScalarType::Double) return copy_block<From, double>;
  if (type == ScalarType::Half) return copy_block<From, Half>;
  if (type == ScalarType::BFloat16) return copy_block<From, BFloat16>;
  return copy_block<From, float>;
}

// A copy of bits needs no more than the size of an element.
Kernel kernel_of(ScalarType from, ScalarType to) {
  if (from == to) {
    if (from == ScalarType::Double) return copy_block<uint64_t, uint64_t>;
    return from == ScalarType::Float ? copy_block<uint32_t, uint32_t> : copy_block<uint16_t, uint16_t>;
  }
  if (from == ScalarType::Double) return kernel_from<double>(to);
  if (from == ScalarType::Half) return kernel_from<Half>(to);
  if (from == ScalarType::BFloat16) return kernel_from<BFloat16>(to);
  return kernel_from<float>(to);
}

int64_t size_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// A copy with its axes in the destination's order: the inner part, and the others outermost first.
struct Plan {
  const char* from;
  char* to;
  int64_t size_from;
  int64_t size_to;
  Kernel kernel;
  bool clear;
  std::vector<Axis> outer;
  Inner inner;
  int64_t count = 1;  // of the outer places
};

// Outermost first; those of length 1 vanish, and neighbours that form one axis in both tensors become one.
std::vector<Axis> merged_axes(std::vector<Axis> axes) {
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& x, const Axis& y) { return x.stride_to > y.stride_to; });
  std::vector<Axis> kept;
  for (Axis& axis : axes) {
    if (axis.size == 1 && !axis.mapped) continue;
    Axis* const outer = kept.empty() ? nullptr : &kept.back();
    if (outer != nullptr && !outer->mapped && !axis.mapped && outer->stride_to == axis.stride_to * axis.size &&
        outer->stride_from == axis.stride_from * axis.size) {
      outer->size *= axis.size;
      outer->stride_from = axis.stride_from;
      outer->stride_to = axis.stride_to;
    } else {
      kept.push_back(std::move(axis));
    }
  }
  return kept;
}

void set_lines(Inner& inner, const Axis& axis) {
  inner.lines = axis.size;
  inner.stride_from = axis.stride_from;
  inner.stride_to = axis.stride_to;
  inner.mapped = axis.mapped;
  for (size_t i = 0; i < axis.source.size(); ++i) {
    if (axis.source[i] < 0) continue;
    inner.line_from.push_back(axis.source[i]);
    inner.line_to.push_back(static_cast<int32_t>(i));
  }
}

Inner take_inner(std::vector<Axis>& axes) {
  Inner inner;
  if (!axes.empty() && !axes.back().mapped) {
    inner.length = axes.back().size;
    inner.step_from = axes.back().stride_from;
    inner.step_to = axes.back().stride_to;
    axes.pop_back();
  }
  if (!axes.empty() && inner.length < kLongRun) {
    set_lines(inner, axes.back());
    axes.pop_back();
  }
  if (!axes.empty() && !axes.back().mapped && inner.mapped && has_unit_lines(inner)) {
    inner.rows = axes.back().size;
    inner.row_from = axes.back().stride_from;
    inner.row_to = axes.back().stride_to;
    axes.pop_back();
  }
  return inner;
}

Plan plan_of(Copy copy) {
  Plan plan{static_cast<const char*>(copy.from),
            static_cast<char*>(copy.to),
            size_of(copy.type_from),
            size_of(copy.type_to),
            kernel_of(copy.type_from, copy.type_to),
            copy.clear,
            merged_axes(std::move(copy.axes)),
            {}};
  plan.inner = take_inner(plan.outer);
  for (const Axis& axis : plan.outer) plan.count *= axis.size;
  return plan;
}

// Outer places [first, last) of a plan, and the same block of the inner part in each.
struct Task {
  const Plan* plan;
  int64_t first;
  int64_t last;
  Block block;
};

void run(const Task& task) {
  const Plan& plan = *task.plan;
  for (int64_t at = task.first; at < task.last; ++at) {
    int64_t rest = at, from = 0, to = 0;
    bool there = true;
    for (size_t i = plan.outer.size(); i-- > 0;) {
      const Axis& axis = plan.outer[i];
      const int64_t outside = i == 0 ? 0 : rest / axis.size, place = rest - outside * axis.size;
      const int64_t source = axis.mapped ? axis.source[place] : place;
      there = there && source >= 0;
      from += source * axis.stride_from;
      to += place * axis.stride_to;
      rest = outside;
    }
    plan.kernel(plan.inner, task.block, there ? plan.from + from * plan.size_from : nullptr,
                plan.to + to * plan.size_to, plan.clear);
  }
}

int64_t pairs_before(const Inner& inner, int64_t line) {
  return std::lower_bound(inner.line_to.begin(), inner.line_to.end(), line) - inner.line_to.begin();
}

void cut(const Plan& plan, std::vector<Task>& tasks) {
  const Inner& inner = plan.inner;
  const int64_t size = inner.rows * inner.lines * inner.length;
  if (plan.count * size == 0) return;
  const int64_t step = std::max<int64_t>(kPieceSize / size, 1);
  const int64_t run_step = std::min(inner.length, kPieceSize);
  const int64_t line_step = std::clamp<int64_t>(kPieceSize / inner.length, 1, inner.lines);
  const int64_t row_step = std::max<int64_t>(kPieceSize / (inner.length * line_step), 1);
  for (int64_t row = 0; row < inner.rows; row += row_step) {
    for (int64_t line = 0; line < inner.lines; line += line_step) {
      for (int64_t i = 0; i < inner.length; i += run_step) {
        const int64_t last_line = std::min(line + line_step, inner.lines);
        const Block block{row,
                          std::min(row + row_step, inner.rows),
                          line,
                          last_line,
                          i,
                          std::min(i + run_step, inner.length),
                          pairs_before(inner, line),
                          pairs_before(inner, last_line)};
        for (int64_t first = 0; first < plan.count; first += step) {
          tasks.push_back({&plan, first, std::min(first + step, plan.count), block});
        }
      }
    }
  }
}

void check_place(int64_t place, int64_t size, const char* op) {
  STD_TORCH_CHECK(place < size, op, ": keep has an entry ", place, " for a dimension of length ", size);
}

}  // namespace

Source gathered(const int64_t* list, int64_t count, int64_t size, const char* op) {
  STD_TORCH_CHECK(size <= INT32_MAX && count <= INT32_MAX, op, ": a dimension of 2**31 or more");
  Source source(count);
  for (int64_t k = 0; k < count; ++k) {
    check_place(list[k], size, op);
    source[k] = list[k] < 0 ? -1 : static_cast<int32_t>(list[k]);
  }
  return source;
}

Source scattered(const int64_t* list, int64_t count, int64_t size, const char* op) {
  STD_TORCH_CHECK(size <= INT32_MAX && count <= INT32_MAX, op, ": a dimension of 2**31 or more");
  Source source(size, -1);
  for (int64_t k = 0; k < count; ++k) {
    check_place(list[k], size, op);
    if (list[k] >= 0) source[list[k]] = static_cast<int32_t>(k);
  }
  return source;
}

std::vector<Axis> axes_between(const Tensor& from, const Tensor& to) {
  const auto sizes = to.sizes(), strides_from = from.strides(), strides_to = to.strides();
  std::vector<Axis> axes(sizes.size());
  for (size_t d = 0; d < axes.size(); ++d) axes[d] = {sizes[d], strides_from[d], strides_to[d], {}, false};
  return axes;
}

void run_copies(std::vector<Copy> copies) {
  std::vector<Plan> plans;
  plans.reserve(copies.size());
  std::vector<Task> tasks;
  int64_t elements = 0;
  for (Copy& copy : copies) {
    plans.push_back(plan_of(std::move(copy)));
    const Inner& inner = plans.back().inner;
    elements += plans.back().count * inner.rows * inner.lines * inner.length;
    cut(plans.back(), tasks);
  }
  for_each_index(static_cast<int64_t>(tasks.size()), elements > kInlineSize, [&](int64_t i) { run(tasks[i]); });
}

}  // namespace taylor
