// y = x W^T + b for few rows on a CPU: W is read once, from memory laid out in the order of reading.
//
// W [out, in] is stored in panels of PANEL outputs; within a panel, input by input (bfloat16: two inputs by two), the
// weights of all its outputs lie together. Outputs beyond `out` and an odd last input are filled up with zeros.
namespace euryale {
namespace EURYALE_ISA {
namespace linear {

constexpr int VECTORS = 4, PANEL = VECTORS * W;
constexpr int MAX_TILE = W == 16 ? 6 : 3;  // rows that share one load of the weights

inline int64_t steps_of(int64_t in, float) { return in; }
inline int64_t steps_of(int64_t in, bfloat16) { return (in + 1) / 2; }

// acc += the products of one step: one input, or two in bfloat16.
inline vfloat multiply(vfloat acc, const float* weights, const float* x) { return acc + load(weights) * *x; }
inline vfloat multiply(vfloat acc, const bfloat16* weights, const bfloat16* x) {
    vuint pairs;
    uint32_t both;
    __builtin_memcpy(&pairs, weights, sizeof pairs);
    __builtin_memcpy(&both, x, sizeof both);
#ifdef EURYALE_BF16_PRODUCTS
    const vuint spread = both - vuint{};
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs, (__m512bh)spread);
#else
    acc += (vfloat)(pairs << 16) * to_float(x[0]);
    return acc + (vfloat)(pairs & 0xffff0000u) * to_float(x[1]);
#endif
}

template <int ROWS, class T>
void tile(int64_t steps, int64_t stride, const T* weights, const T* x, const float* bias, int64_t columns, T* y,
          int64_t out) {
    constexpr int INPUTS = sizeof(T) == 2 ? 2 : 1;
    vfloat acc[ROWS][VECTORS] = {};
    for (int64_t s = 0; s < steps; ++s, weights += PANEL * INPUTS)
        for (int i = 0; i < VECTORS; ++i)
            for (int r = 0; r < ROWS; ++r)
                acc[r][i] = multiply(acc[r][i], weights + i * W * INPUTS, x + r * stride + s * INPUTS);
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < VECTORS; ++i) {
            const vfloat result = acc[r][i] + load(bias + i * W);
            T* to = y + r * out + i * W;
            if ((i + 1) * W <= columns)
                store(to, result);
            else
                for (int c = i * W; c < columns; ++c) from_float(to + c - i * W, result[c - i * W]);
        }
}

template <class T>
void rows_of_panel(int64_t rows, int64_t steps, int64_t stride, const T* weights, const T* x, const float* bias,
                   int64_t columns, T* y, int64_t out) {
    const auto run = [&](auto tile_of, int64_t count) {
        tile_of(steps, stride, weights, x, bias, columns, y, out);
        x += count * stride;
        y += count * out;
        rows -= count;
    };
    while (rows > 0) {
        // Tiles of about equal height: 8 rows are 4 and 4.
        const int64_t tiles = (rows + MAX_TILE - 1) / MAX_TILE, count = (rows + tiles - 1) / tiles;
        switch (count) {
            case 1: run(tile<1, T>, 1); break;
            case 2: run(tile<2, T>, 2); break;
            case 3: run(tile<3, T>, 3); break;
            case 4: run(tile<MAX_TILE < 4 ? 1 : 4, T>, 4); break;
            case 5: run(tile<MAX_TILE < 5 ? 1 : 5, T>, 5); break;
            default: run(tile<MAX_TILE, T>, MAX_TILE); break;
        }
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
    threads = std::min(threads, panels);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t columns = std::min<int64_t>(PANEL, out - p * PANEL);
        float of_panel[PANEL] = {};
        if (bias)
            for (int64_t c = 0; c < columns; ++c) of_panel[c] = to_float(bias[p * PANEL + c]);
        rows_of_panel(rows, steps, stride, packed + p * steps * PANEL * per_step, x, of_panel, columns, y + p * PANEL,
                      out);
    }
}

template <class T>
void pack(int64_t in, int64_t out, const T* weight, T* packed) {
    const int64_t steps = steps_of(in, T{}), per_step = sizeof(T) == 2 ? 2 : 1, panels = (out + PANEL - 1) / PANEL;
#ifdef MADV_HUGEPAGE
    // Before the first touch: large pages spare a step of a large model most of its translation misses.
    const uintptr_t start = ((uintptr_t)packed + 4095) & ~(uintptr_t)4095;
    const uintptr_t end = (uintptr_t)(packed + panels * PANEL * steps * per_step);
    if (end > start) madvise((void*)start, end - start, MADV_HUGEPAGE);
#endif
#pragma omp parallel for
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t s = 0; s < steps; ++s)
            for (int64_t c = 0; c < PANEL; ++c)
                for (int64_t i = 0; i < per_step; ++i) {
                    const int64_t o = p * PANEL + c, k = s * per_step + i;
                    packed[((p * steps + s) * PANEL + c) * per_step + i] = o < out && k < in ? weight[o * in + k] : T{};
                }
}

}  // namespace linear

int64_t linear_panel() { return linear::PANEL; }

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
