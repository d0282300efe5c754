// y = x W^T + b for few rows on a CPU: W is read once, in the order in which it is stored.
//
// W [out, in] is stored in panels of PANEL outputs. A panel holds, for one input after the other (bfloat16: pairs of
// inputs), the weights of all its outputs. Zeros pad outputs beyond `out` and an odd last input.
namespace euryale {
namespace EURYALE_ISA {
namespace linear {

constexpr int VECTORS = 4, PANEL = VECTORS * W;
constexpr int MAX_TILE = W == 16 ? 6 : 3;  // rows that share one load of the weights

inline int64_t steps_of(int64_t in, float) { return in; }
inline int64_t steps_of(int64_t in, bfloat16) { return (in + 1) / 2; }

// The weights of one step (one input, in bfloat16 two) for a vector of outputs.
inline vfloat operand(const float* weights) { return load(weights); }
inline vuint operand(const bfloat16* weights) {
    vuint pairs;
    __builtin_memcpy(&pairs, weights, sizeof pairs);
    return pairs;
}

// acc += the products of one step.
inline vfloat multiply(vfloat acc, vfloat weights, const float* x) { return acc + weights * *x; }
inline vfloat multiply(vfloat acc, vuint pairs, const bfloat16* x) {
#ifdef EURYALE_BF16_PRODUCTS
    uint32_t both;
    __builtin_memcpy(&both, x, sizeof both);
    const vuint spread = both - vuint{};
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs, (__m512bh)spread);
#else
    acc += (vfloat)(pairs << 16) * to_float(x[0]);
    return acc + (vfloat)(pairs & 0xffff0000u) * to_float(x[1]);
#endif
}

// Stores the first `columns` lanes of a result, at most all.
template <class T>
inline void put(T* to, vfloat result, int64_t columns) {
    if (columns >= W)
        store(to, result);
    else
        for (int64_t c = 0; c < columns; ++c) from_float(to + c, result[c]);
}

template <int ROWS, class T>
void tile(int64_t steps, int64_t stride, const T* weights, const T* x, const float* bias, int64_t columns, T* y,
          int64_t out) {
    constexpr int INPUTS = sizeof(T) == 2 ? 2 : 1;
    vfloat acc[ROWS][VECTORS] = {};
    for (int64_t s = 0; s < steps; ++s, weights += PANEL * INPUTS)
        for (int i = 0; i < VECTORS; ++i)
            for (int r = 0; r < ROWS; ++r)
                acc[r][i] = multiply(acc[r][i], operand(weights + i * W * INPUTS), x + r * stride + s * INPUTS);
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < VECTORS; ++i)
            put(y + r * out + i * W, acc[r][i] + load(bias + i * W), columns - i * W);
}

// Calls run(number of rows as a type, first row) for tiles of about equal height: 8 rows are 4 and 4.
template <class Run>
void in_tiles(int64_t rows, Run run) {
    for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row, tiles = (left + MAX_TILE - 1) / MAX_TILE, count = (left + tiles - 1) / tiles;
        switch (count) {
            case 1: run(std::integral_constant<int, 1>{}, row); break;
            case 2: run(std::integral_constant<int, 2>{}, row); break;
            case 3: run(std::integral_constant<int, 3>{}, row); break;
            case 4: run(std::integral_constant<int, MAX_TILE < 4 ? 1 : 4>{}, row); break;
            case 5: run(std::integral_constant<int, MAX_TILE < 5 ? 1 : 5>{}, row); break;
            default: run(std::integral_constant<int, MAX_TILE>{}, row); break;
        }
        row += count;
    }
}

template <class T>
void run(int64_t threads, int64_t rows, int64_t in, int64_t out, const T* x, const T* packed, const T* bias, T* y) {
    const int64_t steps = steps_of(in, T{}), per_step = sizeof(T) == 2 ? 2 : 1, panels = (out + PANEL - 1) / PANEL;
    std::vector<T> padded;
    int64_t stride = in;
    if (steps * per_step != in) {
        stride = in + 1;
        padded.resize(rows * stride, T{});
        for (int64_t r = 0; r < rows; ++r) std::copy(x + r * in, x + (r + 1) * in, padded.data() + r * stride);
        x = padded.data();
    }
    parallel_for(threads, panels, [&](int64_t p) {
        const int64_t columns = std::min<int64_t>(PANEL, out - p * PANEL);
        float of_panel[PANEL] = {};
        if (bias)
            for (int64_t c = 0; c < columns; ++c) of_panel[c] = to_float(bias[p * PANEL + c]);
        const T* weights = packed + p * steps * PANEL * per_step;
        in_tiles(rows, [&](auto tile_rows, int64_t row) {
            tile<decltype(tile_rows)::value>(steps, stride, weights, x + row * stride, of_panel, columns,
                                             y + row * out + p * PANEL, out);
        });
    });
}

template <class T>
void pack(int64_t in, int64_t out, const T* weight, T* packed) {
    const int64_t steps = steps_of(in, T{}), per_step = sizeof(T) == 2 ? 2 : 1, panels = (out + PANEL - 1) / PANEL;
#ifdef MADV_HUGEPAGE
    // Before the first write: huge pages avoid most TLB misses of a large model's step.
    const uintptr_t start = ((uintptr_t)packed + 4095) & ~(uintptr_t)4095;
    const uintptr_t end = (uintptr_t)(packed + panels * PANEL * steps * per_step);
    if (end > start) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
    parallel_for(usable_cores(), panels, [&](int64_t p) {
        for (int64_t s = 0; s < steps; ++s)
            for (int64_t c = 0; c < PANEL; ++c)
                for (int64_t i = 0; i < per_step; ++i) {
                    const int64_t o = p * PANEL + c, k = s * per_step + i;
                    packed[((p * steps + s) * PANEL + c) * per_step + i] = o < out && k < in ? weight[o * in + k] : T{};
                }
    });
}

}  // namespace linear

// Elements of packed weights: whole panels.
int64_t linear_size(int64_t is_bfloat16, int64_t in, int64_t out) {
    const int64_t panels = (out + linear::PANEL - 1) / linear::PANEL;
    return panels * linear::PANEL * (is_bfloat16 ? 2 * linear::steps_of(in, bfloat16{}) : in);
}

void linear_pack(int64_t is_bfloat16, int64_t in, int64_t out, const void* weight, void* packed) {
    if (is_bfloat16)
        linear::pack(in, out, (const bfloat16*)weight, (bfloat16*)packed);
    else
        linear::pack(in, out, (const float*)weight, (float*)packed);
}

void linear_run(int64_t is_bfloat16, int64_t threads, int64_t rows, int64_t in, int64_t out, const void* x,
                const void* packed, const void* bias, void* y) {
    if (is_bfloat16)
        linear::run(threads, rows, in, out, (const bfloat16*)x, (const bfloat16*)packed, (const bfloat16*)bias,
                    (bfloat16*)y);
    else
        linear::run(threads, rows, in, out, (const float*)x, (const float*)packed, (const float*)bias, (float*)y);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
