// The inner loops of product_sums, compiled once for each instruction set. The including file defines TAYLOR_TARGET
// (the target attribute), TAYLOR_NAMESPACE and TAYLOR_WIDTH (bits of a vector register), and no function here may be
// shared between them: hence the anonymous namespace.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernel_table.h"

namespace taylor {
namespace TAYLOR_NAMESPACE {
namespace {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

typedef double Double8 __attribute__((vector_size(64)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int64_t Long8 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint16_t UShort8 __attribute__((vector_size(16)));

#define TAYLOR_INLINE TAYLOR_TARGET inline __attribute__((always_inline))

template <typename V, typename T>
TAYLOR_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

TAYLOR_INLINE Float8 widen(const float* p) { return load<Float8>(p); }

TAYLOR_INLINE Float8 widen(const BFloat16* p) {
  return reinterpret_cast<Float8>(__builtin_convertvector(load<UShort8>(p), UInt8) << 16);
}

#if TAYLOR_WIDTH >= 256
TAYLOR_INLINE Float8 widen(const Half* p) {
  return reinterpret_cast<Float8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#else
TAYLOR_INLINE Float8 widen(const Half* p) {
  const UInt8 bits = __builtin_convertvector(load<UShort8>(p), UInt8);
  const UInt8 magnitude = (bits & 0x7fffu) << 13;
  const Float8 scaled =
      reinterpret_cast<Float8>(magnitude) * 0x1p112f;  // rebias the exponent; right for subnormals too
  const UInt8 special = reinterpret_cast<UInt8>((bits & 0x7c00u) == 0x7c00u);
  const UInt8 value = (special & (magnitude | 0x7f800000u)) | (~special & reinterpret_cast<UInt8>(scaled));
  return reinterpret_cast<Float8>(value | ((bits & 0x8000u) << 16));
}
#endif

// Compilers convert eight at a time badly when left to themselves.
TAYLOR_INLINE Double8 to_double(Float8 v) {
#if TAYLOR_WIDTH == 512
  return reinterpret_cast<Double8>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(v)));
#elif TAYLOR_WIDTH == 256
  const __m256 w = reinterpret_cast<__m256>(v);
  return __builtin_shufflevector(reinterpret_cast<Double4>(_mm256_cvtps_pd(_mm256_castps256_ps128(w))),
                                 reinterpret_cast<Double4>(_mm256_cvtps_pd(_mm256_extractf128_ps(w, 1))), 0, 1, 2, 3, 4,
                                 5, 6, 7);
#else
  return __builtin_convertvector(v, Double8);
#endif
}

template <typename T>
TAYLOR_INLINE Double8 widen_to_double(const T* p) {
  if constexpr (std::is_same_v<T, double>) {
    return load<Double8>(p);
  } else {
    return to_double(widen(p));
  }
}

template <typename TA, typename TG>
constexpr bool kFloatProduct = sizeof(TA) == 2 && sizeof(TG) == 2;

template <typename TA, typename TG>
TAYLOR_INLINE double product(const TA& a, const TG& g) {
  if constexpr (kFloatProduct<TA, TG>) {
    return static_cast<double>(static_cast<float>(a) * static_cast<float>(g));
  } else {
    return static_cast<double>(a) * static_cast<double>(g);
  }
}

// Eight products. A stride of 0 repeats one element.
template <int stride_a, int stride_g, typename TA, typename TG>
TAYLOR_INLINE Double8 products(const TA* a, const TG* g) {
  if constexpr (stride_a == 1 && stride_g == 1 && kFloatProduct<TA, TG>) {
    return to_double(widen(a) * widen(g));
  } else if constexpr (stride_a == 0) {
    return widen_to_double(g) * static_cast<double>(*a);
  } else if constexpr (stride_g == 0) {
    return widen_to_double(a) * static_cast<double>(*g);
  } else {
    return widen_to_double(a) * widen_to_double(g);
  }
}

TAYLOR_INLINE double magnitude(double p) { return std::fabs(p); }

TAYLOR_INLINE Double8 magnitude(Double8 p) {
  return reinterpret_cast<Double8>(reinterpret_cast<Long8>(p) & INT64_C(0x7fffffffffffffff));
}

// Adds the terms of a product, or of eight, each to its own sum.
template <Term term, typename T>
TAYLOR_INLINE void add_terms(T (&sums)[planes_of(term)], T p) {
  if constexpr (term == Term::kSquare) {
    sums[0] += p * p;
  } else if constexpr (term == Term::kAbs) {
    sums[0] += magnitude(p);
  } else {
    sums[0] += p;
  }
  if constexpr (planes_of(term) > 1) sums[1] += p * p;
  if constexpr (planes_of(term) > 2) sums[2] += magnitude(p);
}

// Walks over all positions of some loops, the last one fastest.
struct Cursor {
  const Loop* loops;
  int count;
  int64_t index[kMaxLoops];
  int64_t a, g;
};

TAYLOR_INLINE void start(Cursor& cursor, const Loop* loops, int count) {
  cursor.loops = loops;
  cursor.count = count;
  cursor.a = cursor.g = 0;
  for (int i = 0; i < count; ++i) cursor.index[i] = 0;
}

TAYLOR_INLINE void advance(Cursor& cursor) {
  for (int i = cursor.count - 1; i >= 0; --i) {
    const Loop& loop = cursor.loops[i];
    cursor.a += loop.stride_a;
    cursor.g += loop.stride_g;
    if (++cursor.index[i] < loop.size) return;
    cursor.index[i] = 0;
    cursor.a -= loop.size * loop.stride_a;
    cursor.g -= loop.size * loop.stride_g;
  }
}

// The sums of one channel while its rows are read; short rows would pay dearly for adding up the lanes of each.
template <Term term>
struct RowSums {
  Double8 s0[planes_of(term)]{}, s1[planes_of(term)]{}, s2[planes_of(term)]{}, s3[planes_of(term)]{};
  double tail[planes_of(term)]{};
};

template <Term term>
TAYLOR_INLINE double total(const RowSums<term>& sums, int plane) {
  const Double8 s = (sums.s0[plane] + sums.s1[plane]) + (sums.s2[plane] + sums.s3[plane]);
  return (((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]))) + sums.tail[plane];
}

template <Term term, int stride_a, int stride_g, typename TA, typename TG>
TAYLOR_INLINE void add_row(const TA* a, const TG* g, int64_t size, RowSums<term>& sums) {
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const TA* pa = a + i * stride_a;
    const TG* pg = g + i * stride_g;
    add_terms<term>(sums.s0, products<stride_a, stride_g>(pa, pg));
    add_terms<term>(sums.s1, products<stride_a, stride_g>(pa + 8 * stride_a, pg + 8 * stride_g));
    add_terms<term>(sums.s2, products<stride_a, stride_g>(pa + 16 * stride_a, pg + 16 * stride_g));
    add_terms<term>(sums.s3, products<stride_a, stride_g>(pa + 24 * stride_a, pg + 24 * stride_g));
  }
  for (; i + 8 <= size; i += 8) {
    add_terms<term>(sums.s0, products<stride_a, stride_g>(a + i * stride_a, g + i * stride_g));
  }
  for (; i < size; ++i) add_terms<term>(sums.tail, product(a[i * stride_a], g[i * stride_g]));
}

// out[i] = Σ f(a·g) over the loops of the i-th channel; the innermost loop is contiguous in each tensor, or repeats.
template <Term term, int stride_a, int stride_g, typename TA, typename TG>
TAYLOR_TARGET void rows(const TA* a, const TG* g, const Piece& piece, double* out) {
  const Loop& inner = piece.loops[piece.loop_count - 1];
  Cursor cursor;
  for (int64_t c = 0; c < piece.channels; ++c) {
    start(cursor, piece.loops, piece.loop_count - 1);
    RowSums<term> sums;
    for (int64_t r = 0; r < piece.outer; ++r) {
      add_row<term, stride_a, stride_g>(a + cursor.a, g + cursor.g, inner.size, sums);
      if (piece.outer > 1) advance(cursor);
    }
    for (int plane = 0; plane < planes_of(term); ++plane) out[plane * piece.plane + c] = total<term>(sums, plane);
    a += piece.channel.stride_a;
    g += piece.channel.stride_g;
  }
}

// Sums side by side: a row of each term.
template <Term term>
using ColumnSums = double[planes_of(term)][kMaxWidth];

// The sums of eight columns.
template <Term term>
struct EightColumns {
  Double8 plane[planes_of(term)];

  TAYLOR_INLINE EightColumns(const ColumnSums<term>& sums, int64_t i) {
    for (int k = 0; k < planes_of(term); ++k) plane[k] = load<Double8>(sums[k] + i);
  }
  TAYLOR_INLINE void store(ColumnSums<term>& sums, int64_t i) const {
    for (int k = 0; k < planes_of(term); ++k) std::memcpy(sums[k] + i, &plane[k], sizeof(plane[k]));
  }
};

template <Term term>
TAYLOR_INLINE void add_to_column(ColumnSums<term>& sums, int64_t i, double p) {
  double column[planes_of(term)];
  for (int k = 0; k < planes_of(term); ++k) column[k] = sums[k][i];
  add_terms<term>(column, p);
  for (int k = 0; k < planes_of(term); ++k) sums[k][i] = column[k];
}

template <Term term, typename TA, typename TG>
TAYLOR_INLINE void add_to_columns(const TA* a, const TG* g, int64_t width, ColumnSums<term>& sums) {
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    EightColumns<term> s(sums, i);
    add_terms<term>(s.plane, products<1, 1>(a + i, g + i));
    s.store(sums, i);
  }
  for (; i < width; ++i) add_to_column<term>(sums, i, product(a[i], g[i]));
}

// The same for rows that lie end to end: fewer visits of sums that fill the cache. A cache line of each row is used up
// at once, for rows of whole pages would push each other's lines out.
template <Term term, typename TA, typename TG>
TAYLOR_INLINE void add_rows_to_columns(const TA* a, const TG* g, int64_t width, ColumnSums<term>& sums) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    EightColumns<term> s0(sums, i), s1(sums, i + 8);
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const TA* pa = a + r * width + i;
      const TG* pg = g + r * width + i;
      add_terms<term>(s0.plane, products<1, 1>(pa, pg));
      add_terms<term>(s1.plane, products<1, 1>(pa + 8, pg + 8));
    }
    s0.store(sums, i);
    s1.store(sums, i + 8);
  }
  for (; i < width; ++i) {
    for (int r = 0; r < kRowsAtOnce; ++r) add_to_column<term>(sums, i, product(a[r * width + i], g[r * width + i]));
  }
}

// From sums side by side to one for each channel: the rows of a run, then its folds.
TAYLOR_INLINE void fold_columns(double* sums, const Piece& piece, double* out) {
  const int64_t row = piece.channels * piece.fold;
  for (int64_t first = row; first < piece.width; first += row) {
    for (int64_t i = 0; i < row; ++i) sums[i] += sums[first + i];
  }
  for (int64_t c = 0; c < piece.channels; ++c) {
    double sum = 0;
    for (int64_t i = 0; i < piece.fold; ++i) sum += sums[c * piece.fold + i];
    out[c] = sum;
  }
}

// out[c] = Σ f(a·g) over the loops and one contiguous run at each of their positions. In a run, channels lie side by
// side, `fold` elements each, again and again; `width` elements, a whole number of such rows, are summed side by side
// before they are folded.
template <Term term, typename TA, typename TG>
TAYLOR_TARGET void columns(const TA* a, const TG* g, const Piece& piece, double* out) {
  alignas(64) ColumnSums<term> sums;
  for (int plane = 0; plane < planes_of(term); ++plane) std::fill(sums[plane], sums[plane] + piece.width, 0.0);
  Cursor cursor;
  start(cursor, piece.loops, piece.loop_count);
  for (int64_t r = 0; r < piece.outer; ++r, advance(cursor)) {
    const TA* pa = a + cursor.a;
    const TG* pg = g + cursor.g;
    int64_t i = 0;
    if (piece.width * std::min(sizeof(TA), sizeof(TG)) >= kLongRow) {
      for (; i + kRowsAtOnce * piece.width <= piece.run; i += kRowsAtOnce * piece.width) {
        add_rows_to_columns<term>(pa + i, pg + i, piece.width, sums);
      }
    }
    for (; i < piece.run; i += piece.width) {
      add_to_columns<term>(pa + i, pg + i, std::min(piece.width, piece.run - i), sums);
    }
  }
  for (int plane = 0; plane < planes_of(term); ++plane) fold_columns(sums[plane], piece, out + plane * piece.plane);
}

// out[c] += Σ f(a·g) over one stretch of a loop of any strides.
template <Term term, typename TA, typename TG>
TAYLOR_INLINE void add_stretch(const TA* a, const TG* g, const Loop& inner, int64_t begin, int64_t end,
                               const Piece& piece, double* out) {
  double s[4][planes_of(term)] = {};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int j = 0; j < 4; ++j) {
      add_terms<term>(s[j], product(a[(i + j) * inner.stride_a], g[(i + j) * inner.stride_g]));
    }
  }
  for (; i < end; ++i) add_terms<term>(s[0], product(a[i * inner.stride_a], g[i * inner.stride_g]));
  for (int k = 0; k < planes_of(term); ++k) out[k * piece.plane] += (s[0][k] + s[1][k]) + (s[2][k] + s[3][k]);
}

// out[c] = Σ f(a·g) over the loops, any strides. A block of channels shares the cache lines of a stretch of the
// innermost loop.
template <Term term, typename TA, typename TG>
TAYLOR_TARGET void strided(const TA* a, const TG* g, const Piece& piece, double* out) {
  constexpr int64_t kStretch = 64;
  const Loop inner = piece.loop_count > 0 ? piece.loops[piece.loop_count - 1] : Loop{};
  for (int k = 0; k < planes_of(term); ++k) std::fill_n(out + k * piece.plane, piece.channels, 0.0);
  for (int64_t first = 0; first < piece.channels; first += kStridedBlock) {
    const int64_t last = std::min(first + kStridedBlock, piece.channels);
    Cursor cursor;
    start(cursor, piece.loops, std::max(piece.loop_count - 1, 0));
    for (int64_t r = 0; r < piece.outer; ++r, advance(cursor)) {
      for (int64_t begin = 0; begin < inner.size; begin += kStretch) {
        const int64_t end = std::min(begin + kStretch, inner.size);
        for (int64_t c = first; c < last; ++c) {
          const TA* pa = a + cursor.a + c * piece.channel.stride_a;
          const TG* pg = g + cursor.g + c * piece.channel.stride_g;
          add_stretch<term>(pa, pg, inner, begin, end, piece, out + c);
        }
      }
    }
  }
}

template <Term term, typename TA, typename TG>
TAYLOR_TARGET void run(const void* a, const void* g, const Piece& piece, double* out) {
  const TA* pa = static_cast<const TA*>(a) + piece.offset_a;
  const TG* pg = static_cast<const TG*>(g) + piece.offset_g;
  switch (piece.path) {
    case Path::kRows:
      return rows<term, 1, 1>(pa, pg, piece, out);
    case Path::kRowsRepeatA:
      return rows<term, 0, 1>(pa, pg, piece, out);
    case Path::kRowsRepeatG:
      return rows<term, 1, 0>(pa, pg, piece, out);
    case Path::kColumns:
      return columns<term>(pa, pg, piece, out);
    case Path::kStrided:
      return strided<term>(pa, pg, piece, out);
  }
}

// Several terms at once are for channel ops, whose tensors have one type.
template <typename TA, typename TG>
Kernel of_term(Term term) {
  if (term == Term::kProduct) return run<Term::kProduct, TA, TG>;
  if (term == Term::kSquare) return run<Term::kSquare, TA, TG>;
  if constexpr (std::is_same_v<TA, TG>) {
    if (term == Term::kTwo) return run<Term::kTwo, TA, TG>;
    if (term == Term::kThree) return run<Term::kThree, TA, TG>;
  }
  return run<Term::kAbs, TA, TG>;
}

}  // namespace

Kernel kernel_of(ScalarType type_a, ScalarType type_g, Term term) {
  switch (type_a) {
    case ScalarType::Half:
      return of_term<Half, Half>(term);
    case ScalarType::BFloat16:
      return of_term<BFloat16, BFloat16>(term);
    case ScalarType::Double:
      return of_term<double, double>(term);
    default:
      break;
  }
  if (type_g == ScalarType::Half) return of_term<float, Half>(term);
  if (type_g == ScalarType::BFloat16) return of_term<float, BFloat16>(term);
  return of_term<float, float>(term);
}

}  // namespace TAYLOR_NAMESPACE
}  // namespace taylor
