// The k largest values of every row on a CPU in descending order; the first of equal values wins.
namespace euryale {
namespace EURYALE_ISA {
namespace top {

constexpr int64_t MANY = 1 << 17;  // values from which a second thread pays off

// The k largest found so far.
struct Best {
    float* values;
    int32_t* ids;
    int64_t k, found;

    Best(float* values, int32_t* ids, int64_t k) : values(values), ids(ids), k(k), found(0) {
        std::fill(values, values + k, -INFINITY);
        std::fill(ids, ids + k, 0);
    }

    void offer(float value, int64_t id) {
        if (found == k && !(value > values[k - 1])) return;
        int64_t place = found < k ? found++ : k - 1;
        for (; place > 0 && value > values[place - 1]; --place) {
            values[place] = values[place - 1];
            ids[place] = ids[place - 1];
        }
        values[place] = value;
        ids[place] = (int32_t)id;
    }
};

template <class T>
void row(const T* x, int64_t valid, int64_t offset, Best best) {
    int64_t c = 0;
    for (; c < std::min(best.k, valid); ++c) best.offer(to_float(x[c]), c + offset);
    for (; c + 4 * W <= valid; c += 4 * W) {
        vint above = {};
        for (int i = 0; i < 4; ++i) above |= load(x + c + i * W) > best.values[best.k - 1];
        int any = 0;
        for (int i = 0; i < W; ++i) any |= above[i];
        if (any)
            for (int64_t i = c; i < c + 4 * W; ++i) best.offer(to_float(x[i]), i + offset);
    }
    for (; c < valid; ++c) best.offer(to_float(x[c]), c + offset);
}

template <class T>
void run(int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t k, int64_t offset, const T* x,
         float* values, int32_t* ids) {
    parallel_for(rows * valid > MANY ? threads : 1, rows,
                 [&](int64_t r) { row(x + r * width, valid, offset, Best(values + r * k, ids + r * k, k)); });
}

}  // namespace top

void top_k(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t width, int64_t valid, int64_t k, int64_t offset,
           const void* x, float* values, int32_t* ids) {
    if (is_bfloat16)
        top::run(threads, rows, width, valid, k, offset, (const bfloat16*)x, values, ids);
    else
        top::run(threads, rows, width, valid, k, offset, (const float*)x, values, ids);
}

// `parts` [num_parts][2][rows][k] and `out` [2][rows][k], each values and then ids.
void merge_top_k(int64_t num_parts, int64_t rows, int64_t k, const int32_t* parts, int32_t* out) {
    for (int64_t r = 0; r < rows; ++r) {
        top::Best best((float*)out + r * k, out + (rows + r) * k, k);
        for (int64_t s = 0; s < num_parts; ++s) {
            const float* values = (const float*)parts + (2 * s * rows + r) * k;
            const int32_t* ids = parts + ((2 * s + 1) * rows + r) * k;
            for (int64_t i = 0; i < k; ++i) best.offer(values[i], ids[i]);
        }
    }
}

}  // namespace EURYALE_ISA
}  // namespace euryale
