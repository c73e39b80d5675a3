// gather_kept on the CPU: all tensors of the list are cut into pieces together, so threads share unequal layers evenly.

#include "cpu/mapped_copy.h"
#include "kept.h"

namespace taylor {
namespace {

std::vector<Tensor> gather_kept_cpu(std::vector<Tensor> tensors, const Tensor& keep, std::vector<int64_t> bounds,
                                    std::vector<bool> cast, ScalarType dtype) {
  constexpr const char* op = "gather_kept";
  check_gathered(tensors.size(), keep, bounds, cast);
  const int64_t* const entries = static_cast<const int64_t*>(keep.const_data_ptr());
  std::vector<Tensor> results;
  std::vector<Copy> copies;
  results.reserve(tensors.size());
  copies.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check_kept_tensor(tensor, keep, op);
    const KeptLists lists = lists_of(bounds, i);
    const ScalarType type = tensor.scalar_type();
    results.push_back(empty_laid_as(tensor, kept_shape(tensor, lists, op), cast[i] ? dtype : type));
    const Tensor& result = results.back();
    copies.push_back({tensor.const_data_ptr(), result.mutable_data_ptr(), type, result.scalar_type(),
                      axes_between(tensor, result), true});
    for (size_t d = 0; d < kDims; ++d) {
      if (!lists[d].given) continue;
      Axis& axis = copies.back().axes[d];
      axis.source = gathered(entries + lists[d].begin, lists[d].size, tensor.size(d), op);
      axis.mapped = true;
    }
  }
  run_copies(std::move(copies));
  return results;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) { m.impl("gather_kept", TORCH_BOX(&taylor::gather_kept_cpu)); }
