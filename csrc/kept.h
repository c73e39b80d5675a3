// What the ops on kept channels are on every device: their contract, and how their results lie in memory.

#pragma once

#include <array>

#include "common.h"

namespace taylor {

constexpr int kDims = 2;  // of a weight, that have keep lists: rows and columns

// One list: entries [begin, begin + size) of `keep`. Without a list a dimension keeps all.
struct KeptList {
  int64_t begin = 0;
  int64_t size = 0;
  bool given = false;
};

using KeptLists = std::array<KeptList, kDims>;

inline KeptLists lists_of(const std::vector<int64_t>& bounds, size_t i) {
  KeptLists lists;
  for (size_t d = 0; d < kDims; ++d) {
    const int64_t begin = bounds[2 * i + d], size = bounds[2 * i + d + 1] - begin;
    lists[d] = {begin, size, size > 0};
  }
  return lists;
}

inline void check_keep(const Tensor& keep, const char* op) {
  STD_TORCH_CHECK(keep.dim() == 1 && keep.scalar_type() == ScalarType::Long && keep.is_contiguous(), op,
                  ": keep must be a contiguous vector of int64");
}

// One tensor of a call: a supported type, and on the device of keep.
inline void check_kept_tensor(const Tensor& tensor, const Tensor& keep, const char* op) {
  STD_TORCH_CHECK(is_supported(tensor.scalar_type()), op, ": wanted float32, float16, bfloat16 or float64");
  STD_TORCH_CHECK(tensor.is_cuda() == keep.is_cuda() && tensor.get_device_index() == keep.get_device_index(), op,
                  ": keep and all tensors must be on one device");
}

// The contract of pack_channels and unpack_channels: x is [N, C, ...].
inline void check_channels(const Tensor& x, const Tensor& keep, const char* op) {
  check_keep(keep, op);
  check_kept_tensor(x, keep, op);
  STD_TORCH_CHECK(x.dim() >= 2, op, ": wanted [N, C, ...], got ", x.dim(), " dimensions");
}

inline void check_bounds(const std::vector<int64_t>& bounds, size_t tensors, const Tensor& keep, const char* op) {
  STD_TORCH_CHECK(bounds.size() == 2 * tensors + 1 && std::is_sorted(bounds.begin(), bounds.end()) &&
                      bounds.front() == 0 && bounds.back() == keep.size(0),
                  op, ": bounds must be ", 2 * tensors + 1, " ascending numbers, from 0 to the length of keep");
}

inline void check_unpacked(const Tensor& x, const Tensor& keep, int64_t channels) {
  constexpr const char* op = "unpack_channels";
  check_channels(x, keep, op);
  STD_TORCH_CHECK(x.size(1) == keep.size(0), op, ": wanted as many channels as keep has entries");
  STD_TORCH_CHECK(channels >= 0, op, ": wanted a number of channels, got ", channels);
}

inline void check_gathered(size_t tensors, const Tensor& keep, const std::vector<int64_t>& bounds,
                           const std::vector<bool>& cast) {
  constexpr const char* op = "gather_kept";
  check_keep(keep, op);
  check_bounds(bounds, tensors, keep, op);
  STD_TORCH_CHECK(cast.size() == tensors, op, ": tensors and cast differ in length");
}

// The shape that a tensor has between kept rows and columns.
inline std::vector<int64_t> kept_shape(const Tensor& tensor, const KeptLists& lists, const char* op) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  for (size_t d = 0; d < kDims; ++d) {
    if (!lists[d].given) continue;
    STD_TORCH_CHECK(d < shape.size(), op, ": a tensor lacks a dimension that bounds has a list for");
    shape[d] = lists[d].size;
  }
  return shape;
}

// The contract of one value of scatter_kept and of its target.
inline void check_scattered(const Tensor& value, const Tensor& target, const KeptLists& lists) {
  constexpr const char* op = "scatter_kept";
  const std::vector<int64_t> shape = kept_shape(target, lists, op);
  const auto sizes = value.sizes();
  STD_TORCH_CHECK(std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()), op,
                  ": a value has not the shape of the kept part of its target");
  const auto strides = target.strides();
  for (size_t d = 0; d < shape.size(); ++d) {
    STD_TORCH_CHECK(strides[d] != 0 || target.size(d) <= 1, op, ": a target has elements that share memory");
  }
}

inline int32_t code_of(ScalarType type) {
  if (type == ScalarType::Double) return aoti_torch_dtype_float64();
  if (type == ScalarType::Half) return aoti_torch_dtype_float16();
  if (type == ScalarType::BFloat16) return aoti_torch_dtype_bfloat16();
  STD_TORCH_CHECK(type == ScalarType::Float, "wanted float32, float16, bfloat16 or float64");
  return aoti_torch_dtype_float32();
}

// The dimensions of a tensor, those that lie closest together first. Dimensions of length 1 count as the inner one of
// two with equal stride: see empty_laid_as in ops/reference_conv.py.
inline std::vector<size_t> inner_first(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> order(sizes.size());
  for (size_t d = 0; d < order.size(); ++d) order[d] = order.size() - 1 - d;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return strides[a] != strides[b] ? strides[a] < strides[b] : (sizes[a] > 1) < (sizes[b] > 1);
  });
  return order;
}

inline Tensor empty_in_order(const Tensor& beside, const std::vector<int64_t>& shape, const std::vector<size_t>& order,
                             ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (const size_t d : order) {
    strides[d] = step;
    step *= std::max<int64_t>(shape[d], 1);
  }
  // The C call: one of these for each tensor of a network, so the dispatcher's price would show.
  AtenTensorHandle handle = nullptr;
  const int32_t device = beside.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  code_of(type), device,
                                                  beside.is_cuda() ? beside.get_device_index() : 0, &handle));
  return Tensor(handle);
}

// A new tensor with its dimensions in memory in the order of those of another, without gaps.
inline Tensor empty_laid_as(const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type) {
  return empty_in_order(tensor, shape, inner_first(tensor), type);
}

inline Tensor empty_laid_as(const Tensor& tensor, const std::vector<int64_t>& shape) {
  return empty_laid_as(tensor, shape, tensor.scalar_type());
}

// The shape of x with another number of channels.
inline std::vector<int64_t> with_channels(const Tensor& x, int64_t channels) {
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[1] = channels;
  return shape;
}

}  // namespace taylor
