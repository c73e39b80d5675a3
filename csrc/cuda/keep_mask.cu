// Computes     mask[i] = scores[i] is among the `keep` largest (NaN before all numbers, then the lower index);
//              threshold = the smallest of those                          see ops/reference.py
// Shapes       scores [n], n < 2^31; keep and threshold 0-d; mask [n]
// Strides      any
// Dtypes       scores and threshold: fp32; keep: int64; mask: bool
// Bytes        16*n read (4*n of it from memory, the rest from the L2 cache), 4*n more where not all scores equal to
//              the threshold stay; n written
// Launches     1, of one block: a network's ten thousand channels take it less time than a second launch would
// Determinism  yes: atomics count whole numbers only, whose sums have no order
// Error        none: the result is exact
// Source       arXiv:2501.14336 (selection by radix on a GPU)

#include <tuple>

#include "../ranks.h"
#include "device.cuh"

namespace taylor {
namespace {

constexpr int kBlock = kWarp * kWarp;        // threads of the only block: as many warps as a warp has lanes
constexpr int kDigitBits = 11, kDigits = 3;  // of a rank of 32 bits; the last digit has one bit less
constexpr int kBins = 1 << kDigitBits;
constexpr int kReads = 8;                    // of one thread that are in flight together
constexpr unsigned kAllLanes = 0xffffffffu;

struct Scores {
  const float* first;
  int64_t stride;
  int64_t count;
};

// What the threads of the block tell each other.
struct Board {
  uint32_t bins[kBins];
  uint32_t totals[kWarp];  // one for each warp
  uint32_t digit;          // the bin that holds the last score that stays,
  uint32_t before;         // how many are in the bins before it,
  uint32_t inside;         // and how many in it
};

// Calls f(i, rank, inside) for i = first + offset, and on in steps; as often in every thread for which `first` and
// `end` are the same, with inside = false past the end.
template <typename F>
__device__ __forceinline__ void for_each_rank(const Scores& scores, int64_t first, int64_t end, int offset, int step,
                                              const F& f) {
  for (int64_t base = first; base < end; base += kReads * step) {
    uint32_t rank[kReads];
#pragma unroll
    for (int u = 0; u < kReads; ++u) {
      const int64_t i = base + u * step + offset;
      rank[u] = i < end ? rank_of(__float_as_uint(scores.first[i * scores.stride]), kInfinity32) : 0;
    }
#pragma unroll
    for (int u = 0; u < kReads; ++u) {
      const int64_t i = base + u * step + offset;
      f(i, rank[u], i < end);
    }
  }
}

// The sum over this lane and all before it in the warp.
__device__ __forceinline__ uint32_t sum_up_to_lane(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// The sum over all threads before this one.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, Board& board) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t here = sum_up_to_lane(value);
  if (lane == kWarp - 1) board.totals[warp] = here;
  __syncthreads();
  const uint32_t warps = sum_up_to_lane(board.totals[lane]);
  const uint32_t before = __shfl_sync(kAllLanes, warps, (warp + kWarp - 1) % kWarp);
  return here - value + (warp == 0 ? 0 : before);
}

// How often each digit occurs among the ranks that agree with `prefix` in the bits of `known`.
__device__ __forceinline__ void count_digits(const Scores& scores, uint32_t prefix, uint32_t known, int shift,
                                             Board& board) {
  for (int bin = threadIdx.x; bin < kBins; bin += kBlock) board.bins[bin] = 0;
  __syncthreads();
  for_each_rank(scores, 0, scores.count, threadIdx.x, kBlock, [&](int64_t, uint32_t rank, bool inside) {
    if (inside && (rank & known) == prefix) atomicAdd(&board.bins[(rank & ~known) >> shift], 1u);
  });
  __syncthreads();
}

// The bin in which the place-th of the counted ranks is, counted from 1.
__device__ __forceinline__ void find_digit(uint32_t place, Board& board) {
  constexpr int kOwn = kBins / kBlock;
  uint32_t own = 0;
  for (int i = 0; i < kOwn; ++i) own += board.bins[threadIdx.x * kOwn + i];
  uint32_t before = sum_before(own, board);
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t inside = board.bins[threadIdx.x * kOwn + i];
    if (before < place && place - before <= inside) {
      board.digit = threadIdx.x * kOwn + i;
      board.before = before;
      board.inside = inside;
    }
    before += inside;
  }
  __syncthreads();
}

// How many of the ranks equal to `last` this warp may keep of its stretch, if `equal` of all are to stay.
__device__ __forceinline__ uint32_t share_of_warp(const Scores& scores, int64_t first, int64_t end, uint32_t last,
                                                  uint32_t equal, Board& board) {
  const int lane = threadIdx.x % kWarp;
  uint32_t own = 0;
  for_each_rank(scores, first, end, lane, kWarp,
                [&](int64_t, uint32_t rank, bool inside) { own += inside && rank == last; });
  const uint32_t before = __shfl_sync(kAllLanes, sum_before(own, board), 0);
  return equal > before ? equal - before : 0;
}

// Every warp writes a stretch of the mask; of ranks equal to `last`, its first `share` stay.
__device__ __forceinline__ void write_mask(const Scores& scores, int64_t first, int64_t end, uint32_t last,
                                           uint32_t share, bool* mask) {
  const int lane = threadIdx.x % kWarp;
  uint32_t seen = 0;
  for_each_rank(scores, first, end, lane, kWarp, [&](int64_t i, uint32_t rank, bool inside) {
    const unsigned equal = __ballot_sync(kAllLanes, inside && rank == last);
    const uint32_t place = seen + __popc(equal & ((1u << lane) - 1));
    if (inside) mask[i] = rank < last || (rank == last && place < share);
    seen += __popc(equal);
  });
}

__global__ void __launch_bounds__(kBlock)
    keep_mask_kernel(const Scores scores, const int64_t* __restrict__ keep, bool* __restrict__ mask,
                     float* __restrict__ threshold) {
  __shared__ Board board;
  const int64_t asked = *keep, count = asked < 0 ? 0 : lesser(asked, scores.count);
  uint32_t left = static_cast<uint32_t>(count), last = 0, known = 0;
  bool missing = false;
  for (int digit = 1; digit <= kDigits; ++digit) {
    const int shift = digit < kDigits ? 32 - digit * kDigitBits : 0;
    count_digits(scores, last, known, shift, board);
    if (known == 0) missing = board.bins[0] > 0;  // a bin that no number falls into
    if (count == 0) break;
    find_digit(left, board);
    last |= board.digit << shift;
    known = ~((1u << shift) - 1);
    left -= board.before;
  }
  const int64_t stretch = round_up<int64_t>(ceil_div<int64_t>(scores.count, kWarp), kWarp);
  const int64_t first = threadIdx.x / kWarp * stretch, end = lesser(first + stretch, scores.count);
  uint32_t share = count == 0 ? 0 : kAllLanes;
  if (count != 0 && left < board.inside) share = share_of_warp(scores, first, end, last, left, board);
  write_mask(scores, first, end, last, share, mask);
  if (threadIdx.x == 0) {
    *threshold = __uint_as_float(missing ? bits_of_rank(0u, kInfinity32)
                                         : (count == 0 ? kInfinity32 : bits_of_rank(last, kInfinity32)));
  }
}

std::tuple<Tensor, Tensor> keep_mask_cuda(const Tensor& scores, const Tensor& keep) {
  check_scores(scores, keep);
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float, "keep_mask: float64 scores are taken on the CPU only");
  STD_TORCH_CHECK(scores.size(0) <= INT32_MAX, "keep_mask: more than 2**31 - 1 scores");
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const std::vector<int64_t> shape{scores.size(0)};
  const Tensor mask = torch::stable::new_empty(scores, shape, ScalarType::Bool);
  const Tensor threshold = torch::stable::new_empty(scores, {});
  const Scores from{static_cast<const float*>(scores.const_data_ptr()), scores.stride(0), scores.size(0)};
  const auto* count = static_cast<const int64_t*>(keep.const_data_ptr());
  auto* kept = static_cast<bool*>(mask.mutable_data_ptr());
  auto* least = static_cast<float*>(threshold.mutable_data_ptr());
  const cudaStream_t stream = current_stream(scores.get_device_index());
  keep_mask_kernel<<<1, kBlock, 0, stream>>>(from, count, kept, least);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {mask, threshold};
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) { m.impl("keep_mask", TORCH_BOX(&taylor::keep_mask_cuda)); }
