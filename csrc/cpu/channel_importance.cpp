// channel_importance on the CPU: sums of products from product_sums, then a few operations on each channel.

#include "common.h"
#include "cpu/product_sums.h"

namespace taylor {
namespace {

// [N, C, L] with L = 1: the per-sample sum is the product itself, so samples can be summed with all else.
bool has_one_position(const Walk& walk) { return walk.rest.empty(); }

double magnitude(double x) { return x < 0 ? -x : x; }

// out[c] += f of the sum of every sample.
template <typename F>
void add_samples(const double* t, int64_t samples, int64_t channels, double* out, const F& f) {
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t c = 0; c < channels; ++c) out[c] += f(t[n * channels + c]);
  }
}

// All rows from one pass: it leaves Σ a·g and Σ (a·g)² of every sample; or with one position also Σ |a·g|, where samples
// need not be kept apart.
std::vector<double> all_reductions(const Tensor& activation, const Tensor& gradient, bool one_position) {
  const int64_t samples = one_position ? 1 : activation.size(0), channels = activation.size(1);
  const Job job = channel_job(activation, gradient, one_position ? Term::kThree : Term::kTwo, !one_position);
  const Sums sums = product_sums({job});
  const double* t = sums.at(0);
  const double* squares = t + job.plane_size();
  std::vector<double> result(kReductions * channels, 0.0);
  double *batch = result.data(), *sample = batch + channels, *abs = sample + channels, *element = abs + channels;
  add_samples(t, samples, channels, batch, [](double sum) { return sum; });
  add_samples(squares, samples, channels, element, [](double sum) { return sum; });
  for (int64_t c = 0; c < channels; ++c) batch[c] *= batch[c];
  if (one_position) {
    std::copy(element, element + channels, sample);
    std::copy(squares + channels, squares + 2 * channels, abs);
  } else {
    add_samples(t, samples, channels, sample, [](double sum) { return sum * sum; });
    add_samples(t, samples, channels, abs, magnitude);
  }
  return result;
}

std::vector<double> one_reduction(const Tensor& activation, const Tensor& gradient, Reduction reduction,
                                  bool one_position) {
  const int64_t samples = activation.size(0), channels = activation.size(1);
  Term term = reduction == Reduction::kElement ? Term::kSquare : Term::kProduct;
  if (one_position && reduction == Reduction::kSample) term = Term::kSquare;
  if (one_position && reduction == Reduction::kAbs) term = Term::kAbs;
  const bool per_sample = !one_position && (reduction == Reduction::kSample || reduction == Reduction::kAbs);
  const Sums sums = product_sums({channel_job(activation, gradient, term, per_sample)});
  const double* t = sums.at(0);
  if (!per_sample) {
    std::vector<double> result(t, t + channels);
    for (double& value : result) value *= reduction == Reduction::kBatch ? value : 1;
    return result;
  }
  std::vector<double> result(channels, 0.0);
  if (reduction == Reduction::kSample) {
    add_samples(t, samples, channels, result.data(), [](double sum) { return sum * sum; });
  } else {
    add_samples(t, samples, channels, result.data(), magnitude);
  }
  return result;
}

Tensor channel_importance_cpu(const Tensor& activation, const Tensor& gradient, std::string reduction_name) {
  check_activation_pair(activation, gradient, "channel_importance");
  const Reduction reduction = channel_reduction(reduction_name);
  const bool all = reduction == Reduction::kAll;
  const int64_t channels = activation.size(1);
  const bool one_position = has_one_position(walk_activation(activation, gradient));
  std::vector<double> result = all ? all_reductions(activation, gradient, one_position)
                                   : one_reduction(activation, gradient, reduction, one_position);
  if (all || reduction == Reduction::kAbs) {
    const auto count = static_cast<double>(std::max<int64_t>(activation.numel() / std::max<int64_t>(channels, 1), 1));
    double* abs = result.data() + (all ? 2 * channels : 0);
    for (int64_t c = 0; c < channels; ++c) abs[c] /= count;
  }
  const ScalarType type = result_type(activation.scalar_type());
  return all ? to_tensor({kReductions, channels}, type, result.data()) : to_tensor({channels}, type, result.data());
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) {
  m.impl("channel_importance", TORCH_BOX(&taylor::channel_importance_cpu));
}
