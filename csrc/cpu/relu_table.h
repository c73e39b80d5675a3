// What score_relu_backward and its kernels agree on: a piece of work, and one kernel for each instruction set.

#pragma once

#include "cpu/kernel_table.h"

namespace taylor {

// The whole call. Output, skip and gx have the strides `a` of the loops.
struct ReluWork {
  const void* output = nullptr;
  const void* gradient = nullptr;
  const void* skip = nullptr;
  void* gx = nullptr;
  Loop sample;
  Loop channel;
  Loop position;
  bool columns = false;  // channels lie side by side; otherwise positions do
};

// What one thread does at once. Columns: samples x positions x channels, one sum for each channel. Rows: `rows` of the
// flattened (sample, channel), one sum for each.
struct ReluPiece {
  int64_t first_sample = 0, samples = 1;
  int64_t first_position = 0, positions = 1;
  int64_t first_channel = 0, channels = 1;
  int64_t first_row = 0, rows = 0;
};

// Writes the piece of gx and its sums; skip_sums is not used where work.skip is null.
using ReluKernel = void (*)(const ReluWork& work, const ReluPiece& piece, double* sums, double* skip_sums);

namespace baseline {
ReluKernel relu_kernel_of(ScalarType type, bool skip, bool columns);
}
#if TAYLOR_X86
namespace avx2 {
ReluKernel relu_kernel_of(ScalarType type, bool skip, bool columns);
}
namespace avx512 {
ReluKernel relu_kernel_of(ScalarType type, bool skip, bool columns);
}
#endif

}  // namespace taylor
