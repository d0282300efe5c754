// One block of keys for the query rows of an item: scores, online softmax, weighted values.
//
// Products use words of 32 bits: one float32 or two bfloat16 numbers (vector.h). Scores sum over words of a key's
// components: as dot products for few rows; from transposed keys for many rows, so that a vector holds many keys and
// needs no sums across lanes. Weighted values sum over words of keys, for which bfloat16 values are paired first.
// Weights are rounded to the type of the values.
//
// Loops over accumulators are flat and unrolled by a pragma: the compiler keeps accumulators in registers only if no
// index remains.
namespace euryale {
namespace EURYALE_ISA {
namespace attention {

constexpr int KEYS = 4 * W;              // of a block
constexpr int TILE = W == 16 ? 6 : 3;    // rows that share one load of a vector
constexpr int QUERY_BLOCK = 64;          // query rows of an item
constexpr int SLICE = 64;                // words of the keys that are transposed at a time
constexpr int FEW = 8;                   // query rows up to which scores are dot products
constexpr float NEVER = -3e38f;          // score of a masked key
constexpr float LOWEST = -1e30f;         // below the scores of visible keys, far above NEVER

// Addresses of rows of keys and values.
template <class T>
struct Rows {
    const T *keys[KEYS], *values[KEYS];
    int count = 0, in_context = 0;
};

// Prefetches the rows of the next block, a few at a time, so that memory and arithmetic overlap.
template <class T>
struct Ahead {
    const Rows<T>& rows;
    const int64_t bytes;
    int key = 0, value = 0;

    void keys_until(int64_t end) {
        for (; key < std::min<int64_t>(end, rows.count); ++key) ask(rows.keys[key]);
    }
    void values_until(int64_t end) {
        for (; value < std::min<int64_t>(end, rows.count); ++value) ask(rows.values[value]);
    }
    void ask(const T* row) const {
        for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch((const char*)row + c, 0, 2);
    }
};

// Query rows, scores and running results of one item; `width` of Block.
struct Workspace {
    std::vector<float> memory;
    float *q, *k, *v, *p, *o, *m, *l, *decay;  // q, k, v and the weights in p have the type of the values
    explicit Workspace(int64_t width) {
        const int64_t rows = QUERY_BLOCK;
        memory.resize(2 * rows * width + SLICE * KEYS + KEYS * width + rows * KEYS + 3 * rows + 16);
        q = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);  // a vector in one cache line
        o = q + rows * width;
        k = o + rows * width;
        v = k + SLICE * KEYS;
        p = v + KEYS * width;
        m = p + rows * KEYS;
        l = m + rows;
        decay = l + rows;
    }
};

// T: type of queries, keys and values.
template <class T>
struct Block {
    static constexpr int PER = 4 / sizeof(T);  // numbers of a word
    using Words = decltype(load_words((const T*)nullptr));

    const int64_t dim;
    const float scale;  // of scores, for powers of two
    const int64_t width = (dim + PER * W - 1) / (PER * W) * (PER * W);  // `dim` filled up to whole vectors of words

    // Words from component c of a row on, zeros beyond its end.
    Words part(const T* row, int64_t c) const {
        if (c + PER * W <= dim) return load_words(row + c);
        Words words = {};
        if (dim - c == PER * W / 2)  // without a call: bfloat16 heads of 80
            std::memcpy(&words, row + c, sizeof words / 2);
        else if (c < dim)
            std::memcpy(&words, row + c, (dim - c) * sizeof(T));
        return words;
    }

    // Calls f(row, std::integral_constant of the number of rows) for tiles of rows.
    template <class F>
    static void for_tiles(int64_t rows, const F& f) {
        for (int64_t r = 0; r < rows; r += TILE) switch (std::min<int64_t>(TILE, rows - r)) {
                case 1: f(r, std::integral_constant<int, 1>{}); break;
                case 2: f(r, std::integral_constant<int, 2>{}); break;
                case 3: f(r, std::integral_constant<int, 3>{}); break;
                case 4: f(r, std::integral_constant<int, TILE < 4 ? 1 : 4>{}); break;
                case 5: f(r, std::integral_constant<int, TILE < 5 ? 1 : 5>{}); break;
                default: f(r, std::integral_constant<int, TILE>{});
            }
    }

    // p[r][j] = q[r] . keys[j], lane by lane; the lanes of W products are then added up together.
    template <int ROWS>
    void scores_of_few(Workspace& w, int64_t r0, const Rows<T>& now, Ahead<T>& ahead) const {
        constexpr int NUM = W / ROWS;
        const T* q = (const T*)w.q + r0 * width;
        for (int j0 = 0; j0 < now.count; j0 += NUM) {
            const T* k[NUM];
            for (int i = 0; i < NUM; ++i) k[i] = now.keys[std::min(j0 + i, now.count - 1)];
            vfloat acc[W], products[W];
#pragma GCC unroll 32
            for (int n = 0; n < W; ++n) acc[n] = vfloat{};
            for (int64_t c = 0; c < dim; c += PER * W) {
                Words key[NUM];
                for (int i = 0; i < NUM; ++i) key[i] = part(k[i], c);
#pragma GCC unroll 32
                for (int n = 0; n < W; ++n)
                    acc[n] = add_products(acc[n], key[n % NUM], load_words(q + n / NUM * width + c));
            }
            // A copy, for what has an address leaves the registers.
#pragma GCC unroll 32
            for (int n = 0; n < W; ++n) products[n] = acc[n];
            float sums[W];
            store(sums, fold_lanes<sum>(products));
            for (int r = 0; r < ROWS; ++r) std::memcpy(w.p + (r0 + r) * KEYS + j0, sums + r * NUM, NUM * sizeof(float));
            ahead.keys_until(j0 + NUM);
        }
    }

    // The same for many rows, SLICE words of the keys at a time.
    void scores_of_many(Workspace& w, int64_t rows, const Rows<T>& now, Ahead<T>& ahead) const {
        for (int64_t c0 = 0; c0 < dim; c0 += SLICE * PER) {
            const int64_t num_words = std::min<int64_t>(SLICE, (dim - c0 + PER - 1) / PER);
            for (int64_t s0 = 0; s0 < num_words; s0 += W)
                for (int j0 = 0; j0 < KEYS; j0 += W) {
                    vfloat lanes[W];
                    for (int j = 0; j < W; ++j)
                        lanes[j] = j0 + j < now.count ? (vfloat)part(now.keys[j0 + j], c0 + s0 * PER) : vfloat{};
                    transpose(lanes);
                    for (int s = 0; s < W; ++s) store(w.k + (s0 + s) * KEYS + j0, lanes[s]);
                }
            for_tiles(rows, [&](int64_t r0, auto tile) {
                constexpr int ROWS = decltype(tile)::value;
                const T* q = (const T*)w.q + r0 * width + c0;
                float* p = w.p + r0 * KEYS;
                vfloat acc[ROWS * 4];
#pragma GCC unroll 32
                for (int n = 0; n < ROWS * 4; ++n) acc[n] = c0 ? load(p + n * W) : vfloat{};
                for (int64_t s = 0; s < num_words; ++s) {
                    Words key[4];
                    for (int i = 0; i < 4; ++i) key[i] = (Words)load(w.k + s * KEYS + i * W);
#pragma GCC unroll 32
                    for (int n = 0; n < ROWS * 4; ++n)
                        acc[n] = add_products(acc[n], key[n % 4], spread_word(q + n / 4 * width + s * PER));
                }
#pragma GCC unroll 32
                for (int n = 0; n < ROWS * 4; ++n) store(p + n * W, acc[n]);
                ahead.keys_until((r0 + ROWS) * KEYS / rows);
            });
        }
    }

    // Scores to weights, in place, of up to W rows; their maxima and sums move on, what they held decays.
    void soften(Workspace& w, int64_t r0, int64_t rows) const {
        vfloat tops[W], sums[W];
        for (int64_t r = rows; r < W; ++r) tops[r] = sums[r] = vfloat{};
        for (int64_t r = 0; r < rows; ++r) {
            const float* p = w.p + (r0 + r) * KEYS;
            tops[r] = larger(larger(load(p), load(p + W)), larger(load(p + 2 * W), load(p + 3 * W)));
        }
        const vfloat before = load(w.m + r0), after = larger(before, fold_lanes<larger>(tops) * scale);
        const vfloat decay = power_of_two(before - after);
        store(w.m + r0, after);
        store(w.decay + r0, decay);
        for (int64_t r = 0; r < rows; ++r) {
            const float* p = w.p + (r0 + r) * KEYS;
            T* weights = (T*)p;
            const float top = w.m[r0 + r];
            vfloat total = {};
            for (int i = 0; i < 4; ++i) {
                const vfloat weight = power_of_two(load(p + i * W) * scale - top);
                total += weight;
                store(weights + i * W, weight);
            }
            sums[r] = total;
        }
        store(w.l + r0, load(w.l + r0) * decay + fold_lanes<sum>(sums));
    }

    // Words s of the values, PER keys in each, N vectors from c on. Of bfloat16 two vectors have the even components
    // first and then the odd ones, and so will their weighted sums. Of float32 only one taken alone may be cut short.
    template <int N>
    void take(const Rows<T>& now, int s, int64_t c, Words* words) const {
        const T *first = now.values[s * PER], *second = now.values[std::min(s * PER + 1, now.count - 1)];
        for (int i = 0; i < N; i += PER) {
            const Words a = PER == 1 && N > 1 ? load_words(first + c + i * W) : part(first, c + i * W);
            if constexpr (PER == 1) {
                words[i] = a;
            } else {
                const Words b = part(second, c + i * W);  // beyond the last: any, its weight is 0
                words[i] = (a & 0xffffu) | (b << 16);
                words[i + 1] = (a >> 16) | (b & 0xffff0000u);
            }
        }
    }

    // All words of the values, one after the other, so that many tiles need not pair them again.
    void lay_out(Workspace& w, const Rows<T>& now) const {
        for (int s = 0; s * PER < now.count; ++s)
            for (int64_t c = 0; c < width; c += PER * W) {
                Words words[PER];
                take<PER>(now, s, c, words);
                for (int i = 0; i < PER; ++i) store_words((T*)w.v + (s * width + c + i * W) * PER, words[i]);
            }
    }

    // o[r] = o[r] * decay[r] + weights[r] . values, N vectors from c on; a tile that is alone asks for the next values.
    template <bool ALONE, int ROWS, int N>
    void accumulate(Workspace& w, int64_t r0, int64_t c, const Rows<T>& now, Ahead<T>& ahead) const {
        float* o = w.o + r0 * width + c;
        const float* p = w.p + r0 * KEYS;
        vfloat acc[ROWS * N];
#pragma GCC unroll 32
        for (int n = 0; n < ROWS * N; ++n) acc[n] = load(o + n / N * width + n % N * W) * w.decay[r0 + n / N];
        for (int s = 0; s * PER < now.count; ++s) {
            Words value[N];
            if constexpr (ALONE || PER == 1)
                take<N>(now, s, c, value);
            else
                for (int i = 0; i < N; ++i) value[i] = load_words((const T*)w.v + (s * width + c + i * W) * PER);
            if constexpr (ALONE) ahead.values_until((s + 1) * PER);
#pragma GCC unroll 32
            for (int n = 0; n < ROWS * N; ++n)
                acc[n] = add_products(acc[n], value[n % N], spread_word((const T*)(p + n / N * KEYS) + s * PER));
        }
#pragma GCC unroll 32
        for (int n = 0; n < ROWS * N; ++n) store(o + n / N * width + n % N * W, acc[n]);
    }

    template <bool ALONE, int ROWS>
    void accumulate_all(Workspace& w, int64_t r0, const Rows<T>& now, Ahead<T>& ahead) const {
        const int64_t end = PER == 1 ? dim : width;
        int64_t c = 0;
        for (; c + 4 * W <= end; c += 4 * W) accumulate<ALONE, ROWS, 4>(w, r0, c, now, ahead);
        for (; c + 2 * W <= end; c += 2 * W) accumulate<ALONE, ROWS, 2>(w, r0, c, now, ahead);
        if constexpr (PER == 1)
            for (; c < end; c += W) accumulate<ALONE, ROWS, 1>(w, r0, c, now, ahead);
    }

    // A row of weighted values, times `factor`, to `dim` numbers in their order.
    void write(const float* o, float factor, T* to) const {
        for (int64_t c = 0; c < dim; c += PER * W) {
            Words words;
            if constexpr (PER == 1)
                words = load(o + c) * factor;
            else
                words = to_words(load(o + c) * factor, load(o + c + W) * factor);
            std::memcpy(to + c, &words, std::min<int64_t>(PER * W, dim - c) * sizeof(T));
        }
    }

    // One block of keys against all rows of the item. `hide(query row, scores)` masks a row.
    template <class Hide>
    void attend(Workspace& w, int64_t rows, const Rows<T>& now, const Rows<T>& next, const Hide& hide) const {
        Ahead<T> ahead{next, dim * (int64_t)sizeof(T)};
        if (rows > FEW)
            scores_of_many(w, rows, now, ahead);
        else if (rows == 1)
            scores_of_few<1>(w, 0, now, ahead);
        else if (rows == 2)
            scores_of_few<2>(w, 0, now, ahead);
        else
            for (int64_t r0 = 0; r0 < rows; r0 += 4) scores_of_few<4>(w, r0, now, ahead);
        for (int64_t r = 0; r < rows; ++r) {
            float* p = w.p + r * KEYS;
            for (int j = now.count; j < KEYS; ++j) p[j] = NEVER;
            hide(r, p);
        }
        for (int64_t r0 = 0; r0 < rows; r0 += W) soften(w, r0, std::min<int64_t>(W, rows - r0));
        if (PER > 1 && rows > TILE) lay_out(w, now);
        for_tiles(rows, [&](int64_t r0, auto tile) {
            constexpr int ROWS = decltype(tile)::value;
            if (ROWS == rows)
                accumulate_all<true, ROWS>(w, r0, now, ahead);
            else
                accumulate_all<false, ROWS>(w, r0, now, ahead);
            ahead.values_until((r0 + ROWS) * KEYS / rows);
        });
    }
};

}  // namespace attention
}  // namespace EURYALE_ISA
}  // namespace euryale
