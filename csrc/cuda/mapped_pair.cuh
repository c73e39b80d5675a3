// The host's part of a mapped copy: the two tensors as the kernel wants them, and what it needs to know of them.

#pragma once

#include <optional>

#include "mapped_copy.cuh"

namespace taylor {

// A copy to be launched. Where `to` is not the result itself, the result is copied from it afterwards.
struct MappedPair {
  Tensor from;
  Tensor to;
  Tensor result;
  bool apart = false;
  MappedItem item{};

  void finish() {
    if (apart) torch::stable::copy_(result, to);
  }
};

inline bool is_dense(const Tensor& x, const std::vector<size_t>& order) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t step = 1;
  for (const size_t d : order) {
    if (sizes[d] != 1 && strides[d] != step) return false;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return true;
}

inline Tensor beside_in_order(const Tensor& x, const std::vector<size_t>& order) {
  const auto sizes = x.sizes();
  return empty_in_order(x, {sizes.begin(), sizes.end()}, order, x.scalar_type());
}

inline Tensor dense_in_order(const Tensor& x, const std::vector<size_t>& order) {
  if (is_dense(x, order)) return x;
  Tensor copy = beside_in_order(x, order);
  torch::stable::copy_(copy, x);
  return copy;
}

// The elements of 16 bytes of the narrower type; 1 where the kernel has no wide form.
inline int wide_of(ScalarType from, ScalarType to) {
  if (from == to) return from == ScalarType::Double ? 2 : (from == ScalarType::Float ? 4 : 8);
  return from == ScalarType::Double || to == ScalarType::Double ? 1 : 8;
}

inline uint8_t kind_of(ScalarType type) {
  const Kind kind = type == ScalarType::Double     ? Kind::kDouble
                    : type == ScalarType::Half     ? Kind::kHalf
                    : type == ScalarType::BFloat16 ? Kind::kBFloat16
                                                   : Kind::kFloat;
  return static_cast<uint8_t>(kind);
}

// Dimensions in memory in the order of those of `to`, or where these don't make three levels, of a contiguous tensor.
inline std::vector<size_t> order_for(const Tensor& walked, const Tensor& other, const Tensor& to,
                                     const KeptLists& lists) {
  std::vector<size_t> order = inner_first(to);
  if (planning::levels_of(walked, other, lists, order).size() <= kLevels) return order;
  for (size_t d = 0; d < order.size(); ++d) order[d] = order.size() - 1 - d;
  return order;
}

// Nothing where there is nothing to copy. `whole`: every element of `to` is written, none has to be there before.
inline std::optional<MappedPair> pair_of(const Tensor& from, const Tensor& to, const KeptLists& lists, Walked walked,
                                         bool whole, int64_t tiles, const char* op) {
  const bool written = walked == Walked::kWritten;
  const Tensor &along = written ? to : from, &beside = written ? from : to;
  if (along.numel() == 0) return std::nullopt;
  const std::vector<size_t> order = order_for(along, beside, to, lists);
  const bool apart = !is_dense(to, order);
  MappedPair pair{dense_in_order(from, order),
                  !apart  ? to
                  : whole ? beside_in_order(to, order)
                          : dense_in_order(to, order),
                  to, apart};
  const void* const place_from = pair.from.const_data_ptr();
  const void* const place_to = pair.to.mutable_data_ptr();
  pair.item.walked = written ? place_to : place_from;
  pair.item.other = written ? place_from : place_to;
  pair.item.type_from = kind_of(from.scalar_type());
  pair.item.type_to = kind_of(to.scalar_type());
  const int wide = wide_of(from.scalar_type(), to.scalar_type());
  STD_TORCH_CHECK(planning::plan_item(pair.item, planning::levels_of(along, beside, lists, order), wide, tiles), op,
                  ": more than 2**31 - 1 elements in one row");
  return pair;
}

}  // namespace taylor
