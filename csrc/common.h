// What every native op shares: checks, the names of reductions, the walk over two tensors at once, the choice of a
// type. Sizes, strides and offsets are int64 and in elements.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace taylor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Reduction { kBatch, kSample, kAbs, kElement, kAll };  // of channel_importance
constexpr int64_t kReductions = 4;  // rows of kAll, in the order of the others

// What is summed: a·g, (a·g)² or |a·g|; or the first two, or all three, each in a plane of its own.
enum class Term { kProduct, kSquare, kAbs, kTwo, kThree };

constexpr int planes_of(Term term) { return term == Term::kTwo ? 2 : term == Term::kThree ? 3 : 1; }

inline Reduction channel_reduction(const std::string& name) {
  if (name == "batch") return Reduction::kBatch;
  if (name == "sample") return Reduction::kSample;
  if (name == "abs") return Reduction::kAbs;
  if (name == "element") return Reduction::kElement;
  STD_TORCH_CHECK(name == "all", "channel_importance: unknown reduction ", name);
  return Reduction::kAll;
}

inline Term weight_reduction(const std::string& name) {
  if (name == "sum") return Term::kProduct;
  if (name == "square") return Term::kSquare;
  STD_TORCH_CHECK(name == "abs", "weight_importance: unknown reduction ", name);
  return Term::kAbs;
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

inline ScalarType result_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_shape(const Tensor& a, const Tensor& g, const char* op) {
  const auto sizes_a = a.sizes(), sizes_g = g.sizes();
  STD_TORCH_CHECK(sizes_a.size() == sizes_g.size(), op, ": the two tensors have ", sizes_a.size(), " and ",
                  sizes_g.size(), " dimensions");
  for (size_t d = 0; d < sizes_a.size(); ++d) {
    STD_TORCH_CHECK(sizes_a[d] == sizes_g[d], op, ": the two tensors differ in dimension ", d);
  }
  STD_TORCH_CHECK(a.is_cuda() == g.is_cuda() && a.get_device_index() == g.get_device_index(), op,
                  ": the two tensors are on different devices");
}

// The contract of the channel ops: one shape [N, C, ...], one supported type, one device.
inline void check_activation_pair(const Tensor& activation, const Tensor& gradient, const char* op) {
  check_same_shape(activation, gradient, op);
  STD_TORCH_CHECK(activation.dim() >= 2, op, ": wanted [N, C, ...], got ", activation.dim(), " dimensions");
  STD_TORCH_CHECK(activation.scalar_type() == gradient.scalar_type() && is_supported(activation.scalar_type()), op,
                  ": wanted two tensors of one of float32, float16, bfloat16, float64");
}

// The contract of the ops that add to sums: contiguous, [C] or [N, C], of the result's type.
inline void check_sums(const Tensor& activation, const Tensor& sums, const char* op = "accumulate_channel_sums") {
  const bool per_sample = sums.dim() == 2 && sums.size(0) == activation.size(0) && sums.size(1) == activation.size(1);
  const bool per_channel = sums.dim() == 1 && sums.size(0) == activation.size(1);
  STD_TORCH_CHECK(per_sample || per_channel, op, ": sums must be [C] or [N, C]");
  STD_TORCH_CHECK(sums.is_contiguous(), op, ": sums must be contiguous");
  STD_TORCH_CHECK(sums.scalar_type() == result_type(activation.scalar_type()), op,
                  ": sums must be float32, or float64 for float64 activations");
}

// The contract of one (weight, gradient, dim) of weight_importance: the types agree, or a float32 weight has a 16-bit
// gradient. Returns the dimension, counted from the front.
inline int64_t check_weight_pair(const Tensor& weight, const Tensor& gradient, int64_t dim) {
  check_same_shape(weight, gradient, "weight_importance");
  const int64_t dims = weight.dim();
  STD_TORCH_CHECK(dim >= -dims && dim < dims, "weight_importance: no dimension ", dim);
  const ScalarType w = weight.scalar_type(), g = gradient.scalar_type();
  const bool half_gradient = w == ScalarType::Float && (g == ScalarType::Half || g == ScalarType::BFloat16);
  STD_TORCH_CHECK(is_supported(w) && (w == g || half_gradient),
                  "weight_importance: wanted a gradient of the weight's type, or of 16 bits for a float32 weight");
  return dim < 0 ? dim + dims : dim;
}

// The contract of keep_mask: scores [n], float32 or float64, and a whole number beside them.
inline void check_scores(const Tensor& scores, const Tensor& keep) {
  const ScalarType type = scores.scalar_type();
  STD_TORCH_CHECK(scores.dim() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                  "keep_mask: scores must be [n], of float32 or float64");
  STD_TORCH_CHECK(keep.dim() == 0 && keep.scalar_type() == ScalarType::Long, "keep_mask: keep must be 0-d, of int64");
  STD_TORCH_CHECK(scores.is_cuda() == keep.is_cuda() && scores.get_device_index() == keep.get_device_index(),
                  "keep_mask: the two tensors are on different devices");
}

// One loop of a walk over two tensors of the same shape.
struct Loop {
  int64_t size = 1;
  int64_t stride_a = 0;
  int64_t stride_g = 0;
};

// Two tensors of one shape as [kept dimension] x [all others]; the others are outermost first, with those that lie end
// to end merged.
struct Walk {
  Loop sample;  // dimension 0, where it is not among the others
  Loop channel;
  std::vector<Loop> rest;
};

// A loop over each dimension. Every question to a tensor is a call into libtorch, so it is asked once for all of them.
inline std::vector<Loop> loops_of(const Tensor& a, const Tensor& g) {
  const auto sizes = a.sizes(), strides_a = a.strides(), strides_g = g.strides();
  std::vector<Loop> loops(sizes.size());
  for (size_t d = 0; d < loops.size(); ++d) loops[d] = {sizes[d], strides_a[d], strides_g[d]};
  return loops;
}

// Sort outermost first and merge neighbours that form one loop. Loops of size 1 vanish. All in place: a network has
// many small tensors, for which one allocation more takes as long as their sums.
inline std::vector<Loop> merged(std::vector<Loop> loops) {
  size_t kept = 0;
  for (size_t i = 0; i < loops.size(); ++i) {
    const Loop loop = loops[i];
    if (loop.size == 1) continue;
    size_t place = kept++;
    for (; place > 0; --place) {
      const Loop& before = loops[place - 1];
      if (before.stride_a + before.stride_g >= loop.stride_a + loop.stride_g) break;
      loops[place] = before;
    }
    loops[place] = loop;
  }
  loops.resize(kept);
  size_t last = 0;
  for (size_t i = 1; i < kept; ++i) {
    const Loop inner = loops[i];
    Loop& outer = loops[last];
    if (outer.stride_a == inner.stride_a * inner.size && outer.stride_g == inner.stride_g * inner.size) {
      outer = {outer.size * inner.size, inner.stride_a, inner.stride_g};
    } else {
      loops[++last] = inner;
    }
  }
  loops.resize(std::min(kept, last + 1));
  return loops;
}

// [N, C, ...]: samples apart from the rest.
inline Walk walk_activation(const Tensor& activation, const Tensor& gradient) {
  const std::vector<Loop> loops = loops_of(activation, gradient);
  return {loops[0], loops[1], merged({loops.begin() + 2, loops.end()})};
}

// A weight and the dimension to keep.
inline Walk walk_weight(const Tensor& weight, const Tensor& gradient, int64_t dim) {
  std::vector<Loop> loops = loops_of(weight, gradient);
  const Loop kept = loops[dim];
  loops.erase(loops.begin() + dim);
  return {Loop{}, kept, merged(std::move(loops))};
}

}  // namespace taylor
