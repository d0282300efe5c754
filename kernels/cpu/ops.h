// The CPU kernels by name: what every instruction set's file implements and dispatch.cpp chooses from.
#pragma once
#include <cstdint>

namespace euryale {

// One step's geometry (kernels/geometry.py) as plain arrays; B segments, R rows.
struct Step {
    int64_t num_segments, page_size, num_threads;
    const int64_t* row_starts;    // [B + 1]
    const int64_t* num_new_tokens;   // [B]
    const int64_t* contexts;      // [B]
    const int64_t* page_starts;   // [B], where a segment's pages begin in `pages`
    const int32_t* pages;
    const int64_t* positions;     // [R]
    const uint64_t* ancestors;    // [R, 2], bits of the tree's nodes; rows of known tokens: unused
};

// Shapes and strides of attention, in elements.
struct Attention {
    int64_t is_bfloat16, heads, kv_heads, head_dim;
    int64_t q_stride;       // from row to row of the queries
    int64_t window;         // 0: none
    float scale;
};

struct Ops {
    void (*tree_attention)(const Step*, const Attention*, const void* q, const void* step_k, const void* step_v,
                           const void* cache_k, const void* cache_v, void* out);
    void (*rope_qk)(int64_t is_bfloat16, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, void* qkv,
                    const int64_t* positions, const void* cos, const void* sin, void* step_k, void* step_v,
                    const void* q_norm, const void* k_norm, float eps);
    void (*add_rms_norm)(int64_t is_bfloat16, int64_t rows, int64_t width, const void* x, const void* residual,
                         const void* weight, float eps, void* normed, void* sum);
    void (*silu_mul)(int64_t is_bfloat16, int64_t rows, int64_t width, const void* gate_up, void* out);
    void (*add_silu)(int64_t is_bfloat16, int64_t parts, int64_t rows, int64_t part, int64_t width, const void* y,
                     void* x);
    void (*top_k)(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t k,
                  int64_t offset, const void* x, float* values, int32_t* ids);
    void (*merge_top_k)(int64_t num_parts, int64_t rows, int64_t k, const int32_t* parts, int32_t* out);
    void (*sample)(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t offset,
                   const void* logits, const float* temperature, const int64_t* keys, float* values, int32_t* ids);
    int64_t (*linear_panel)();  // outputs of a panel: packed weights take whole panels
    void (*linear_pack)(int64_t is_bfloat16, int64_t in, int64_t out, const void* weight, void* packed);
    void (*linear_run)(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t in, int64_t out, const void* x,
                       const void* packed, const void* bias, void* y);
    void (*quantized_run)(int64_t is_bfloat16, int64_t bits, int64_t group, int64_t threads, int64_t rows, int64_t in,
                          int64_t out, const void* x, const void* packed, const void* bias, void* y);
    void (*reduce)(int64_t is_bfloat16, int64_t count, int64_t num_inputs, const void* const* inputs, void* out);
};

extern const Ops avx512_bf16_ops, avx512_ops, avx2_ops, baseline_ops;

}  // namespace euryale
