// The kernels of the instruction set in use: the widest that this CPU has, unless a test chose another.
#pragma once
#include "ops.h"

namespace euryale {

const Ops* kernels();

}
