// What product_sums and its kernels agree on: a piece of work, and one kernel for each instruction set.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

#include "common.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TAYLOR_X86 1
#else
#define TAYLOR_X86 0
#endif

namespace taylor {

constexpr int kMaxLoops = 64;            // torch allows no more dimensions
constexpr int64_t kMaxWidth = 4608;      // columns of one piece: a 3x3 convolution with 512 inputs reads its rows whole
constexpr int64_t kGoodWidth = 512;      // short rows are joined up to here: their fp64 sums leave the L1 cache free
constexpr int kRowsAtOnce = 6;           // long rows are added six at a time, for their sums no longer fit there
constexpr size_t kLongRow = 4096;        // bytes of such a row: a page each, or the hardware's prefetch loses track
constexpr int64_t kStridedBlock = 16;    // channels whose fp32 values share a cache line when the channel stride is 1
constexpr int64_t kPieceSize = 1 << 16;  // elements of one piece: half a MiB of two fp32 tensors

enum class Path { kRows, kRowsRepeatA, kRowsRepeatG, kColumns, kStrided };

// A part of one job that one thread does at once: some channels, and a stretch of their loops.
struct Piece {
  Path path = Path::kStrided;
  int64_t offset_a = 0, offset_g = 0;
  int64_t channels = 0;
  int64_t fold = 1;   // kColumns: elements side by side that belong to one channel,
  int64_t run = 0;    // contiguous elements at each position of the loops,
  int64_t width = 0;  // and sums side by side, a multiple of channels * fold
  Loop channel;
  const Loop* loops = nullptr;
  int loop_count = 0;
  int64_t outer = 1;  // positions of the loops: without the innermost one, except for kColumns
  int64_t plane = 0;  // from the sums of one term to those of the next
};

// The widest instructions that this CPU has, or narrower ones where ATEN_CPU_CAPABILITY asks for them, as PyTorch's own
// kernels do.
enum class Instructions { kBaseline, kAvx2, kAvx512 };

inline Instructions best_instructions() {
#if TAYLOR_X86
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = asked == nullptr ? "avx512" : asked;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most != "avx2" && most != "default") return Instructions::kAvx512;
  if (has_avx2 && most != "default") return Instructions::kAvx2;
#endif
  return Instructions::kBaseline;
}

using Kernel = void (*)(const void* a, const void* g, const Piece& piece, double* out);

namespace baseline {
Kernel kernel_of(ScalarType type_a, ScalarType type_g, Term term);
}
#if TAYLOR_X86
namespace avx2 {
Kernel kernel_of(ScalarType type_a, ScalarType type_g, Term term);
}
namespace avx512 {
Kernel kernel_of(ScalarType type_a, ScalarType type_g, Term term);
}
#endif

}  // namespace taylor
