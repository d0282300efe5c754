// The standard headers of all kernels, included before the instruction set changes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __unix__
#include <sys/mman.h>
#endif

#include "operations.h"
#include "threads.h"
