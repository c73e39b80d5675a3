// channel_importance on the CPU: sums of products from product_sums, then a few operations on each channel.

#include "common.h"
#include "cpu/product_sums.h"

namespace taylor {
namespace {

// [N, C, L] with L = 1: the per-sample sum is the product itself, so samples can be summed with all else.
bool has_one_position(const Walk& walk) { return walk.rest.empty(); }

Tensor channel_importance_cpu(const Tensor& activation, const Tensor& gradient, std::string reduction_name) {
  check_activation_pair(activation, gradient, "channel_importance");
  Reduction reduction = channel_reduction(reduction_name);
  const int64_t samples = activation.size(0), channels = activation.size(1);
  const int64_t length = samples * channels == 0 ? 1 : activation.numel() / (samples * channels);
  const bool one_position = has_one_position(walk_activation(activation, gradient));
  Term term = reduction == Reduction::kElement ? Term::kSquare : Term::kProduct;
  if (one_position && reduction == Reduction::kSample) term = Term::kSquare;
  if (one_position && reduction == Reduction::kAbs) term = Term::kAbs;
  const bool per_sample = !one_position && (reduction == Reduction::kSample || reduction == Reduction::kAbs);
  const Sums sums = product_sums({channel_job(activation, gradient, term, per_sample)});
  std::vector<double> result(channels, 0.0);
  const double* t = sums.at(0);
  if (reduction == Reduction::kBatch) {
    for (int64_t c = 0; c < channels; ++c) result[c] = t[c] * t[c];
  } else if (per_sample) {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const double sum = t[n * channels + c];
        result[c] += reduction == Reduction::kSample ? sum * sum : sum < 0 ? -sum : sum;
      }
    }
  } else {
    result.assign(t, t + channels);
  }
  if (reduction == Reduction::kAbs) {
    const auto count = static_cast<double>(std::max<int64_t>(samples * length, 1));
    for (double& value : result) value /= count;
  }
  return to_tensor({channels}, result_type(activation.scalar_type()), result.data());
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("channel_importance", TORCH_BOX(&taylor::channel_importance_cpu));
}
