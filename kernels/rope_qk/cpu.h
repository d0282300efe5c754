// Rotary embedding on a CPU: rotates queries in place, writes rotated keys and values to the step's scratch.
namespace euryale {
namespace EURYALE_ISA {
namespace rope {

// `from` and `to` may be the same head. The optional norm comes first.
template <class T>
void turn(const T* from, T* to, const T* cos, const T* sin, const T* norm, int64_t dim, float eps) {
    const int64_t half = dim / 2;
    float scale = 1;
    if (norm) {
        float squares = 0;
        for (int64_t c = 0; c < dim; ++c) squares += to_float(from[c]) * to_float(from[c]);
        scale = 1 / std::sqrt(squares / dim + eps);
    }
    int64_t c = 0;
    for (; c + W <= half; c += W) {
        vfloat a = load(from + c), b = load(from + half + c);
        if (norm) {
            a *= scale * load(norm + c);
            b *= scale * load(norm + half + c);
        }
        const vfloat x = load(cos + c), y = load(sin + c);
        store(to + c, a * x - b * y);
        store(to + half + c, b * x + a * y);
    }
    for (; c < half; ++c) {
        float a = to_float(from[c]), b = to_float(from[half + c]);
        if (norm) {
            a *= scale * to_float(norm[c]);
            b *= scale * to_float(norm[half + c]);
        }
        const float x = to_float(cos[c]), y = to_float(sin[c]);
        from_float(to + c, a * x - b * y);
        from_float(to + half + c, b * x + a * y);
    }
}

template <class T>
void run(int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, T* qkv, const int64_t* positions, const T* cos,
         const T* sin, T* step_k, T* step_v, const T* q_norm, const T* k_norm, float eps) {
    for (int64_t r = 0; r < rows; ++r) {
        T* row = qkv + r * (heads + 2 * kv_heads) * dim;
        const T *x = cos + positions[r] * (dim / 2), *y = sin + positions[r] * (dim / 2);
        for (int64_t h = 0; h < heads; ++h) turn(row + h * dim, row + h * dim, x, y, q_norm, dim, eps);
        const T *k = row + heads * dim, *v = k + kv_heads * dim;
        for (int64_t h = 0; h < kv_heads; ++h)
            turn(k + h * dim, step_k + (r * kv_heads + h) * dim, x, y, k_norm, dim, eps);
        std::memcpy(step_v + r * kv_heads * dim, v, kv_heads * dim * sizeof(T));
    }
}

}  // namespace rope

void rope_qk(int64_t is_bfloat16, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, void* qkv,
             const int64_t* positions, const void* cos, const void* sin, void* step_k, void* step_v,
             const void* q_norm, const void* k_norm, float eps) {
    if (is_bfloat16)
        rope::run(rows, heads, kv_heads, head_dim, (bfloat16*)qkv, positions, (const bfloat16*)cos,
                  (const bfloat16*)sin, (bfloat16*)step_k, (bfloat16*)step_v, (const bfloat16*)q_norm,
                  (const bfloat16*)k_norm, eps);
    else
        rope::run(rows, heads, kv_heads, head_dim, (float*)qkv, positions, (const float*)cos, (const float*)sin,
                  (float*)step_k, (float*)step_v, (const float*)q_norm, (const float*)k_norm, eps);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
