// The inner loops for x86-64 with AVX-512.

#include "cpu/kernel_table.h"

#if TAYLOR_X86

#include <immintrin.h>

#define TAYLOR_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define TAYLOR_NAMESPACE avx512
#define TAYLOR_WIDTH 512

#include "cpu/product_kernels.h"
#include "cpu/relu_kernels.h"

#endif
