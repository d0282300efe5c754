// SiLU(gate) * up on a CPU.
namespace euryale {
namespace EURYALE_ISA {
namespace silu {

template <class T>
void run(int64_t rows, int64_t width, const T* gate_up, T* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const T *gate = gate_up + r * 2 * width, *up = gate + width;
        T* to = out + r * width;
        int64_t c = 0;
        for (; c + W <= width; c += W) {
            const vfloat g = load(gate + c);
            store(to + c, g / (1.0f + exponential(-g)) * load(up + c));
        }
        for (; c < width; ++c) {
            const float g = to_float(gate[c]);
            from_float(to + c, g / (1.0f + std::exp(-g)) * to_float(up[c]));
        }
    }
}

}  // namespace silu

void silu_mul(int64_t is_bfloat16, int64_t rows, int64_t width, const void* gate_up, void* out) {
    if (is_bfloat16)
        silu::run(rows, width, (const bfloat16*)gate_up, (bfloat16*)out);
    else
        silu::run(rows, width, (const float*)gate_up, (float*)out);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
