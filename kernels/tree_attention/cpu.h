// Tree attention on a CPU: online softmax over blocks of keys, committed pages first, then the step's own rows.
//
// An item is a segment, a KV head, a block of query rows and a split of the context. A query row is one head of one row
// of the step; the heads of a KV group are adjacent, so that a key is read once for all of them. Splits depend on the
// segment alone, so a row's result does not depend on other requests or on the number of threads.
namespace euryale {
namespace EURYALE_ISA {
namespace attention {

constexpr int64_t SPLIT = 512;  // tokens of an item's context, if one block holds all rows of the segment

struct Item {
    int64_t segment, kv_head, first, count;   // query rows
    int64_t begin, end;                       // context
    bool has_step;                            // includes the step's own rows
    int64_t partial;                          // index of its partial results, in query rows; -1: writes to the output
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
    const Block<T> block;
    float* partials;      // [query rows][width + 2]: weighted values, maximum, sum
    const int64_t dim = shape.head_dim, width = block.width, group = shape.heads / shape.kv_heads;

    int64_t row_of(const Item& item, int64_t r) const {
        return step.starts[item.segment] + (item.first + r) / group;
    }

    bool sees(int64_t num_new, int64_t start, int64_t row, int64_t column) const {
        if (column >= num_new) {
            const int64_t node = column - num_new + 1;
            if (row < num_new || !(step.ancestors[(start + row) * 2 + node / 64] >> node % 64 & 1)) return false;
        } else if (column > row) {
            return false;
        }
        return !shape.window || step.positions[start + row] - step.positions[start + column] < shape.window;
    }

    // The first context position that any row of the item attends to.
    int64_t first_seen(const Item& item) const {
        if (!shape.window) return item.begin;
        int64_t lowest = INT64_MAX;  // positions rise with depth, not with the row
        for (int64_t r = 0; r < item.count; ++r) lowest = std::min(lowest, step.positions[row_of(item, r)]);
        return std::max(item.begin, std::min(item.end, lowest - shape.window + 1));
    }

    // Visits all keys of the item, block by block: context first, then the step. A block may hold keys of both.
    void attend(Workspace& w, const Item& item) const {
        const int64_t start = step.starts[item.segment], num_new = step.num_new_tokens[item.segment];
        const int64_t page = step.page_size, head_size = page * dim;
        const int32_t* pages = step.pages + step.page_starts[item.segment];
        // No row of the item attends to rows after its last one: parents come before children.
        const int64_t end = item.end + (item.has_step ? (item.first + item.count - 1) / group + 1 : 0);
        const auto collect = [&](int64_t begin, Rows<T>& rows) {
            rows.count = (int)std::max<int64_t>(0, std::min<int64_t>(KEYS, end - begin));
            rows.in_context = (int)std::max<int64_t>(0, std::min<int64_t>(rows.count, item.end - begin));
            int64_t number = begin / page, inside = begin % page;
            for (int j = 0; j < rows.in_context; ++j) {
                const int64_t offset = (pages[number] * shape.kv_heads + item.kv_head) * head_size + inside * dim;
                rows.keys[j] = cache_k + offset;
                rows.values[j] = cache_v + offset;
                if (++inside == page) inside = 0, ++number;
            }
            for (int j = rows.in_context; j < rows.count; ++j) {
                const int64_t offset = ((start + begin + j - item.end) * shape.kv_heads + item.kv_head) * dim;
                rows.keys[j] = step_k + offset;
                rows.values[j] = step_v + offset;
            }
        };
        Rows<T> blocks[2];
        int64_t begin = first_seen(item);
        collect(begin, blocks[0]);
        Ahead<T> first{blocks[0], dim * (int64_t)sizeof(T)};
        first.keys_until(KEYS);
        first.values_until(KEYS);
        for (int i = 0; begin < end; begin += KEYS, i = 1 - i) {
            const Rows<T>& now = blocks[i];
            collect(begin + KEYS, blocks[1 - i]);
            block.attend(w, item.count, now, blocks[1 - i], [&](int64_t r, float* s) {
                const int64_t row = (item.first + r) / group;
                int j = now.in_context;
                if (shape.window) {
                    const int64_t first = step.positions[start + row] - shape.window + 1 - begin;
                    for (int64_t j = 0; j < std::min<int64_t>(now.in_context, first); ++j) s[j] = NEVER;
                } else {
                    // The row attends to all new tokens up to itself.
                    j = (int)std::max<int64_t>(j, item.end - begin + std::min(row + 1, num_new));
                }
                for (; j < now.count; ++j)
                    if (!sees(num_new, start, row, begin + j - item.end)) s[j] = NEVER;
            });
        }
    }

    void run(Workspace& w, const Item& item) const {
        const int64_t padded = (item.count + 3) / 4 * 4;  // of scores_of_few
        T* queries = (T*)w.q;
        std::fill(queries, queries + padded * width, T{});
        std::fill(w.o, w.o + item.count * width, 0.0f);
        std::fill(w.m, w.m + QUERY_BLOCK, LOWEST);
        std::fill(w.l, w.l + QUERY_BLOCK, 0.0f);
        for (int64_t r = 0; r < item.count; ++r) {
            const int64_t head = item.kv_head * group + (item.first + r) % group;
            const T* from = q + row_of(item, r) * shape.q_stride + head * dim;
            std::copy(from, from + dim, queries + r * width);
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
        const int64_t row = step.starts[segment] + query_row / group, head = kv_head * group + query_row % group;
        block.write(o, factor, out + (row * shape.heads + head) * dim);
    }

    // The splits of one query row, in their order.
    void merge(Workspace& w, const Merge& todo, int64_t r) const {
        const int64_t stride = todo.count * (width + 2);
        const float* first = partials + (todo.partial + r) * (width + 2);
        float top = LOWEST, total = 0;
        for (int64_t s = 0; s < todo.num_splits; ++s) top = std::max(top, first[s * stride + width]);
        std::fill(w.o, w.o + width, 0.0f);
        for (int64_t s = 0; s < todo.num_splits; ++s) {
            const float* part = first + s * stride;
            const float factor = power_of_two(broadcast(part[width] - top))[0];
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
        const int64_t rows = (step.starts[i + 1] - step.starts[i]) * group, context = step.contexts[i];
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

// This thread's, for as long as it is asked for the same width.
inline Workspace& workspace(int64_t width) {
    static thread_local std::vector<Workspace> spaces;
    static thread_local int64_t made_for = 0;
    if (made_for != width) {
        spaces.clear();
        spaces.emplace_back(width);
        made_for = width;
    }
    return spaces[0];
}

template <class T>
void run(const Step& step, const Attention& shape, const void* q, const void* step_k, const void* step_v,
         const void* cache_k, const void* cache_v, void* out) {
    std::vector<Item> items;
    std::vector<Merge> merges;
    int64_t num_partials = 0;
    plan(step, shape, items, merges, num_partials);
    const Block<T> block{shape.head_dim, shape.scale * 1.44269504f};
    const int64_t width = block.width;
    static thread_local std::vector<float> partials;
    partials.resize(num_partials * (width + 2));
    const Kernel<T> kernel{step, shape, (const T*)q, (const T*)step_k, (const T*)step_v,
                           (const T*)cache_k, (const T*)cache_v, (T*)out, block, partials.data()};
    parallel_for(step.num_threads, items.size(), [&](int64_t i) { kernel.run(workspace(width), items[i]); });
    parallel_for(step.num_threads, merges.size(), [&](int64_t i) {
        for (int64_t r = 0; r < merges[i].count; ++r) kernel.merge(workspace(width), merges[i], r);
    });
}

}  // namespace attention

void tree_attention(const Step* step, const Attention* shape, const void* q, const void* step_k, const void* step_v,
                    const void* cache_k, const void* cache_v, void* out) {
    const auto run = shape->is_bfloat16 ? attention::run<bfloat16> : attention::run<float>;
    run(*step, *shape, q, step_k, step_v, cache_k, cache_v, out);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
