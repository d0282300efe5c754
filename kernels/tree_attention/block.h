// One block of keys against the query rows of an item: scores, softmax so far, weighted values.
//
// Scores of few rows are plain dot products; for many a slice of keys is transposed first, so that a vector holds many
// keys and no sums across lanes are left. Values are read where they lie.
namespace euryale {
namespace EURYALE_ISA {
namespace attention {

constexpr int KEYS = 4 * W;              // of a block
constexpr int TILE = W == 16 ? 6 : 3;    // rows that share one load of a vector
constexpr int QUERY_BLOCK = 60;          // query rows of an item, whole tiles
constexpr int FEW = 8;                   // query rows up to which scores are dot products
constexpr int DOT_KEYS = W == 4 ? 2 : 4, DOT_ROWS = W / DOT_KEYS;
constexpr float NEVER = -3e38f;          // score of what is not seen

// Query rows, scores and running results of one item, float32.
struct Workspace {
    std::vector<float> memory;
    float *q, *k, *p, *o, *m, *l, *decay;
    explicit Workspace(int64_t width) {
        const int64_t rows = QUERY_BLOCK;
        memory.resize(2 * rows * width + W * KEYS + rows * KEYS + 3 * rows);
        q = memory.data();
        o = q + rows * width;
        k = o + rows * width;
        p = k + W * KEYS;
        m = p + rows * KEYS;
        l = m + rows;
        decay = l + rows;
    }
};

// T: type of keys and values; `width`: `dim` filled up to whole vectors.
template <class T>
struct Block {
    int64_t dim, width;

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
    void scores_of_few(Workspace& w, int64_t rows, const T* const* keys, int count) const {
        const int64_t whole = dim / W * W;
        for (int j0 = 0; j0 < count; j0 += DOT_KEYS) {
            const T* k[DOT_KEYS];
            for (int i = 0; i < DOT_KEYS; ++i) k[i] = keys[std::min(j0 + i, count - 1)];
            for (int64_t r0 = 0; r0 < rows; r0 += DOT_ROWS) {
                vfloat acc[W] = {};
                const float* q_tile = w.q + r0 * width;
                for (int64_t c = 0; c < whole; c += W) {
                    vfloat key[DOT_KEYS];
                    for (int i = 0; i < DOT_KEYS; ++i) key[i] = load(k[i] + c);
                    for (int r = 0; r < DOT_ROWS; ++r) {
                        const vfloat query = load(q_tile + r * width + c);
                        for (int i = 0; i < DOT_KEYS; ++i) acc[r * DOT_KEYS + i] += query * key[i];
                    }
                }
                float sums[W];
                store(sums, add_lanes(acc));
                for (int r = 0; r < DOT_ROWS; ++r) {
                    for (int i = 0; i < DOT_KEYS && whole < dim; ++i)
                        for (int64_t c = whole; c < dim; ++c)
                            sums[r * DOT_KEYS + i] += q_tile[r * width + c] * to_float(k[i][c]);
                    std::memcpy(w.p + (r0 + r) * KEYS + j0, sums + r * DOT_KEYS, DOT_KEYS * sizeof(float));
                }
            }
        }
    }

    // The same for many rows, W components of the keys at a time.
    void scores_of_many(Workspace& w, int64_t rows, const T* const* keys, int count) const {
        for (int64_t c0 = 0; c0 < width; c0 += W) {
            for (int j0 = 0; j0 < KEYS; j0 += W) {
                vfloat lanes[W];
                for (int j = 0; j < W; ++j) lanes[j] = j0 + j < count ? part(keys[j0 + j], c0) : vfloat{};
                transpose(lanes);
                for (int c = 0; c < W; ++c) store(w.k + c * KEYS + j0, lanes[c]);
            }
            for_tiles(rows, [&](int64_t r0, auto tile) {
                constexpr int ROWS = decltype(tile)::value;
                float* p = w.p + r0 * KEYS;
                vfloat acc[ROWS][4];
                for (int r = 0; r < ROWS; ++r)
                    for (int i = 0; i < 4; ++i) acc[r][i] = c0 ? load(p + r * KEYS + i * W) : vfloat{};
                for (int c = 0; c < W; ++c) {
                    vfloat key[4];
                    for (int i = 0; i < 4; ++i) key[i] = load(w.k + c * KEYS + i * W);
                    for (int r = 0; r < ROWS; ++r)
                        for (int i = 0; i < 4; ++i) acc[r][i] += w.q[(r0 + r) * width + c0 + c] * key[i];
                }
                for (int r = 0; r < ROWS; ++r)
                    for (int i = 0; i < 4; ++i) store(p + r * KEYS + i * W, acc[r][i]);
            });
        }
    }

    // Components c to c + W of a row, zeros beyond its end.
    vfloat part(const T* row, int64_t c) const {
        if (c + W <= dim) return load(row + c);
        vfloat lanes = {};
        for (int64_t i = c; i < dim; ++i) lanes[i - c] = to_float(row[i]);
        return lanes;
    }

    // o[r] = o[r] * decay[r] + p[r] . values, for N vectors of components from c on.
    template <int ROWS, int N>
    void accumulate(Workspace& w, int64_t r0, const T* const* values, int64_t c, int count) const {
        float* o = w.o + r0 * width + c;
        const float* p = w.p + r0 * KEYS;
        vfloat acc[ROWS][N];
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < N; ++i) acc[r][i] = load(o + r * width + i * W) * w.decay[r0 + r];
        for (int j = 0; j < count; ++j) {
            vfloat value[N];
            for (int i = 0; i < N; ++i) value[i] = N == 1 ? part(values[j], c) : load(values[j] + c + i * W);
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < N; ++i) acc[r][i] += p[r * KEYS + j] * value[i];
        }
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < N; ++i) store(o + r * width + i * W, acc[r][i]);
    }

    // Scores to weights, in place; the row's maximum and sum move on, what it held decays.
    void soften(float* p, float& m, float& l, float& decay) const {
        vfloat s[4], top = broadcast(m);
        for (int i = 0; i < 4; ++i) top = larger(top, s[i] = load(p + i * W));
        const float now = largest(top);
        vfloat total = {};
        for (int i = 0; i < 4; ++i) {
            const vfloat weight = select(s[i] > NEVER / 2, exponential(s[i] - now), vfloat{});
            total += weight;
            store(p + i * W, weight);
        }
        decay = exponential(broadcast(m - now))[0];
        l = l * decay + sum(total);
        m = now;
    }

    // One block of keys against all rows of the item. `hide(query row, scores)` masks a row.
    template <class Hide>
    void attend(Workspace& w, int64_t rows, const T* const* keys, const T* const* values, int count,
               const Hide& hide) const {
        if (rows <= FEW)
            scores_of_few(w, rows, keys, count);
        else
            scores_of_many(w, rows, keys, count);
        for (int64_t r = 0; r < rows; ++r) {
            float* p = w.p + r * KEYS;
            for (int j = count; j < KEYS; ++j) p[j] = NEVER;
            hide(r, p);
            soften(p, w.m[r], w.l[r], w.decay[r]);
        }
        for_tiles(rows, [&](int64_t r0, auto tile) {
            constexpr int ROWS = decltype(tile)::value;
            int64_t c = 0;
            for (; c + 4 * W <= dim; c += 4 * W) accumulate<ROWS, 4>(w, r0, values, c, count);
            for (; c + 2 * W <= dim; c += 2 * W) accumulate<ROWS, 2>(w, r0, values, c, count);
            for (; c < dim; c += W) accumulate<ROWS, 1>(w, r0, values, c, count);
        });
    }
};

}  // namespace attention
}  // namespace EURYALE_ISA
}  // namespace euryale
