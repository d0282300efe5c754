// Residual and RMSNorm on a CPU, one pass over a row that stays in the first-level cache.
namespace euryale {
namespace EURYALE_ISA {
namespace norm {

// `sum` = x + residual, rounded to T (x if residual is null); `normed` = its RMSNorm. `sum` may be x or residual.
template <class T>
void row(const T* x, const T* residual, const T* weight, int64_t width, float eps, T* normed, T* sum) {
    const int64_t whole = width / W * W;
    vfloat squares = {};
    float rest = 0;
    for (int64_t c = 0; c < whole; c += W) {
        vfloat v = load(x + c);
        if (residual) v += load(residual + c);
        store(sum + c, v);
        v = load(sum + c);
        squares += v * v;
    }
    for (int64_t c = whole; c < width; ++c) {
        from_float(sum + c, to_float(x[c]) + (residual ? to_float(residual[c]) : 0));
        rest += to_float(sum[c]) * to_float(sum[c]);
    }
    const float scale = 1 / std::sqrt((euryale::EURYALE_ISA::sum(squares) + rest) / width + eps);
    for (int64_t c = 0; c < whole; c += W) store(normed + c, load(sum + c) * scale * load(weight + c));
    for (int64_t c = whole; c < width; ++c) from_float(normed + c, to_float(sum[c]) * scale * to_float(weight[c]));
}

template <class T>
void run(int64_t rows, int64_t width, const T* x, const T* residual, const T* weight, float eps, T* normed, T* sum) {
    for (int64_t r = 0; r < rows; ++r)
        row(x + r * width, residual ? residual + r * width : nullptr, weight, width, eps, normed + r * width,
            sum + r * width);
}

}  // namespace norm

void add_rms_norm(int64_t is_bfloat16, int64_t rows, int64_t width, const void* x, const void* residual,
                  const void* weight, float eps, void* normed, void* sum) {
    if (is_bfloat16)
        norm::run(rows, width, (const bfloat16*)x, (const bfloat16*)residual, (const bfloat16*)weight, eps,
                  (bfloat16*)normed, (bfloat16*)sum);
    else
        norm::run(rows, width, (const float*)x, (const float*)residual, (const float*)weight, eps, (float*)normed,
                  (float*)sum);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
