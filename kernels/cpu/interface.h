// The C interface of the library; what each does is said where it is defined.
#pragma once
#include <cstdint>

#include "ops.h"

struct EuryaleGroup;  // a rank's end of the shared memory (parallel/shared_memory.cpp)

extern "C" {

const char* euryale_signature(const char* name);
const char* euryale_instruction_set();
int euryale_use(const char* name);
void euryale_tree_attention(const euryale::Step* step, const euryale::Attention* shape, const void* q,
                            const void* step_k, const void* step_v, const void* cache_k, const void* cache_v,
                            void* out);
void euryale_rope_qk(int64_t is_bfloat16, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, void* qkv,
                     const int64_t* positions, const void* cos, const void* sin, void* step_k, void* step_v,
                     const void* q_norm, const void* k_norm, float eps);
void euryale_add_rms_norm(int64_t is_bfloat16, int64_t rows, int64_t width, const void* x, const void* residual,
                          const void* weight, float eps, void* normed, void* sum);
void euryale_silu_mul(int64_t is_bfloat16, int64_t rows, int64_t width, const void* gate_up, void* out);
void euryale_add_silu(int64_t is_bfloat16, int64_t parts, int64_t rows, int64_t part, int64_t width, const void* y,
                      void* x);
void euryale_take_rows(int64_t count, int64_t repeat, int64_t size, int64_t table_rows, int64_t offset,
                       const char* table, const int32_t* rows, char* out);
void euryale_top_k(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t k,
                   int64_t offset, const void* x, float* values, int32_t* ids);
void euryale_merge_top_k(int64_t num_parts, int64_t rows, int64_t k, const int32_t* parts, int32_t* out);
void euryale_sample(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t offset,
                    const void* logits, const float* temperature, const int64_t* keys, float* values, int32_t* ids);
int64_t euryale_linear_size(int64_t is_bfloat16, int64_t in, int64_t out);
void euryale_linear_pack(int64_t is_bfloat16, int64_t in, int64_t out, const void* weight, void* packed);
void euryale_linear_run(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t in, int64_t out, const void* x,
                        const void* packed, const void* bias, void* y);
void euryale_quantized_run(int64_t is_bfloat16, int64_t bits, int64_t group, int64_t threads, int64_t rows, int64_t in,
                           int64_t out, const void* x, const void* packed, const void* bias, void* y);
void euryale_accept(const euryale::Step* step, const int64_t* parent_rows, const int64_t* depths, const int64_t* slots,
                    const int32_t* tokens, const int32_t* next_tokens, const int8_t* good, const float* scores,
                    int32_t* last, int64_t* kept);
void euryale_commit(int64_t layers, int64_t pages, int64_t heads, int64_t page, int64_t scratch_rows, int64_t size,
                    char* cache, const char* scratch, int64_t rows, const int64_t* slots);
int64_t euryale_shared_bytes(int64_t size, int64_t capacity);
EuryaleGroup* euryale_shared_attach(int fd, void* memory, int64_t rank, int64_t size, int64_t capacity,
                                    int64_t timeout_ns, int64_t may_spin);
void euryale_shared_detach(EuryaleGroup* group);
int euryale_shared_all_reduce(EuryaleGroup* group, int64_t is_bfloat16, int64_t count, void* data);
int euryale_shared_all_reduce_add_rms_norm(EuryaleGroup* group, int64_t is_bfloat16, int64_t rows, int64_t width,
                                           void* share, const void* residual, const void* weight, float eps,
                                           void* normed);
int euryale_shared_all_gather(EuryaleGroup* group, int64_t bytes, const void* data, void* out);
int euryale_shared_broadcast(EuryaleGroup* group, int64_t root, int64_t bytes, void* data);
int64_t euryale_recordable(const char* name);
const char* euryale_recordable_name(int64_t place);
int euryale_replay(const int64_t* words, int64_t count);
int euryale_replay_timed(const int64_t* words, int64_t count, int64_t* nanoseconds);

}  // extern "C"
