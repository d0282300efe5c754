// All vectorised kernels, for the instruction set that the including file has chosen.
#include "vector.h"

#include "../add_rms_norm/cpu.h"
#include "../add_silu/cpu.h"
#include "../linear/cpu.h"
#include "../linear/quantized.h"
#include "../rope_qk/cpu.h"
#include "../silu_mul/cpu.h"
#include "../top_k/cpu.h"
#include "../sample/cpu.h"
#include "../tree_attention/block.h"
#include "../tree_attention/cpu.h"
#include "reduce.h"

#define EURYALE_NAME_(isa) isa##_ops
#define EURYALE_NAME(isa) EURYALE_NAME_(isa)
const euryale::Ops euryale::EURYALE_NAME(EURYALE_ISA) = {
    euryale::EURYALE_ISA::tree_attention,
    euryale::EURYALE_ISA::rope_qk,
    euryale::EURYALE_ISA::add_rms_norm,
    euryale::EURYALE_ISA::silu_mul,
    euryale::EURYALE_ISA::add_silu,
    euryale::EURYALE_ISA::top_k,
    euryale::EURYALE_ISA::merge_top_k,
    euryale::EURYALE_ISA::sample,
    euryale::EURYALE_ISA::linear_panel,
    euryale::EURYALE_ISA::linear_pack,
    euryale::EURYALE_ISA::linear_run,
    euryale::EURYALE_ISA::quantized_run,
    euryale::EURYALE_ISA::reduce,
};
