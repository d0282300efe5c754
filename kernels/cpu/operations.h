// The structures and functions of operations.def, declared for C++.
#pragma once
#include <cstdint>

namespace euryale {

#define EURYALE_STRUCTURE(name, ...) struct name { __VA_ARGS__ };
#include "operations.def"

// The kernels of one instruction set.
struct Ops {
#define EURYALE_VECTORISED(recorded, result, name, parameters) result(*name) parameters;
#include "operations.def"
};

extern const Ops avx512_bf16_ops, avx512_ops, avx2_ops, baseline_ops;

}  // namespace euryale

extern "C" {
#define EURYALE_PLAIN(recorded, result, name, parameters) result euryale_##name parameters;
#include "operations.def"
}
