// Computes     y[:, keep[k]] = x[:, k],  0 elsewhere
//                                                                         see ops/reference_conv.py
// Shapes       x [N, K, ...], keep [K] int64, y [N, channels, ...]
// Strides      any x, dimensions in any order; one with gaps is copied first. y is laid out as x, without gaps. 16-byte
//              loads and stores where runs of kept channels are multiples of 16 bytes (NCHW planes), else one element
//              each, side by side along y's fast dimension (NHWC: kept channels)
// Dtypes       fp32, fp16, bf16, fp64; bits as they are
// Bytes        N*L*K*sizeof x read, N*L*channels*sizeof x written, once
// Launches     1; 1 more for an x with gaps
// Determinism  yes: each element of y has one writer
//
// The list is read on the device only. A thread looks its channel up by binary search, once for its share of the batch,
// for which entries must ascend, but for negative ones anywhere. An entry of `channels` or more is left out.

#include "mapped_pair.cuh"

namespace taylor {
namespace {

constexpr int64_t kTiles = 4096;  // some waves of blocks on 132 multiprocessors

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    unpack_channels_kernel(const __grid_constant__ MappedItem item, const int64_t* __restrict__ keep) {
  __shared__ int32_t rows[kMostRows];
  const MappedTile tile = mapped_tile(item, blockIdx.x);
  const Lane lane = begin_tile<Places::kInverse>(item, tile, keep, rows);
  copy_tile<Walked::kWritten, T, T, kVector>(item, tile, lane, rows);
}

template <typename T>
void launch(const MappedItem& item, const int64_t* keep, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const unsigned blocks = grid_size(units_of(item), "unpack_channels");
  if (item.vector == 1) {
    unpack_channels_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(item, keep);
  } else {
    unpack_channels_kernel<T, kWide><<<blocks, kThreads, 0, stream>>>(item, keep);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor unpack_channels_cuda(const Tensor& x, const Tensor& keep, int64_t channels) {
  constexpr const char* op = "unpack_channels";
  check_unpacked(x, keep, channels);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_laid_as(x, with_channels(x, channels));
  const KeptLists lists{KeptList{}, KeptList{0, keep.size(0), true}};
  std::optional<MappedPair> pair = pair_of(x, y, lists, Walked::kWritten, true, kTiles, op);
  if (!pair.has_value()) return y;
  const auto* const entries = static_cast<const int64_t*>(keep.const_data_ptr());
  const cudaStream_t stream = current_stream(x.get_device_index());
  const size_t size = x.element_size();
  if (size == 8) {
    launch<uint64_t>(pair->item, entries, stream);
  } else if (size == 4) {
    launch<uint32_t>(pair->item, entries, stream);
  } else {
    launch<uint16_t>(pair->item, entries, stream);
  }
  pair->finish();
  return y;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("unpack_channels", TORCH_BOX(&taylor::unpack_channels_cuda));
}
