// Sums vectors of equal length element by element, in the order given, in float32.
namespace euryale {
namespace EURYALE_ISA {
namespace reduction {

template <class T>
void run(int64_t count, int64_t num_inputs, const void* const* inputs, T* out) {
    int64_t c = 0;
    for (; c + W <= count; c += W) {
        vfloat total = load((const T*)inputs[0] + c);
        for (int64_t i = 1; i < num_inputs; ++i) total += load((const T*)inputs[i] + c);
        store(out + c, total);
    }
    for (; c < count; ++c) {
        float total = to_float(((const T*)inputs[0])[c]);
        for (int64_t i = 1; i < num_inputs; ++i) total += to_float(((const T*)inputs[i])[c]);
        from_float(out + c, total);
    }
}

}  // namespace reduction

void reduce(int64_t is_bfloat16, int64_t count, int64_t num_inputs, const void* const* inputs, void* out) {
    if (is_bfloat16)
        reduction::run(count, num_inputs, inputs, (bfloat16*)out);
    else
        reduction::run(count, num_inputs, inputs, (float*)out);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
