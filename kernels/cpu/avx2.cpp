#include "std.h"

#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define EURYALE_ISA avx2
#define LANES 8
#include "kernels.h"
#endif
