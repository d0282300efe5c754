// Tree attention on a CPU: online softmax over blocks of keys, committed pages first, then the step's own rows.
//
// Work is cut into items of (segment, kv head, block of query rows, split of the context). A query row is one head of
// one step row; the heads of a kv group lie together, so that keys are read once for all of them. Where the context is
// cut depends on the segment alone: a row's result does not depend on its neighbours or on the number of threads.
// Blocks of keys are copied as float32, keys transposed, into buffers that stay in the first-level caches.
namespace euryale {
namespace EURYALE_ISA {
namespace attention {

constexpr int KEYS = 4 * W;              // of a block
constexpr int TILE = W == 16 ? 6 : 3;    // rows that share one load of a key vector
constexpr int QUERY_BLOCK = 60;          // query rows of an item, whole tiles
constexpr int64_t SPLIT = 512;           // context of an item, where all rows of the segment are one block
constexpr float NEVER = -3e38f;          // score of what is not seen

struct Item {
    int64_t segment, kv_head, first, count;   // query rows
    int64_t begin, end;                       // context
    bool has_step;                            // the step's own rows too
    int64_t partial;                          // where its partial results go, in query rows; -1: straight to the output
};

struct Merge {
    int64_t segment, kv_head, count, partial, num_splits;
};

struct Workspace {
    std::vector<float> memory;
    float *q, *k, *v, *p, *o, *m, *l;
    explicit Workspace(int64_t width) {
        const int64_t rows = QUERY_BLOCK;
        memory.resize(rows * width * 2 + KEYS * width * 2 + rows * KEYS + 2 * rows);
        q = memory.data();
        o = q + rows * width;
        k = o + rows * width;
        v = k + KEYS * width;
        p = v + KEYS * width;
        m = p + rows * KEYS;
        l = m + rows;
    }
};

template <class T>
struct Kernel {
    const Step& step;
    const Attention& shape;
    const T *q, *step_k, *step_v, *cache_k, *cache_v;
    T* out;
    float* partials;      // [query rows][width + 2]: weighted values, maximum, sum
    const int64_t dim = shape.head_dim, width = (dim + W - 1) / W * W, group = shape.heads / shape.kv_heads;

    // Keys and values of up to KEYS rows as float32: keys transposed [width][KEYS], values [KEYS][width].
    void fetch(Workspace& w, const T* const* keys, const T* const* values, int count) const {
        const int64_t whole = dim / W * W;
        for (int j0 = 0; j0 < KEYS; j0 += W) {
            for (int64_t c = 0; c < whole; c += W) {
                vfloat lanes[W];
                for (int j = 0; j < W; ++j) lanes[j] = j0 + j < count ? load(keys[j0 + j] + c) : vfloat{};
                transpose(lanes);
                for (int j = 0; j < W; ++j) store(w.k + (c + j) * KEYS + j0, lanes[j]);
            }
            for (int64_t c = whole; c < width; ++c)
                for (int j = j0; j < j0 + W; ++j)
                    w.k[c * KEYS + j] = c < dim && j < count ? to_float(keys[j][c]) : 0;
        }
        for (int j = 0; j < KEYS; ++j) {
            float* row = w.v + j * width;
            if (j >= count) {
                for (int64_t c = 0; c < width; c += W) store(row + c, vfloat{});
                continue;
            }
            for (int64_t c = 0; c < whole; c += W) store(row + c, load(values[j] + c));
            for (int64_t c = whole; c < width; ++c) row[c] = c < dim ? to_float(values[j][c]) : 0;
        }
    }

    // Scores of a tile: p[r][j] = q[r] . k[j]
    void scores(const float* q_tile, const float* k, float* p) const {
        vfloat acc[TILE][4] = {};
        for (int64_t c = 0; c < width; ++c) {
            vfloat key[4];
            for (int i = 0; i < 4; ++i) key[i] = load(k + c * KEYS + i * W);
            for (int r = 0; r < TILE; ++r)
                for (int i = 0; i < 4; ++i) acc[r][i] += q_tile[r * width + c] * key[i];
        }
        for (int r = 0; r < TILE; ++r)
            for (int i = 0; i < 4; ++i) store(p + r * KEYS + i * W, acc[r][i]);
    }

    // o[r] = o[r] * decay[r] + p[r] . v
    template <int N>
    void accumulate(const float* p, const float* v, const float* decay, float* o, int64_t c, int count) const {
        vfloat acc[TILE][N];
        for (int r = 0; r < TILE; ++r)
            for (int i = 0; i < N; ++i) acc[r][i] = load(o + r * width + c + i * W) * decay[r];
        for (int j = 0; j < count; ++j) {
            vfloat value[N];
            for (int i = 0; i < N; ++i) value[i] = load(v + j * width + c + i * W);
            for (int r = 0; r < TILE; ++r)
                for (int i = 0; i < N; ++i) acc[r][i] += p[r * KEYS + j] * value[i];
        }
        for (int r = 0; r < TILE; ++r)
            for (int i = 0; i < N; ++i) store(o + r * width + c + i * W, acc[r][i]);
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
    void block(Workspace& w, int64_t rows, int count, const Hide& hide) const {
        for (int64_t r0 = 0; r0 < rows; r0 += TILE) {
            float* p = w.p + r0 * KEYS;
            float decay[TILE];
            scores(w.q + r0 * width, w.k, p);
            for (int r = 0; r < TILE; ++r) {
                for (int j = count; j < KEYS; ++j) p[r * KEYS + j] = NEVER;
                if (r0 + r < rows) hide(r0 + r, p + r * KEYS);
                soften(p + r * KEYS, w.m[r0 + r], w.l[r0 + r], decay[r]);
            }
            int64_t c = 0;
            float* o = w.o + r0 * width;
            for (; c + 4 * W <= width; c += 4 * W) accumulate<4>(p, w.v, decay, o, c, count);
            for (; c + 2 * W <= width; c += 2 * W) accumulate<2>(p, w.v, decay, o, c, count);
            for (; c < width; c += W) accumulate<1>(p, w.v, decay, o, c, count);
        }
    }

    int64_t row_of(const Item& item, int64_t r) const {
        return step.row_starts[item.segment] + (item.first + r) / group;
    }

    void context(Workspace& w, const Item& item) const {
        const int64_t page = step.page_size, head_size = page * dim;
        const int32_t* pages = step.pages + step.page_starts[item.segment];
        const T *keys[KEYS], *values[KEYS];
        int64_t begin = item.begin;
        if (shape.window) {  // positions rise with depth, not with the row: look at all
            int64_t lowest = INT64_MAX;
            for (int64_t r = 0; r < item.count; ++r)
                lowest = std::min(lowest, step.positions[row_of(item, r)]);
            begin = std::max(begin, std::min(item.end, lowest - shape.window + 1));
        }
        for (; begin < item.end; begin += KEYS) {
            const int count = (int)std::min<int64_t>(KEYS, item.end - begin);
            for (int j = 0; j < count; ++j) {
                const int64_t at = begin + j;
                const int64_t offset = (pages[at / page] * shape.kv_heads + item.kv_head) * head_size + at % page * dim;
                keys[j] = cache_k + offset;
                values[j] = cache_v + offset;
            }
            fetch(w, keys, values, count);
            block(w, item.count, count, [&](int64_t r, float* s) {
                if (!shape.window) return;
                const int64_t first = step.positions[row_of(item, r)] - shape.window + 1 - begin;
                for (int64_t j = 0; j < std::min<int64_t>(count, first); ++j) s[j] = NEVER;
            });
        }
    }

    bool sees(int64_t certain, int64_t start, int64_t row, int64_t column) const {
        if (column >= certain) {
            const int64_t node = column - certain + 1;
            if (row < certain || !(step.ancestors[(start + row) * 2 + node / 64] >> node % 64 & 1)) return false;
        } else if (column > row) {
            return false;
        }
        return !shape.window || step.positions[start + row] - step.positions[start + column] < shape.window;
    }

    void own_rows(Workspace& w, const Item& item) const {
        const int64_t start = step.row_starts[item.segment], certain = step.num_certain[item.segment];
        // Columns beyond the last row of the item are seen by none of them: parents come before children.
        const int64_t columns = (item.first + item.count - 1) / group + 1;
        const T *keys[KEYS], *values[KEYS];
        for (int64_t begin = 0; begin < columns; begin += KEYS) {
            const int count = (int)std::min<int64_t>(KEYS, columns - begin);
            for (int j = 0; j < count; ++j) {
                const int64_t offset = ((start + begin + j) * shape.kv_heads + item.kv_head) * dim;
                keys[j] = step_k + offset;
                values[j] = step_v + offset;
            }
            fetch(w, keys, values, count);
            block(w, item.count, count, [&](int64_t r, float* s) {
                const int64_t row = (item.first + r) / group;
                for (int j = 0; j < count; ++j)
                    if (!sees(certain, start, row, begin + j)) s[j] = NEVER;
            });
        }
    }

    void run(Workspace& w, const Item& item) const {
        const int64_t padded = (item.count + TILE - 1) / TILE * TILE;
        std::fill(w.q, w.q + padded * width, 0.0f);
        std::fill(w.o, w.o + padded * width, 0.0f);
        std::fill(w.m, w.m + padded, NEVER);
        std::fill(w.l, w.l + padded, 0.0f);
        for (int64_t r = 0; r < item.count; ++r) {
            const int64_t head = item.kv_head * group + (item.first + r) % group;
            const T* from = q + row_of(item, r) * shape.q_stride + head * dim;
            for (int64_t c = 0; c < dim; ++c) w.q[r * width + c] = to_float(from[c]) * shape.scale;
        }
        context(w, item);
        if (item.has_step) own_rows(w, item);
        for (int64_t r = 0; r < item.count; ++r) {
            const float* o = w.o + r * width;
            if (item.partial < 0) {
                write(item.segment, item.kv_head, item.first + r, o, 1 / w.l[r]);
                continue;
            }
            float* to = partials + (item.partial + r) * (width + 2);
            std::copy(o, o + width, to);
            to[width] = w.m[r];
            to[width + 1] = w.l[r];
        }
    }

    void write(int64_t segment, int64_t kv_head, int64_t query_row, const float* o, float factor) const {
        const int64_t row = step.row_starts[segment] + query_row / group, head = kv_head * group + query_row % group;
        T* to = out + (row * shape.heads + head) * dim;
        for (int64_t c = 0; c < dim; ++c) from_float(to + c, o[c] * factor);
    }

    // The splits of one query row, in their order.
    void merge(Workspace& w, const Merge& todo, int64_t r) const {
        const int64_t stride = todo.count * (width + 2);
        const float* first = partials + (todo.partial + r) * (width + 2);
        float top = NEVER, total = 0;
        for (int64_t s = 0; s < todo.num_splits; ++s) top = std::max(top, first[s * stride + width]);
        std::fill(w.o, w.o + width, 0.0f);
        for (int64_t s = 0; s < todo.num_splits; ++s) {
            const float* part = first + s * stride;
            const float factor = exponential(broadcast(part[width] - top))[0];
            total += part[width + 1] * factor;
            for (int64_t c = 0; c < width; c += W) store(w.o + c, load(w.o + c) + load(part + c) * factor);
        }
        write(todo.segment, todo.kv_head, r, w.o, 1 / total);
    }
};

inline void plan(const Step& step, const Attention& shape, std::vector<Item>& items, std::vector<Merge>& merges,
                 int64_t& num_partials) {
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t i = 0; i < step.num_segments; ++i) {
        const int64_t rows = (step.row_starts[i + 1] - step.row_starts[i]) * group, context = step.contexts[i];
        const bool is_split = rows <= QUERY_BLOCK && context > SPLIT;
        for (int64_t head = 0; head < shape.kv_heads; ++head) {
            if (!is_split) {
                for (int64_t first = 0; first < rows; first += QUERY_BLOCK)
                    items.push_back(
                        {i, head, first, std::min<int64_t>(QUERY_BLOCK, rows - first), 0, context, true, -1});
                continue;
            }
            const int64_t num_splits = (context + SPLIT - 1) / SPLIT;
            merges.push_back({i, head, rows, num_partials, num_splits});
            for (int64_t s = 0; s < num_splits; ++s, num_partials += rows)
                items.push_back({i, head, 0, rows, s * SPLIT, std::min(context, (s + 1) * SPLIT),
                                 s == num_splits - 1, num_partials});
        }
    }
}

template <class T>
void run(const Step& step, const Attention& shape, const void* q, const void* step_k, const void* step_v,
         const void* cache_k, const void* cache_v, void* out) {
    std::vector<Item> items;
    std::vector<Merge> merges;
    int64_t num_partials = 0;
    plan(step, shape, items, merges, num_partials);
    const int64_t width = (shape.head_dim + W - 1) / W * W;
    static thread_local std::vector<float> partials;
    partials.resize(num_partials * (width + 2));
    const Kernel<T> kernel{step, shape, (const T*)q, (const T*)step_k, (const T*)step_v,
                           (const T*)cache_k, (const T*)cache_v, (T*)out, partials.data()};
    const int64_t threads = std::min<int64_t>(step.num_threads, items.size());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local std::vector<Workspace> spaces;  // one, of the size last asked for
        static thread_local int64_t made_for = 0;
        if (made_for != width) {
            spaces.clear();
            spaces.emplace_back(width);
            made_for = width;
        }
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < items.size(); ++i) kernel.run(spaces[0], items[i]);
        for (const Merge& todo : merges) {
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < todo.count; ++r) kernel.merge(spaces[0], todo, r);
        }
    }
}

}  // namespace attention

void tree_attention(const Step* step, const Attention* shape, const void* q, const void* step_k, const void* step_v,
                    const void* cache_k, const void* cache_v, void* out) {
    const auto run = shape->is_bfloat16 ? attention::run<bfloat16> : attention::run<float>;
    run(*step, *shape, q, step_k, step_v, cache_k, cache_v, out);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
