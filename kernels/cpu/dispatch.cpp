// The C interface that kernels/cpu/__init__.py calls: it picks the widest instruction set that the CPU has, once.
#include "dispatch.h"
#include "interface.h"
#include "std.h"

namespace {

struct InstructionSet {
    const char* name;
    bool is_here;
    const euryale::Ops* ops;
};

// The widest first.
const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> all = [] {
        std::vector<InstructionSet> found;
#ifdef __x86_64__
        __builtin_cpu_init();
        const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool has_256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        found.push_back({"avx512_bf16", has_512 && __builtin_cpu_supports("avx512bf16"), &euryale::avx512_bf16_ops});
        found.push_back({"avx512", has_512, &euryale::avx512_ops});
        found.push_back({"avx2", has_256, &euryale::avx2_ops});
#endif
        found.push_back({"baseline", true, &euryale::baseline_ops});
        return found;
    }();
    return all;
}

const InstructionSet* best() {
    for (const InstructionSet& set : instruction_sets())
        if (set.is_here) return &set;
    return nullptr;
}

const InstructionSet* chosen = best();

}  // namespace

const euryale::Ops* euryale::kernels() { return chosen->ops; }

extern "C" {

const char* euryale_instruction_set() { return chosen->name; }

// For tests: use a narrower set than the best. 0 if this CPU has none of that name. Packed weights stay behind.
int euryale_use(const char* name) {
    for (const InstructionSet& set : instruction_sets())
        if (set.is_here && !std::strcmp(set.name, name)) {
            chosen = &set;
            return 1;
        }
    return 0;
}

void euryale_tree_attention(const euryale::Step* step, const euryale::Attention* shape, const void* q,
                            const void* step_k, const void* step_v, const void* cache_k, const void* cache_v,
                            void* out) {
    euryale::kernels()->tree_attention(step, shape, q, step_k, step_v, cache_k, cache_v, out);
}

void euryale_rope_qk(int64_t is_bfloat16, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, void* qkv,
                     const int64_t* positions, const void* cos, const void* sin, void* step_k, void* step_v,
                     const void* q_norm, const void* k_norm, float eps) {
    euryale::kernels()->rope_qk(is_bfloat16, rows, heads, kv_heads, head_dim, qkv, positions, cos, sin, step_k,
                                step_v, q_norm, k_norm, eps);
}

void euryale_add_rms_norm(int64_t is_bfloat16, int64_t rows, int64_t width, const void* x, const void* residual,
                          const void* weight, float eps, void* normed, void* sum) {
    euryale::kernels()->add_rms_norm(is_bfloat16, rows, width, x, residual, weight, eps, normed, sum);
}

void euryale_silu_mul(int64_t is_bfloat16, int64_t rows, int64_t width, const void* gate_up, void* out) {
    euryale::kernels()->silu_mul(is_bfloat16, rows, width, gate_up, out);
}

void euryale_add_silu(int64_t is_bfloat16, int64_t parts, int64_t rows, int64_t part, int64_t width, const void* y,
                      void* x) {
    euryale::kernels()->add_silu(is_bfloat16, parts, rows, part, width, y, x);
}

void euryale_top_k(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t k,
                   int64_t offset, const void* x, float* values, int32_t* ids) {
    euryale::kernels()->top_k(is_bfloat16, threads, rows, width, valid, k, offset, x, values, ids);
}

void euryale_merge_top_k(int64_t num_parts, int64_t rows, int64_t k, const int32_t* parts, int32_t* out) {
    euryale::kernels()->merge_top_k(num_parts, rows, k, parts, out);
}

void euryale_sample(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t offset,
                    const void* logits, const float* temperature, const int64_t* keys, float* values, int32_t* ids) {
    euryale::kernels()->sample(is_bfloat16, threads, rows, width, valid, offset, logits, temperature, keys, values,
                               ids);
}

// Elements that packed weights take.
int64_t euryale_linear_size(int64_t is_bfloat16, int64_t in, int64_t out) {
    const int64_t panel = euryale::kernels()->linear_panel();
    return (out + panel - 1) / panel * panel * (is_bfloat16 ? (in + 1) / 2 * 2 : in);
}

void euryale_linear_pack(int64_t is_bfloat16, int64_t in, int64_t out, const void* weight, void* packed) {
    euryale::kernels()->linear_pack(is_bfloat16, in, out, weight, packed);
}

void euryale_linear_run(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t in, int64_t out, const void* x,
                        const void* packed, const void* bias, void* y) {
    euryale::kernels()->linear_run(is_bfloat16, threads, rows, in, out, x, packed, bias, y);
}

void euryale_quantized_run(int64_t is_bfloat16, int64_t bits, int64_t group, int64_t threads, int64_t rows, int64_t in,
                           int64_t out, const void* x, const void* packed, const void* bias, void* y) {
    euryale::kernels()->quantized_run(is_bfloat16, bits, group, threads, rows, in, out, x, packed, bias, y);
}

}  // extern "C"
