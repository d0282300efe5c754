#include "std.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define EURYALE_ISA avx512_bf16
#define EURYALE_BF16_PRODUCTS
#define LANES 16
#include "kernels.h"
#endif
