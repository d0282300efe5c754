// The standard headers of all kernels; to be included before the instruction set changes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ops.h"
