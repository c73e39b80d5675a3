// scatter_kept on the CPU, in one pass over the targets: what is not kept is cleared beside what is.

#include "cpu/mapped_copy.h"
#include "kept.h"

namespace taylor {
namespace {

void scatter_kept_cpu(std::vector<Tensor> values, std::vector<Tensor> targets, const Tensor& keep,
                      std::vector<int64_t> bounds, bool clear) {
  constexpr const char* op = "scatter_kept";
  check_keep(keep, op);
  check_bounds(bounds, targets.size(), keep, op);
  STD_TORCH_CHECK(values.size() == targets.size(), op, ": values and targets differ in length");
  const int64_t* const entries = static_cast<const int64_t*>(keep.const_data_ptr());
  std::vector<Copy> copies;
  copies.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &value = values[i], &target = targets[i];
    check_kept_tensor(value, keep, op);
    check_kept_tensor(target, keep, op);
    const KeptLists lists = lists_of(bounds, i);
    check_scattered(value, target, lists);
    copies.push_back({value.const_data_ptr(), target.mutable_data_ptr(), value.scalar_type(), target.scalar_type(),
                      axes_between(value, target), clear});
    for (size_t d = 0; d < kDims; ++d) {
      if (!lists[d].given) continue;
      Axis& axis = copies.back().axes[d];
      axis.source = scattered(entries + lists[d].begin, lists[d].size, target.size(d), op);
      axis.mapped = true;
    }
  }
  run_copies(std::move(copies));
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) { m.impl("scatter_kept", TORCH_BOX(&taylor::scatter_kept_cpu)); }
