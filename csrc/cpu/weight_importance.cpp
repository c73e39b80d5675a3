// weight_importance on the CPU: all tensors of the list are cut into pieces together, so threads share unequal layers
// evenly.

#include "common.h"
#include "cpu/product_sums.h"

namespace taylor {
namespace {

std::vector<Tensor> weight_importance_cpu(std::vector<Tensor> weights, std::vector<Tensor> gradients,
                                          std::vector<int64_t> dims, std::string reduction) {
  STD_TORCH_CHECK(weights.size() == gradients.size() && weights.size() == dims.size(),
                  "weight_importance: the three lists differ in length");
  const Term term = weight_reduction(reduction);
  std::vector<Job> jobs;
  jobs.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &weight = weights[i], &gradient = gradients[i];
    const int64_t dim = check_weight_pair(weight, gradient, dims[i]);
    jobs.push_back({weight.const_data_ptr(), gradient.const_data_ptr(), weight.scalar_type(), gradient.scalar_type(),
                    walk_weight(weight, gradient, dim), term, false});
  }
  const Sums sums = product_sums(jobs);
  std::vector<Tensor> results;
  results.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    results.push_back(to_tensor({jobs[i].walk.channel.size}, result_type(jobs[i].type_a), sums.at(i)));
  }
  return results;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("weight_importance", TORCH_BOX(&taylor::weight_importance_cpu));
}
