// keep_mask on the CPU: the rank of the last score that stays, by selection; then one pass over the mask.

#include <cstring>

#include "common.h"
#include "ranks.h"

namespace taylor {
namespace {

template <typename Bits>
std::vector<Bits> ranks_of(const Tensor& scores, Bits infinity) {
  const auto* from = static_cast<const char*>(scores.const_data_ptr());
  const int64_t stride = scores.stride(0) * static_cast<int64_t>(sizeof(Bits));
  std::vector<Bits> ranks(scores.size(0));
  for (size_t i = 0; i < ranks.size(); ++i, from += stride) {
    Bits bits;
    std::memcpy(&bits, from, sizeof(bits));
    ranks[i] = rank_of(bits, infinity);
  }
  return ranks;
}

// Writes the mask and returns the bits of the threshold.
template <typename Bits>
Bits mask_of(const std::vector<Bits>& ranks, int64_t keep, Bits infinity, bool* mask) {
  const auto size = static_cast<int64_t>(ranks.size());
  keep = std::clamp<int64_t>(keep, 0, size);
  const bool missing = std::find(ranks.begin(), ranks.end(), Bits(0)) != ranks.end();
  std::fill(mask, mask + size, false);
  if (keep == 0) return missing ? bits_of_rank(Bits(0), infinity) : infinity;
  std::vector<Bits> sorted = ranks;
  std::nth_element(sorted.begin(), sorted.begin() + (keep - 1), sorted.end());
  const Bits last = sorted[keep - 1];
  int64_t equal = keep - std::count_if(ranks.begin(), ranks.end(), [last](Bits rank) { return rank < last; });
  for (int64_t i = 0; i < size; ++i) mask[i] = ranks[i] < last || (ranks[i] == last && equal-- > 0);
  return bits_of_rank(missing ? Bits(0) : last, infinity);
}

template <typename Bits>
void run(const Tensor& scores, int64_t keep, Bits infinity, Tensor mask, Tensor threshold) {
  const Bits bits = mask_of(ranks_of(scores, infinity), keep, infinity, static_cast<bool*>(mask.mutable_data_ptr()));
  std::memcpy(threshold.mutable_data_ptr(), &bits, sizeof(bits));
}

std::tuple<Tensor, Tensor> keep_mask_cpu(const Tensor& scores, const Tensor& keep) {
  check_scores(scores, keep);
  const std::vector<int64_t> shape{scores.size(0)};
  const Tensor mask = torch::stable::new_empty(scores, shape, ScalarType::Bool);
  const Tensor threshold = torch::stable::new_empty(scores, {});
  const int64_t count = *static_cast<const int64_t*>(keep.const_data_ptr());
  if (scores.scalar_type() == ScalarType::Double) {
    run<uint64_t>(scores, count, kInfinity64, mask, threshold);
  } else {
    run<uint32_t>(scores, count, kInfinity32, mask, threshold);
  }
  return {mask, threshold};
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CPU, m) { m.impl("keep_mask", TORCH_BOX(&taylor::keep_mask_cpu)); }
