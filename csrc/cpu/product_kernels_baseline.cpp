// The inner loops for any CPU.

#define TAYLOR_TARGET
#define TAYLOR_NAMESPACE baseline
#define TAYLOR_WIDTH 128

#include "cpu/product_kernels.h"
#include "cpu/relu_kernels.h"
