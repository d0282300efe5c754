#include "std.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define EURYALE_ISA avx512
#define LANES 16
#include "kernels.h"
#endif
