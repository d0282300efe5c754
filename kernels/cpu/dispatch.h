// The kernels of the instruction set in use: the widest of this CPU, unless a test chose another.
#pragma once
#include "operations.h"

namespace euryale {

const Ops* kernels();

}
