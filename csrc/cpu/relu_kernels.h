// The inner loops of score_relu_backward, compiled once for each instruction set beside those of product_kernels.h,
// whose loads, conversions and products they use.

#include "cpu/relu_table.h"

namespace taylor {
namespace TAYLOR_NAMESPACE {
namespace {

typedef int16_t Short8 __attribute__((vector_size(16)));
typedef int32_t Int8 __attribute__((vector_size(32)));

// gx of eight elements: the gradient's own bits, or 0 where output <= 0. NaN is not.
TAYLOR_INLINE void mask(const float* output, const float* gradient, float* gx) {
  const Int8 kept = ~reinterpret_cast<Int8>(load<Float8>(output) <= 0.0f) & load<Int8>(gradient);
  std::memcpy(gx, &kept, sizeof(kept));
}

TAYLOR_INLINE void mask(const double* output, const double* gradient, double* gx) {
  const Long8 kept = ~reinterpret_cast<Long8>(load<Double8>(output) <= 0.0) & load<Long8>(gradient);
  std::memcpy(gx, &kept, sizeof(kept));
}

// Of 16 bits, seen as integers: 0, or from -0 to minus infinity, above which the negative NaN lie.
template <typename T>
TAYLOR_INLINE void mask(const T* output, const T* gradient, T* gx) {
  constexpr int16_t kMinusInfinity = std::is_same_v<T, Half> ? -0x0400 : -0x0080;
  const Short8 bits = load<Short8>(output);
  const Short8 kept = ~((bits <= kMinusInfinity) | (bits == 0)) & load<Short8>(gradient);
  std::memcpy(gx, &kept, sizeof(kept));
}

template <typename T>
TAYLOR_INLINE T masked(const T& output, const T& gradient) {
  return output <= T(0) ? T(0) : gradient;
}

// Eight products of output and gradient, and on the way gx; then those of skip and gx.
template <bool skips, typename T>
TAYLOR_INLINE void step(const T* output, const T* gradient, const T* skip, T* gx, Double8& sum, Double8& skip_sum) {
  mask(output, gradient, gx);
  sum += products<1, 1>(output, gradient);
  if constexpr (skips) skip_sum += products<1, 1>(skip, gx);
}

template <bool skips, typename T>
TAYLOR_INLINE void step_one(const T* output, const T* gradient, const T* skip, T* gx, double& sum, double& skip_sum) {
  *gx = masked(*output, *gradient);
  sum += product(*output, *gradient);
  if constexpr (skips) skip_sum += product(*skip, *gx);
}

// The sum of one row while it is read.
struct LaneSums {
  Double8 s0{}, s1{}, s2{}, s3{};
  double tail = 0;
};

TAYLOR_INLINE double sum_of(const LaneSums& sums) {
  const Double8 s = (sums.s0 + sums.s1) + (sums.s2 + sums.s3);
  return (((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]))) + sums.tail;
}

template <bool skips, typename T>
TAYLOR_TARGET void relu_rows(const ReluWork& work, const ReluPiece& piece, double* sums, double* skip_sums) {
  const int64_t channels = work.channel.size, length = work.position.size;
  int64_t n = piece.first_row / channels, c = piece.first_row % channels;
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t at = n * work.sample.stride_a + c * work.channel.stride_a;
    const T* o = static_cast<const T*>(work.output) + at;
    const T* g = static_cast<const T*>(work.gradient) + n * work.sample.stride_g + c * work.channel.stride_g;
    const T* s = skips ? static_cast<const T*>(work.skip) + at : o;
    T* gx = static_cast<T*>(work.gx) + at;
    LaneSums sum, skip;
    int64_t i = 0;
    for (; i + 32 <= length; i += 32) {
      step<skips>(o + i, g + i, s + i, gx + i, sum.s0, skip.s0);
      step<skips>(o + i + 8, g + i + 8, s + i + 8, gx + i + 8, sum.s1, skip.s1);
      step<skips>(o + i + 16, g + i + 16, s + i + 16, gx + i + 16, sum.s2, skip.s2);
      step<skips>(o + i + 24, g + i + 24, s + i + 24, gx + i + 24, sum.s3, skip.s3);
    }
    for (; i + 8 <= length; i += 8) step<skips>(o + i, g + i, s + i, gx + i, sum.s0, skip.s0);
    for (; i < length; ++i) step_one<skips>(o + i, g + i, s + i, gx + i, sum.tail, skip.tail);
    sums[r] = sum_of(sum);
    if (skips) skip_sums[r] = sum_of(skip);
    if (++c == channels) {
      c = 0;
      ++n;
    }
  }
}

// `kRows` rows of columns at once: fewer visits of the sums.
template <bool skips, int kRows, typename T>
TAYLOR_INLINE void relu_columns_of(const T* o, const T* g, const T* s, T* gx, int64_t row, int64_t row_g,
                                   int64_t channels, double* sums, double* skip_sums) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    Double8 sum = load<Double8>(sums + c), skip{};
    if constexpr (skips) skip = load<Double8>(skip_sums + c);
    for (int r = 0; r < kRows; ++r) {
      step<skips>(o + r * row + c, g + r * row_g + c, s + r * row + c, gx + r * row + c, sum, skip);
    }
    std::memcpy(sums + c, &sum, sizeof(sum));
    if constexpr (skips) std::memcpy(skip_sums + c, &skip, sizeof(skip));
  }
  for (; c < channels; ++c) {
    double skip = skips ? skip_sums[c] : 0;
    for (int r = 0; r < kRows; ++r) {
      step_one<skips>(o + r * row + c, g + r * row_g + c, s + r * row + c, gx + r * row + c, sums[c], skip);
    }
    if (skips) skip_sums[c] = skip;
  }
}

template <bool skips, typename T>
TAYLOR_TARGET void relu_columns(const ReluWork& work, const ReluPiece& piece, double* sums, double* skip_sums) {
  constexpr int kRows = 4;
  for (int64_t c = 0; c < piece.channels; ++c) {
    sums[c] = 0;
    if (skips) skip_sums[c] = 0;
  }
  const int64_t row = work.position.stride_a, row_g = work.position.stride_g;
  for (int64_t n = piece.first_sample; n < piece.first_sample + piece.samples; ++n) {
    const int64_t at = n * work.sample.stride_a + piece.first_position * row + piece.first_channel;
    const int64_t at_g = n * work.sample.stride_g + piece.first_position * row_g + piece.first_channel;
    const T* o = static_cast<const T*>(work.output) + at;
    const T* g = static_cast<const T*>(work.gradient) + at_g;
    const T* s = skips ? static_cast<const T*>(work.skip) + at : o;
    T* gx = static_cast<T*>(work.gx) + at;
    int64_t l = 0;
    // Short rows one by one: the hardware's prefetch follows a single run of memory best.
    const int64_t last =
        piece.channels * static_cast<int64_t>(sizeof(T)) >= static_cast<int64_t>(kLongRow) ? piece.positions : 0;
    for (; l + kRows <= last; l += kRows) {
      relu_columns_of<skips, kRows>(o + l * row, g + l * row_g, s + l * row, gx + l * row, row, row_g, piece.channels,
                                    sums, skip_sums);
    }
    for (; l < piece.positions; ++l) {
      relu_columns_of<skips, 1>(o + l * row, g + l * row_g, s + l * row, gx + l * row, row, row_g, piece.channels, sums,
                                skip_sums);
    }
  }
}

template <typename T>
ReluKernel relu_kernel_for(bool skip, bool columns) {
  if (columns) return skip ? relu_columns<true, T> : relu_columns<false, T>;
  return skip ? relu_rows<true, T> : relu_rows<false, T>;
}

}  // namespace

ReluKernel relu_kernel_of(ScalarType type, bool skip, bool columns) {
  if (type == ScalarType::Half) return relu_kernel_for<Half>(skip, columns);
  if (type == ScalarType::BFloat16) return relu_kernel_for<BFloat16>(skip, columns);
  if (type == ScalarType::Double) return relu_kernel_for<double>(skip, columns);
  return relu_kernel_for<float>(skip, columns);
}

}  // namespace TAYLOR_NAMESPACE
}  // namespace taylor
