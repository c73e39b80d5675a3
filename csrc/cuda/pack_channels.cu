// Computes     y[:, k] = x[:, keep[k]],  0 where keep[k] < 0
//                                                                         see ops/reference_conv.py
// Shapes       x [N, C, ...], keep [K] int64, y [N, K, ...]
// Strides      any x, dimensions in any order; one with gaps is copied first. y is laid out as x, without gaps. 16-byte
//              loads and stores where runs of kept channels are multiples of 16 bytes (NCHW planes), else one element
//              each, side by side along y's fast dimension (NHWC: kept channels)
// Dtypes       fp32, fp16, bf16, fp64; bits as they are
// Bytes        N*L*K*sizeof x read (NHWC: the sectors in which they lie), as much written
// Launches     1; 1 more for an x with gaps
// Determinism  yes: each element of y has one writer
// Lists        read on the device only. An entry of C or more reads from where it points to: the caller's fault

#include "mapped_pair.cuh"

namespace taylor {
namespace {

constexpr int64_t kTiles = 4096;  // some waves of blocks on 132 multiprocessors

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    pack_channels_kernel(const __grid_constant__ MappedItem item, const int64_t* __restrict__ keep) {
  __shared__ int32_t rows[kMostRows];
  const MappedTile tile = mapped_tile(item, blockIdx.x);
  const Lane lane = begin_tile<Places::kListed>(item, tile, keep, rows);
  copy_tile<Walked::kWritten, T, T, kVector>(item, tile, lane, rows);
}

template <typename T>
void launch(const MappedItem& item, const int64_t* keep, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const unsigned blocks = grid_size(units_of(item), "pack_channels");
  if (item.vector == 1) {
    pack_channels_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(item, keep);
  } else {
    pack_channels_kernel<T, kWide><<<blocks, kThreads, 0, stream>>>(item, keep);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor pack_channels_cuda(const Tensor& x, const Tensor& keep) {
  constexpr const char* op = "pack_channels";
  check_channels(x, keep, op);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_laid_as(x, with_channels(x, keep.size(0)));
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
  m.impl("pack_channels", TORCH_BOX(&taylor::pack_channels_cuda));
}
