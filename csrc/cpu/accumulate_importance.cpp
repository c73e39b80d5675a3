// accumulate_importance on the CPU. Every row is laid out once, as doubles, so that the sums over a unit's positions
// read one array, whatever the number of tensors.

#include <cmath>
#include <memory>

#include "common.h"
#include "units.h"

namespace taylor {
namespace {

constexpr int64_t kChunkRows = 8;  // by shape alone, so that any number of threads adds up in the same order

// Units and their positions, looked at once.
struct Layout {
  const int64_t* entries;
  const int64_t* offsets;
  int64_t units;
  int64_t positions;
};

Layout layout_of(const UnitArguments& a) {
  Layout layout{static_cast<const int64_t*>(a.entries.const_data_ptr()),
                static_cast<const int64_t*>(a.offsets.const_data_ptr()), a.units(), 0};
  for (const Tensor& sums : a.sums) layout.positions += sums.size(sums.dim() - 1);
  const int64_t count = a.entries.numel();
  bool fits = layout.offsets[0] == 0 && layout.offsets[layout.units] == count;
  for (int64_t u = 0; u < layout.units; ++u) fits = fits && layout.offsets[u] <= layout.offsets[u + 1];
  STD_TORCH_CHECK(fits, "accumulate_importance: offsets must not fall, from 0 to the number of entries");
  int64_t outside = 0;
  for (int64_t k = 0; k < count; ++k) outside += layout.entries[k] < 0 || layout.entries[k] >= layout.positions;
  STD_TORCH_CHECK(outside == 0, "accumulate_importance: ", outside, " of entries are no positions of sums");
  return layout;
}

double term_of(UnitReduction reduction, double joint) {
  if (reduction == UnitReduction::kSample) return joint * joint;
  return reduction == UnitReduction::kAbs ? std::fabs(joint) : joint;
}

// totals[u] = the sum over the rows [first, end) of what the reduction makes of each.
template <typename T>
void sum_rows(const UnitArguments& a, const Layout& layout, int64_t first, int64_t end, double scale, double* totals) {
  const std::unique_ptr<double[]> row(new double[layout.positions]);
  for (int64_t n = first; n < end; ++n) {
    double* place = row.get();
    for (const Tensor& sums : a.sums) {
      const int64_t size = sums.size(sums.dim() - 1);
      const T* from = static_cast<const T*>(sums.const_data_ptr()) + n * size;
      place = std::copy(from, from + size, place);
    }
    for (int64_t u = 0; u < layout.units; ++u) {
      double joint = 0;
      for (int64_t k = layout.offsets[u]; k < layout.offsets[u + 1]; ++k) joint += row[layout.entries[k]];
      totals[u] += term_of(a.reduction, joint / scale);
    }
  }
}

template <typename T>
std::vector<double> totals_of(const UnitArguments& a) {
  const int64_t units = a.units(), chunks = (a.rows() + kChunkRows - 1) / kChunkRows;
  std::vector<double> totals(std::max<int64_t>(chunks, 1) * units);
  if (!a.sums.empty()) {
    const Layout layout = layout_of(a);
    const double scale = a.scale ? static_cast<double>(*static_cast<const T*>(a.scale->const_data_ptr())) : 1.0;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kChunkRows;
        sum_rows<T>(a, layout, first, std::min(first + kChunkRows, a.rows()), scale, totals.data() + i * units);
      }
    });
  }
  for (int64_t i = 1; i < chunks; ++i) {
    for (int64_t u = 0; u < units; ++u) totals[u] += totals[i * units + u];
  }
  return totals;
}

template <typename T>
void run(const UnitArguments& a) {
  const std::vector<double> totals = totals_of<T>(a);
  const T* added = a.added ? static_cast<const T*>(a.added->const_data_ptr()) : nullptr;
  T* window = static_cast<T*>(a.window.mutable_data_ptr());
  std::vector<T> values(a.units());
  bool good = !a.finite || *static_cast<const bool*>(a.finite->const_data_ptr());
  for (int64_t u = 0; u < a.units(); ++u) {
    const double total = totals[u] + (added == nullptr ? 0.0 : static_cast<double>(added[u]));
    values[u] = static_cast<T>(a.reduction == UnitReduction::kBatch ? total * total : total);
    good = good && std::isfinite(values[u]);
  }
  if (a.counts) static_cast<int64_t*>(a.counts->mutable_data_ptr())[good ? 0 : 1] += 1;
  if (!good && a.counts) return;
  for (int64_t u = 0; u < a.units(); ++u) {
    window[u] = static_cast<T>(a.decay * static_cast<double>(window[u]) + a.weight * static_cast<double>(values[u]));
  }
}

void accumulate_importance_cpu(std::vector<Tensor> sums, Tensor entries, Tensor offsets, Tensor window,
                               std::optional<Tensor> counts, std::string reduction, std::optional<Tensor> scale,
                               std::optional<Tensor> added, std::optional<Tensor> finite, double decay, double weight) {
  const UnitArguments a{std::move(sums), entries, offsets, window, counts, unit_reduction(reduction),
                        scale,           added,   finite,  decay,  weight};
  check_units(a);
  if (window.scalar_type() == ScalarType::Double) {
    run<double>(a);
  } else {
    run<float>(a);
  }
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("accumulate_importance", TORCH_BOX(&taylor::accumulate_importance_cpu));
}
