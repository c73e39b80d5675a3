// What accumulate_importance is on every device: its reductions and what it accepts.

#pragma once

#include <optional>

#include "common.h"

namespace taylor {

enum class UnitReduction { kBatch, kSample, kAbs, kSum };

inline UnitReduction unit_reduction(const std::string& name) {
  if (name == "batch") return UnitReduction::kBatch;
  if (name == "sample") return UnitReduction::kSample;
  if (name == "abs") return UnitReduction::kAbs;
  STD_TORCH_CHECK(name == "sum", "accumulate_importance: unknown reduction ", name);
  return UnitReduction::kSum;
}

// The arguments of one call, all of them beside the window.
struct UnitArguments {
  std::vector<Tensor> sums;
  Tensor entries;
  Tensor offsets;
  Tensor window;
  std::optional<Tensor> counts;
  UnitReduction reduction;
  std::optional<Tensor> scale;
  std::optional<Tensor> added;
  std::optional<Tensor> finite;
  double decay;
  double weight;

  int64_t units() const { return window.numel(); }
  int64_t rows() const { return sums.empty() ? 0 : (sums[0].dim() == 2 ? sums[0].size(0) : 1); }
};

inline void check_beside(const Tensor& window, const Tensor& other, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(other.is_cuda() == window.is_cuda() && other.get_device_index() == window.get_device_index(),
                  "accumulate_importance: ", name, " is on another device than window");
  STD_TORCH_CHECK(other.scalar_type() == type, "accumulate_importance: ", name, " has a wrong type");
  STD_TORCH_CHECK(other.numel() == numel && other.is_contiguous(), "accumulate_importance: ", name,
                  " has a wrong size, or gaps");
}

inline void check_units(const UnitArguments& a) {
  const ScalarType type = a.window.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::Double) && a.window.dim() == 1 && a.window.is_contiguous(),
      "accumulate_importance: window must be a contiguous float32 or float64 vector");
  check_beside(a.window, a.entries, ScalarType::Long, a.entries.numel(), "entries");
  check_beside(a.window, a.offsets, ScalarType::Long, a.units() + 1, "offsets");
  if (a.counts) check_beside(a.window, *a.counts, ScalarType::Long, 2, "counts");
  if (a.scale) check_beside(a.window, *a.scale, type, 1, "scale");
  if (a.added) check_beside(a.window, *a.added, type, a.units(), "added");
  if (a.finite) check_beside(a.window, *a.finite, ScalarType::Bool, 1, "finite");
  STD_TORCH_CHECK(!a.added || a.reduction == UnitReduction::kBatch || a.reduction == UnitReduction::kSum,
                  "accumulate_importance: added needs reduction 'batch' or 'sum'");
  for (const Tensor& sums : a.sums) {
    const int64_t dims = sums.dim();
    STD_TORCH_CHECK((dims == 1 || dims == 2) && dims == a.sums[0].dim() && (dims == 1 || sums.size(0) == a.rows()),
                    "accumulate_importance: sums must all be [C], or all [N, C] with one N");
    check_beside(a.window, sums, type, sums.numel(), "one of sums");
  }
}

}  // namespace taylor
