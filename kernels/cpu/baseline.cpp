#include "std.h"

#define EURYALE_ISA baseline
#define LANES 4
#include "kernels.h"
