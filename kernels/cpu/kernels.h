// All vectorised kernels, for the instruction set that the including file has chosen.
#include "vector.h"

#define EURYALE_DEFINITIONS
#include "operations.def"
#undef EURYALE_DEFINITIONS

#define EURYALE_NAME_(isa) isa##_ops
#define EURYALE_NAME(isa) EURYALE_NAME_(isa)
const euryale::Ops euryale::EURYALE_NAME(EURYALE_ISA) = {
#define EURYALE_VECTORISED(recorded, result, name, parameters) euryale::EURYALE_ISA::name,
#include "operations.def"
};
