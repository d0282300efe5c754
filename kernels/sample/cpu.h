// Gumbel-max sampling on a CPU, with the noise of noise.py beside this file.
namespace euryale {
namespace EURYALE_ISA {
namespace gumbel {

typedef uint64_t vlong __attribute__((vector_size(W * 8)));

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, MIX_1 = 0xBF58476D1CE4E5B9, MIX_2 = 0x94D049BB133111EB;

// Noise of the tokens `id` to id + W under a key.
inline vfloat noise(uint64_t key, uint64_t id) {
    vlong z;
    for (int i = 0; i < W; ++i) z[i] = id + i + 1;
    z = z * GOLDEN + key;
    z = (z ^ z >> 30) * MIX_1;
    z = (z ^ z >> 27) * MIX_2;
    const vuint bits = __builtin_convertvector((z ^ z >> 31) >> 32, vuint);
    vfloat u = (__builtin_convertvector(bits, vfloat) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
    const float last = 1 - 5.9604644775390625e-8f;                                        // 1 - 2^-24
    u = select(u < last, u, broadcast(last));
    // -log1p(-u): the logarithm of 1 - u as rounded, corrected for the rounding.
    const vfloat rest = 1.0f - u, lost = rest - 1.0f;
    const vfloat e = select(lost == 0.0f, u, logarithm(rest) * (u / select(lost == 0.0f, broadcast(1), lost)));
    return -logarithm(e);
}

template <class T>
void row(const T* logits, int64_t valid, int64_t offset, float temperature, uint64_t key, float* value, int32_t* id) {
    vfloat top = broadcast(-INFINITY);
    vint where = {};
    const auto offer = [&](int64_t c, vfloat score) {
        const vint above = score > top;
        top = select(above, score, top);
        where = (above & (int32_t)(c / W)) | (~above & where);
    };
    int64_t c = 0;
    for (; c + W <= valid; c += W) offer(c, load(logits + c) / temperature + noise(key, c + offset));
    if (c < valid) {
        vfloat last = broadcast(-INFINITY);
        for (int64_t i = c; i < valid; ++i) last[i - c] = to_float(logits[i]);
        offer(c, last / temperature + noise(key, c + offset));
    }
    *value = largest(top);
    int64_t first = INT64_MAX;
    for (int i = 0; i < W; ++i)
        if (top[i] == *value) first = std::min(first, (int64_t)where[i] * W + i);
    *id = (int32_t)(first == INT64_MAX || !valid ? 0 : first + offset);
}

template <class T>
void run(int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t offset, const T* logits,
         const float* temperature, const uint64_t* keys, float* values, int32_t* ids) {
    parallel_for(rows * valid > top::MANY / 16 ? threads : 1, rows, [&](int64_t r) {
        if (temperature[r] > 0)
            row(logits + r * width, valid, offset, temperature[r], keys[r], values + r, ids + r);
        else
            top::row(logits + r * width, valid, offset, top::Best(values + r, ids + r, 1));
    });
}

}  // namespace gumbel

void sample(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t offset,
            const void* logits, const float* temperature, const int64_t* keys, float* values, int32_t* ids) {
    const uint64_t* k = (const uint64_t*)keys;
    if (is_bfloat16)
        gumbel::run(threads, rows, width, valid, offset, (const bfloat16*)logits, temperature, k, values, ids);
    else
        gumbel::run(threads, rows, width, valid, offset, (const float*)logits, temperature, k, values, ids);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
