// x + SiLU(y) on a CPU.
namespace euryale {
namespace EURYALE_ISA {
namespace residual {

template <class T>
void add(int64_t count, const T* y, T* x) {
    int64_t c = 0;
    for (; c + W <= count; c += W) {
        const vfloat g = load(y + c);
        store(x + c, load(x + c) + g / (1.0f + exponential(-g)));
    }
    for (; c < count; ++c) {
        const float g = to_float(y[c]);
        from_float(x + c, to_float(x[c]) + g / (1.0f + std::exp(-g)));
    }
}

// `y` [parts][rows][part], `x` [rows][width]: the parts are adjacent in x, which may cut off the last one.
template <class T>
void run(int64_t parts, int64_t rows, int64_t part, int64_t width, const T* y, T* x) {
    for (int64_t s = 0; s < parts; ++s)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t count = std::min(part, width - s * part);
            if (count > 0) add(count, y + (s * rows + r) * part, x + r * width + s * part);
        }
}

}  // namespace residual

void add_silu(int64_t is_bfloat16, int64_t parts, int64_t rows, int64_t part, int64_t width, const void* y, void* x) {
    if (is_bfloat16)
        residual::run(parts, rows, part, width, (const bfloat16*)y, (bfloat16*)x);
    else
        residual::run(parts, rows, part, width, (const float*)y, (float*)x);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
