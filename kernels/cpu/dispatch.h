// The kernels of the widest instruction set that this CPU has.
#pragma once
#include "ops.h"

namespace euryale {

const Ops* kernels();

}
