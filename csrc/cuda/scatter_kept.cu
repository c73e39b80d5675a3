// Computes     t_i[rows, columns] = v_i,  0 elsewhere if `clear`;  entries of -1 are left out
//                                                                         see ops/reference_conv.py
// Shapes       t_i any of at least one dimension; v_i as t_i, with the lengths of its lists in dimensions 0 and 1
// Strides      any; a tensor with gaps, or a v_i that lies otherwise than t_i, is copied first, and one whose
// dimensions lie in an order that
//              makes more than three runs of them, such as height before rows. 16-byte loads and stores where the inner
//              dimensions are kept whole and make multiples of 16 bytes, else one element each, side by side
// Dtypes       fp32, fp16, bf16, fp64 in one list; v_i is cast to t_i's, rounded to nearest even
// Bytes        v_i read; t_i written, once (without `clear` only what is kept: the sectors in which it lies)
// Launches     1 for up to 400 tensors of any types, 1 more for each further 400, and those copies (a target's also
//              back)
// Determinism  yes: each element has one writer; blocks follow from shapes, types and alignment
//
// Lists are read on the device only. With `clear` a thread looks its place up by binary search, once for its share of
// the rows, for which entries must ascend, but for negative ones anywhere; one that is not among its dimension's is
// left out. Without, it writes to where it points: the caller's fault.

#include "mapped_pair.cuh"
#include "mapped_types.cuh"

namespace taylor {
namespace {

constexpr int64_t kTiles = 512;  // of one tensor of many

// Every element of the targets is written.
__global__ void __launch_bounds__(kThreads)
    scatter_clearing_kernel(const __grid_constant__ MappedTable table, const int64_t* __restrict__ keep) {
  __shared__ int32_t rows[kMostRows];
  const MappedItem& item = table.item[find_item(table, blockIdx.x)];
  const MappedTile tile = mapped_tile(item, blockIdx.x - item.first_unit);
  const Lane lane = begin_tile<Places::kInverse>(item, tile, keep, rows);
  copy_types<Walked::kWritten>(item, tile, lane, rows);
}

// Every element of the values is read.
__global__ void __launch_bounds__(kThreads)
    scatter_kept_kernel(const __grid_constant__ MappedTable table, const int64_t* __restrict__ keep) {
  __shared__ int32_t rows[kMostRows];
  const MappedItem& item = table.item[find_item(table, blockIdx.x)];
  const MappedTile tile = mapped_tile(item, blockIdx.x - item.first_unit);
  const Lane lane = begin_tile<Places::kListed>(item, tile, keep, rows);
  copy_types<Walked::kRead>(item, tile, lane, rows);
}

void scatter_kept_cuda(std::vector<Tensor> values, std::vector<Tensor> targets, const Tensor& keep,
                       std::vector<int64_t> bounds, bool clear) {
  constexpr const char* op = "scatter_kept";
  check_keep(keep, op);
  check_bounds(bounds, targets.size(), keep, op);
  STD_TORCH_CHECK(values.size() == targets.size(), op, ": values and targets differ in length");
  if (targets.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  for (size_t i = 0; i < targets.size(); ++i) {  // all of them before the first copy
    check_kept_tensor(values[i], keep, op);
    check_kept_tensor(targets[i], keep, op);
    check_scattered(values[i], targets[i], lists_of(bounds, i));
  }
  std::vector<MappedPair> pairs;
  std::vector<MappedItem> items;
  for (size_t i = 0; i < targets.size(); ++i) {
    std::optional<MappedPair> pair = pair_of(values[i], targets[i], lists_of(bounds, i),
                                             clear ? Walked::kWritten : Walked::kRead, clear, kTiles, op);
    if (!pair.has_value()) continue;
    items.push_back(pair->item);
    pairs.push_back(std::move(*pair));
  }
  const auto* const entries = static_cast<const int64_t*>(keep.const_data_ptr());
  const cudaStream_t stream = current_stream(keep.get_device_index());
  for (const MappedTable& table : tables_of<MappedTable>(std::move(items), kMappedItems)) {
    if (clear) {
      scatter_clearing_kernel<<<table.units, kThreads, 0, stream>>>(table, entries);
    } else {
      scatter_kept_kernel<<<table.units, kThreads, 0, stream>>>(table, entries);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (MappedPair& pair : pairs) pair.finish();
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) {
  m.impl("scatter_kept", TORCH_BOX(&taylor::scatter_kept_cuda));
}
