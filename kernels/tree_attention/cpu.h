// Tree attention on a CPU: online softmax over blocks of keys, committed pages first, then the step's own rows.
//
// Work is cut into items of (segment, kv head, block of query rows, split of the context). A query row is one head of
// one step row; the heads of a kv group lie together, so that keys are read once for all of them. Where the context is
// cut depends on the segment alone: a row's result does not depend on its neighbours or on the number of threads.
namespace euryale {
namespace EURYALE_ISA {
namespace attention {

constexpr int64_t SPLIT = 512;  // context of an item, where all rows of the segment are one block

struct Item {
    int64_t segment, kv_head, first, count;   // query rows
    int64_t begin, end;                       // context
    bool has_step;                            // the step's own rows too
    int64_t partial;                          // where its partial results go, in query rows; -1: straight to the output
};

struct Merge {
    int64_t segment, kv_head, count, partial, num_splits;
};

template <class T>
struct Kernel {
    const Step& step;
    const Attention& shape;
    const T *q, *step_k, *step_v, *cache_k, *cache_v;
    T* out;
    float* partials;      // [query rows][width + 2]: weighted values, maximum, sum
    const int64_t dim = shape.head_dim, width = (dim + W - 1) / W * W, group = shape.heads / shape.kv_heads;
    const Block<T> block = {dim, width};

    int64_t row_of(const Item& item, int64_t r) const {
        return step.row_starts[item.segment] + (item.first + r) / group;
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

    // The first context position that some row of the item sees.
    int64_t first_seen(const Item& item) const {
        if (!shape.window) return item.begin;
        int64_t lowest = INT64_MAX;  // positions rise with depth, not with the row: look at all
        for (int64_t r = 0; r < item.count; ++r) lowest = std::min(lowest, step.positions[row_of(item, r)]);
        return std::max(item.begin, std::min(item.end, lowest - shape.window + 1));
    }

    // Pages lie anywhere: the next block's are asked for while this one is worked on.
    void prefetch(int64_t offset, int64_t count) const {
        for (int64_t c = 0; c < count; c += 64 / sizeof(T)) {
            __builtin_prefetch(cache_k + offset + c, 0, 2);
            __builtin_prefetch(cache_v + offset + c, 0, 2);
        }
    }

    // All keys of the item, block by block: of the context, then of the step. Both may share a block.
    void attend(Workspace& w, const Item& item) const {
        const int64_t start = step.row_starts[item.segment], certain = step.num_certain[item.segment];
        const int64_t page = step.page_size, head_size = page * dim;
        const int32_t* pages = step.pages + step.page_starts[item.segment];
        // Rows beyond the last of the item are seen by none of it: parents come before children.
        const int64_t end = item.end + (item.has_step ? (item.first + item.count - 1) / group + 1 : 0);
        const T *keys[KEYS], *values[KEYS];
        const int64_t ahead = (KEYS + page - 1) / page, num_pages = (item.end + page - 1) / page;
        const int64_t at = first_seen(item);
        int64_t number = at / page, inside = at % page;
        const auto page_of = [&](int64_t n) { return (pages[n] * shape.kv_heads + item.kv_head) * head_size; };
        for (int64_t begin = at; begin < end; begin += KEYS) {
            const int count = (int)std::min<int64_t>(KEYS, end - begin);
            const int in_context = (int)std::max<int64_t>(0, std::min<int64_t>(count, item.end - begin));
            for (int j = 0; j < in_context; ++j) {
                const int64_t offset = page_of(number) + inside * dim;
                keys[j] = cache_k + offset;
                values[j] = cache_v + offset;
                if (number + ahead < num_pages) prefetch(page_of(number + ahead) + inside * dim, dim);
                if (++inside == page) inside = 0, ++number;
            }
            for (int j = in_context; j < count; ++j) {
                const int64_t offset = ((start + begin + j - item.end) * shape.kv_heads + item.kv_head) * dim;
                keys[j] = step_k + offset;
                values[j] = step_v + offset;
            }
            block.attend(w, item.count, keys, values, count, [&](int64_t r, float* s) {
                const int64_t row = (item.first + r) / group;
                if (shape.window) {
                    const int64_t first = step.positions[start + row] - shape.window + 1 - begin;
                    for (int64_t j = 0; j < std::min<int64_t>(in_context, first); ++j) s[j] = NEVER;
                }
                for (int j = in_context; j < count; ++j)
                    if (!sees(certain, start, row, begin + j - item.end)) s[j] = NEVER;
            });
        }
    }

    void run(Workspace& w, const Item& item) const {
        const int64_t padded = (item.count + DOT_ROWS - 1) / DOT_ROWS * DOT_ROWS;
        std::fill(w.q, w.q + padded * width, 0.0f);
        std::fill(w.o, w.o + padded * width, 0.0f);
        std::fill(w.m, w.m + padded, NEVER);
        std::fill(w.l, w.l + padded, 0.0f);
        for (int64_t r = 0; r < item.count; ++r) {
            const int64_t head = item.kv_head * group + (item.first + r) % group;
            const T* from = q + row_of(item, r) * shape.q_stride + head * dim;
            for (int64_t c = 0; c < dim; ++c) w.q[r * width + c] = to_float(from[c]) * shape.scale;
        }
        attend(w, item);
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
