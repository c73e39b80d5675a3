// accumulate_channel_sums on the CPU: the backward pass of score_gate.

#include "common.h"
#include "cpu/product_sums.h"

namespace taylor {
namespace {

template <typename T>
void add(T* out, const double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<double>(out[i]) + values[i]);
}

void accumulate_channel_sums_cpu(const Tensor& activation, const Tensor& gradient, Tensor sums) {
  check_activation_pair(activation, gradient, "accumulate_channel_sums");
  check_sums(activation, sums);
  const Sums added = product_sums({channel_job(activation, gradient, Term::kProduct, sums.dim() == 2)});
  if (sums.scalar_type() == ScalarType::Double) {
    add(static_cast<double*>(sums.mutable_data_ptr()), added.at(0), sums.numel());
  } else {
    add(static_cast<float*>(sums.mutable_data_ptr()), added.at(0), sums.numel());
  }
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("accumulate_channel_sums", TORCH_BOX(&taylor::accumulate_channel_sums_cpu));
}
