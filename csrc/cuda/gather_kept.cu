// Computes     out_i = the kept rows and columns of t_i,  0 where an entry of a list is -1
//                                                                         see ops/reference_conv.py
// Shapes       t_i any of at least one dimension; out_i as t_i, with the lengths of its lists in dimensions 0 and 1
// Strides      any; a tensor with gaps is copied first, and one whose dimensions lie in an order that
//              makes more than three runs of them, such as height before rows. 16-byte loads and stores where the inner
//              dimensions are kept whole and make multiples of 16 bytes, else one element each, side by side
// Dtypes       fp32, fp16, bf16, fp64 in one list; out_i as t_i, or of `dtype`, rounded to nearest even
// Bytes        what is kept (rows' columns: the sectors in which they lie) read, out_i written, once
// Launches     1 for up to 400 tensors of any types, 1 more for each further 400, and those copies
// Determinism  yes: each element has one writer; blocks follow from shapes, types and alignment
// Lists        read on the device only. An entry that is not among its dimension's reads from where it points to: the
//              caller's fault

#include "mapped_pair.cuh"
#include "mapped_types.cuh"

namespace taylor {
namespace {

constexpr int64_t kTiles = 512;  // of one tensor of many

__global__ void __launch_bounds__(kThreads)
    gather_kept_kernel(const __grid_constant__ MappedTable table, const int64_t* __restrict__ keep) {
  __shared__ int32_t rows[kMostRows];
  const MappedItem& item = table.item[find_item(table, blockIdx.x)];
  const MappedTile tile = mapped_tile(item, blockIdx.x - item.first_unit);
  const Lane lane = begin_tile<Places::kListed>(item, tile, keep, rows);
  copy_types<Walked::kWritten>(item, tile, lane, rows);
}

std::vector<Tensor> gather_kept_cuda(std::vector<Tensor> tensors, const Tensor& keep, std::vector<int64_t> bounds,
                                     std::vector<bool> cast, ScalarType dtype) {
  constexpr const char* op = "gather_kept";
  check_gathered(tensors.size(), keep, bounds, cast);
  std::vector<Tensor> results;
  if (tensors.empty()) return results;
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  std::vector<MappedPair> pairs;
  std::vector<MappedItem> items;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check_kept_tensor(tensor, keep, op);
    const KeptLists lists = lists_of(bounds, i);
    results.push_back(empty_laid_as(tensor, kept_shape(tensor, lists, op), cast[i] ? dtype : tensor.scalar_type()));
    std::optional<MappedPair> pair = pair_of(tensor, results[i], lists, Walked::kWritten, true, kTiles, op);
    if (!pair.has_value()) continue;
    items.push_back(pair->item);
    pairs.push_back(std::move(*pair));
  }
  const auto* const entries = static_cast<const int64_t*>(keep.const_data_ptr());
  const cudaStream_t stream = current_stream(keep.get_device_index());
  for (const MappedTable& table : tables_of<MappedTable>(std::move(items), kMappedItems)) {
    gather_kept_kernel<<<table.units, kThreads, 0, stream>>>(table, entries);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (MappedPair& pair : pairs) pair.finish();
  return results;
}

}  // namespace
}  // namespace taylor

STABLE_TORCH_LIBRARY_IMPL(taylor_cuda_native, CUDA, m) { m.impl("gather_kept", TORCH_BOX(&taylor::gather_kept_cuda)); }
