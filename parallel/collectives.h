// The functions of collectives.def, declared for C++.
#pragma once
#include <cstdint>

struct EuryaleGroup;  // a rank's end of the shared memory (shared_memory.cpp)

extern "C" {
#define EURYALE_PLAIN(recorded, result, name, parameters) result euryale_##name parameters;
#include "collectives.def"
}
