// y = x W^T + b with weights of 8 or 4 bits, which become floats in registers. x is not quantized; sums are float32.
//
// W is stored in panels as in cpu.h. A panel consists of groups of inputs, a group of blocks of 8 inputs. For every
// vector of outputs a block holds: with 8 bits, 8 vectors of bytes, one per input; with 4 bits, one word per output,
// whose low half has the even inputs' weights plus 8 and whose high half has the odd inputs'. The panel's scales follow
// the blocks of a group: with 8 bits float32 scales; with 4 bits bfloat16 scales, then bfloat16 zeros. A weight is its
// integer * scale + zero.
namespace euryale {
namespace EURYALE_ISA {
namespace quantized {

using linear::MAX_TILE;
using linear::multiply;
using linear::PANEL;
using linear::VECTORS;

constexpr int BLOCK = 8;
constexpr int FEW = 2 * MAX_TILE;  // rows for which weights are unpacked tile by tile
typedef int8_t vbyte_at __attribute__((vector_size(W), aligned(1), may_alias));
typedef int16_t vshort __attribute__((vector_size(W * 2)));
typedef uint32_t vuint_at __attribute__((vector_size(W * 4), aligned(1), may_alias));

// The weights of input k of a block for `multiply`, in bfloat16 of the inputs k and k + 1: the integers, exact in both.
struct Int8 {
    using Scale = float;
    static constexpr int BYTES = 8 * W;  // of a block of one vector of outputs
    static constexpr bool HAS_ZERO = false;
    static vfloat operand(const uint8_t* block, int k, float) {
#if LANES == 16  // GCC's own takes ten instructions
        const vint wide = (vint)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)block + k));
#else
        const vint wide = __builtin_convertvector(
            __builtin_convertvector(*(const vbyte_at*)(block + k * W), vshort), vint);
#endif
        return __builtin_convertvector(wide, vfloat);
    }
    static vuint operand(const uint8_t* block, int k, bfloat16) {
        return (vuint)operand(block, k, 0.0f) >> 16 | (vuint)operand(block, k + 1, 0.0f);
    }
};

struct Int4 {
    using Scale = bfloat16;
    static constexpr int BYTES = 4 * W;
    static constexpr bool HAS_ZERO = true;
    static vfloat operand(const uint8_t* block, int k, float) {
        const vuint words = *(const vuint_at*)block >> (16 * (k % 2) + 4 * (k / 2));
        return __builtin_convertvector((vint)(words & 15) - 8, vfloat);
    }
#ifdef EURYALE_BF16_PRODUCTS
    static vuint operand(const uint8_t* block, int k, bfloat16) {
        typedef uint16_t vwords __attribute__((vector_size(64)));
        // -8 to 7 in bfloat16, twice: of an index the low 5 bits count.
        const vwords table = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000,
                              0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                              0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
        return (vuint)__builtin_shuffle(table, (vwords)*(const vuint_at*)block >> (uint16_t)(2 * k));
    }
#endif
};

template <class Q>
constexpr int64_t scale_bytes = PANEL * sizeof(typename Q::Scale) * (Q::HAS_ZERO ? 2 : 1);  // of a group

// Unpacked once for many rows: floats, or pairs of bfloat16, where Q has its blocks.
template <class Q, class X>
struct Unpacked {
    using Scale = typename Q::Scale;
    static constexpr int BYTES = BLOCK * W * sizeof(X);
    static constexpr bool HAS_ZERO = Q::HAS_ZERO;
    static auto operand(const uint8_t* block, int k, X) {
        return linear::operand((const X*)block + k * W);
    }
};

template <class Q, class X>
void unpack(int64_t groups, int64_t group, const uint8_t* weights, uint8_t* to) {
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t b = 0; b < group / BLOCK * VECTORS; ++b, weights += Q::BYTES)
            for (int k = 0; k < BLOCK; k += 4 / sizeof(X), to += W * 4) {
                const auto operand = Q::operand(weights, k, X{});
                __builtin_memcpy(to, &operand, sizeof operand);
            }
        std::copy(weights, weights + scale_bytes<Q>, to);
        weights += scale_bytes<Q>, to += scale_bytes<Q>;
    }
}

// Of one panel and ROWS rows. `sums` [rows, groups]: what x adds up to in every group, which the zeros multiply.
template <int ROWS, class Q, class X, class T>
void tile(int64_t groups, int64_t group, const uint8_t* weights, const X* x, const float* sums, const float* bias,
          int64_t columns, T* y, int64_t out) {
    constexpr int INPUTS = sizeof(X) == 2 ? 2 : 1;
    const int64_t stride = groups * group;
    vfloat total[ROWS][VECTORS];
    for (int i = 0; i < VECTORS; ++i)
        for (int r = 0; r < ROWS; ++r) total[r][i] = load(bias + i * W);
    for (int64_t g = 0; g < groups; ++g) {
        vfloat acc[ROWS][VECTORS] = {};
        for (int64_t k = 0; k < group; k += BLOCK, x += BLOCK, weights += VECTORS * Q::BYTES)
#pragma GCC unroll 8
            for (int j = 0; j < BLOCK; j += INPUTS) {
                decltype(Q::operand(weights, j, X{})) operands[VECTORS];
                for (int i = 0; i < VECTORS; ++i) operands[i] = Q::operand(weights + i * Q::BYTES, j, X{});
                for (int r = 0; r < ROWS; ++r)
                    for (int i = 0; i < VECTORS; ++i)
                        acc[r][i] = multiply(acc[r][i], operands[i], x + r * stride + j);
            }
        const auto* scales = (const typename Q::Scale*)weights;
        for (int i = 0; i < VECTORS; ++i)
            for (int r = 0; r < ROWS; ++r) {
                total[r][i] += acc[r][i] * load(scales + i * W);
                if (Q::HAS_ZERO) total[r][i] += load(scales + PANEL + i * W) * sums[r * groups + g];
            }
        weights += scale_bytes<Q>;
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < VECTORS; ++i) linear::put(y + r * out + i * W, total[r][i], columns - i * W);
}

// x as the products want it: `padded` wide and of type X.
template <class X, class T>
const X* prepared(int64_t rows, int64_t in, int64_t padded, const T* x, std::vector<X>& made) {
    if constexpr (std::is_same_v<X, T>)
        if (in == padded) return x;
    made.resize(rows * padded);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < in; ++k) {
            if constexpr (std::is_same_v<X, T>)
                made[r * padded + k] = x[r * in + k];
            else
                made[r * padded + k] = to_float(x[r * in + k]);
        }
    return made.data();
}

template <class Q, class X, class T>
void run(int64_t group, int64_t threads, int64_t rows, int64_t in, int64_t out, const T* x_given, const uint8_t* packed,
         const T* bias, T* y) {
    const int64_t groups = (in + group - 1) / group, padded = groups * group, panels = (out + PANEL - 1) / PANEL;
    const int64_t blocks = group / BLOCK * VECTORS, size = groups * (blocks * Q::BYTES + scale_bytes<Q>);
    const int64_t unpacked_size = groups * (blocks * Unpacked<Q, X>::BYTES + scale_bytes<Q>);
    std::vector<X> made;
    const X* x = prepared(rows, in, padded, x_given, made);
    std::vector<float> sums;
    if (Q::HAS_ZERO) {
        sums.resize(rows * groups);
        for (int64_t g = 0; g < rows * groups; ++g) {
            vfloat total = {};
            for (int64_t k = 0; k < group; k += W) total += load(x + g * group + k);
            sums[g] = sum(total);
        }
    }
    parallel_for(threads, panels, [&](int64_t p) {
        const int64_t columns = std::min<int64_t>(PANEL, out - p * PANEL);
        float of_panel[PANEL] = {};
        if (bias)
            for (int64_t c = 0; c < columns; ++c) of_panel[c] = to_float(bias[p * PANEL + c]);
        const uint8_t* weights = packed + p * size;
        if (rows > FEW) {
            static thread_local std::vector<uint8_t> unpacked;
            if ((int64_t)unpacked.size() < unpacked_size) unpacked.resize(unpacked_size);
            unpack<Q, X>(groups, group, weights, unpacked.data());
            weights = unpacked.data();
        }
        linear::in_tiles(rows, [&](auto tile_rows, int64_t row) {
            constexpr int ROWS = decltype(tile_rows)::value;
            const auto run = rows > FEW ? tile<ROWS, Unpacked<Q, X>, X, T> : tile<ROWS, Q, X, T>;
            run(groups, group, weights, x + row * padded, sums.data() + row * groups, of_panel, columns,
                y + row * out + p * PANEL, out);
        });
    });
}

template <class Q, class T>
void run_as(int64_t group, int64_t threads, int64_t rows, int64_t in, int64_t out, const void* x, const void* packed,
            const void* bias, void* y) {
#ifdef EURYALE_BF16_PRODUCTS
    using X = T;
#else
    using X = float;
#endif
    run<Q, X>(group, threads, rows, in, out, (const T*)x, (const uint8_t*)packed, (const T*)bias, (T*)y);
}

}  // namespace quantized

void quantized_run(int64_t is_bfloat16, int64_t bits, int64_t group, int64_t threads, int64_t rows, int64_t in,
                   int64_t out, const void* x, const void* packed, const void* bias, void* y) {
    const auto run = bits == 8 ? (is_bfloat16 ? quantized::run_as<quantized::Int8, bfloat16>
                                              : quantized::run_as<quantized::Int8, float>)
                               : (is_bfloat16 ? quantized::run_as<quantized::Int4, bfloat16>
                                              : quantized::run_as<quantized::Int4, float>);
    run(group, threads, rows, in, out, x, packed, bias, y);
}

}  // namespace EURYALE_ISA
}  // namespace euryale
