// The inner loops for x86-64 with AVX2, FMA and F16C.

#include "cpu/kernel_table.h"

#if TAYLOR_X86

#include <immintrin.h>

#define TAYLOR_TARGET __attribute__((target("avx2,fma,f16c")))
#define TAYLOR_NAMESPACE avx2
#define TAYLOR_WIDTH 256

#include "cpu/product_kernels.h"
#include "cpu/relu_kernels.h"

#endif
