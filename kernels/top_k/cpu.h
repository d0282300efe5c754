// The k largest of every row on a CPU, largest first, of equals the first.
namespace euryale {
namespace EURYALE_ISA {
namespace top {

template <class T>
void row(const T* x, int64_t width, int64_t k, float* values, int64_t* ids) {
    std::fill(values, values + k, -INFINITY);
    std::fill(ids, ids + k, 0);
    int64_t found = 0;
    const auto offer = [&](float value, int64_t id) {
        if (found == k && !(value > values[k - 1])) return;
        int64_t place = found < k ? found++ : k - 1;
        for (; place > 0 && value > values[place - 1]; --place) {
            values[place] = values[place - 1];
            ids[place] = ids[place - 1];
        }
        values[place] = value;
        ids[place] = id;
    };
    int64_t c = 0;
    for (; c < std::min(k, width); ++c) offer(to_float(x[c]), c);
    for (; c + 4 * W <= width; c += 4 * W) {
        vint above = {};
        for (int i = 0; i < 4; ++i) above |= load(x + c + i * W) > values[k - 1];
        int any = 0;
        for (int i = 0; i < W; ++i) any |= above[i];
        if (any)
            for (int64_t i = c; i < c + 4 * W; ++i) offer(to_float(x[i]), i);
    }
    for (; c < width; ++c) offer(to_float(x[c]), c);
}

template <class T>
void run(int64_t rows, int64_t width, int64_t k, const T* x, float* values, int64_t* ids) {
    for (int64_t r = 0; r < rows; ++r) row(x + r * width, width, k, values + r * k, ids + r * k);
}

}  // namespace top

void top_k(int64_t is_bfloat16, int64_t rows, int64_t width, int64_t k, const void* x, float* values,
           int64_t* ids) {
    if (is_bfloat16)
        top::run(rows, width, k, (const bfloat16*)x, values, ids);
    else
        top::run(rows, width, k, (const float*)x, values, ids);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
