// The C interface that kernels/cpu/__init__.py calls: it picks the widest instruction set that the CPU has, once.
#include <cstring>

#include "dispatch.h"
#include "std.h"

namespace {

const euryale::Ops* best(const char** name) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return *name = "avx512", &euryale::avx512_ops;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *name = "avx2", &euryale::avx2_ops;
#endif
    return *name = "baseline", &euryale::baseline_ops;
}

const char* chosen;
const euryale::Ops* ops = best(&chosen);

}  // namespace

const euryale::Ops* euryale::kernels() { return ops; }

extern "C" {

const char* euryale_instruction_set() { return chosen; }

// For tests: use a narrower set than the best. 0 if this CPU has none of that name.
int euryale_use(const char* name) {
    const char* widest;
    const euryale::Ops* found = best(&widest);
#ifdef __x86_64__
    if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found = &euryale::avx2_ops, widest = "avx2";
#endif
    if (!std::strcmp(name, "baseline")) found = &euryale::baseline_ops, widest = "baseline";
    if (std::strcmp(name, widest)) return 0;
    ops = found;
    chosen = widest;
    return 1;
}

void euryale_tree_attention(const euryale::Step* step, const euryale::Attention* shape, const void* q,
                            const void* step_k, const void* step_v, const void* cache_k, const void* cache_v,
                            void* out) {
    ops->tree_attention(step, shape, q, step_k, step_v, cache_k, cache_v, out);
}

void euryale_rope_qk(int64_t is_bfloat16, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, void* qkv,
                     const int64_t* positions, const void* cos, const void* sin, void* step_k, void* step_v,
                     const void* q_norm, const void* k_norm, float eps) {
    ops->rope_qk(is_bfloat16, rows, heads, kv_heads, head_dim, qkv, positions, cos, sin, step_k, step_v, q_norm,
                 k_norm, eps);
}

void euryale_add_rms_norm(int64_t is_bfloat16, int64_t rows, int64_t width, const void* x, const void* residual,
                          const void* weight, float eps, void* normed, void* sum) {
    ops->add_rms_norm(is_bfloat16, rows, width, x, residual, weight, eps, normed, sum);
}

void euryale_silu_mul(int64_t is_bfloat16, int64_t rows, int64_t width, const void* gate_up, void* out) {
    ops->silu_mul(is_bfloat16, rows, width, gate_up, out);
}

// Rows of the step's scratch [layers, 2, scratch_rows, heads, dim] into the cache [layers, 2, pages, heads, page,
// dim]; `size` bytes of one head's row.
void euryale_commit(int64_t layers, int64_t pages, int64_t heads, int64_t page, int64_t scratch_rows, int64_t size,
                    char* cache, const char* scratch, int64_t count, const int64_t* rows, const int64_t* slots) {
    for (int64_t plane = 0; plane < 2 * layers; ++plane) {
        char* to = cache + plane * pages * heads * page * size;
        const char* from = scratch + plane * scratch_rows * heads * size;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t h = 0; h < heads; ++h)
                std::memcpy(to + ((slots[i] / page * heads + h) * page + slots[i] % page) * size,
                            from + (rows[i] * heads + h) * size, size);
    }
}

}  // extern "C"
