// channel_sums on the CPU.

#include "common.h"
#include "cpu/product_sums.h"

namespace taylor {
namespace {

Tensor channel_sums_cpu(const Tensor& activation, const Tensor& gradient) {
  check_activation_pair(activation, gradient, "channel_sums");
  const Sums sums = product_sums({channel_job(activation, gradient, Term::kProduct, true)});
  return to_tensor({activation.size(0), activation.size(1)}, result_type(activation.scalar_type()), sums.at(0));
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) { m.impl("channel_sums", TORCH_BOX(&taylor::channel_sums_cpu)); }
