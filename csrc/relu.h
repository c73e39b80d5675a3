// What both backends of score_relu_backward share: the contract, and tensors that lie alike.

#pragma once

#include <optional>

#include "common.h"

namespace taylor {

inline void check_relu(const Tensor& output, const Tensor& gradient, const Tensor& sums,
                       const std::optional<Tensor>& skip, const std::optional<Tensor>& skip_sums) {
  constexpr const char* op = "score_relu_backward";
  check_activation_pair(output, gradient, op);
  check_sums(output, sums, op);
  STD_TORCH_CHECK(skip.has_value() == skip_sums.has_value(), op, ": wanted skip and skip_sums, or neither");
  if (!skip.has_value()) return;
  check_activation_pair(output, *skip, op);
  check_sums(output, *skip_sums, op);
  STD_TORCH_CHECK(skip_sums->dim() == sums.dim(), op, ": sums and skip_sums must have one shape");
  STD_TORCH_CHECK(skip_sums->const_data_ptr() != sums.const_data_ptr() || sums.numel() == 0, op,
                  ": sums and skip_sums must be two tensors");
}

inline bool lie_alike(const Tensor& x, const Tensor& y) {
  const auto sizes = x.sizes(), strides_x = x.strides(), strides_y = y.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && strides_x[d] != strides_y[d]) return false;
  }
  return true;
}

// x itself where it lies as the other does, else a copy that does.
inline Tensor laid_as(const Tensor& x, const Tensor& other) {
  if (lie_alike(x, other)) return x;
  Tensor copy = torch::stable::empty_like(other);
  torch::stable::copy_(copy, x);
  return copy;
}

// The operands of one call. gx is new and without gaps; output and skip lie as it does, the gradient in any way.
struct Relu {
  Tensor output;
  Tensor gradient;
  std::optional<Tensor> skip;
  Tensor gx;
  Walk walk;  // of gx and the gradient
};

inline Relu relu_of(const Tensor& output, const Tensor& gradient, const std::optional<Tensor>& skip) {
  const Tensor gx = torch::stable::empty_like(output);
  std::optional<Tensor> beside;
  if (skip.has_value()) beside = laid_as(*skip, gx);
  return {laid_as(output, gx), gradient, beside, gx, walk_activation(gx, gradient)};
}

// The same with everything in NCHW order, for layouts that a backend has no path for.
inline Relu in_order(const Relu& relu) {
  std::optional<Tensor> skip;
  if (relu.skip.has_value()) skip = torch::stable::contiguous(*relu.skip);
  return relu_of(torch::stable::contiguous(relu.output), torch::stable::contiguous(relu.gradient), skip);
}

}  // namespace taylor
