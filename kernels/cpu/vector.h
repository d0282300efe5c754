// Vectors of floats in the compiler's own notation, so that one source serves every instruction set.
//
// The includer has defined LANES (floats per vector) and EURYALE_ISA (a namespace of its own), and has included the
// standard headers before any `#pragma GCC target`.
#include <cstdint>

namespace euryale {
namespace EURYALE_ISA {

constexpr int W = LANES;
typedef float vfloat __attribute__((vector_size(W * 4)));
typedef int32_t vint __attribute__((vector_size(W * 4)));
typedef uint32_t vuint __attribute__((vector_size(W * 4)));
typedef uint16_t vhalf __attribute__((vector_size(W * 2)));
// The same in memory, at any address.
typedef float vfloat_at __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vhalf_at __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint32_t vuint_at __attribute__((vector_size(W * 4), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

inline vfloat load(const float* p) { return *(const vfloat_at*)p; }
inline vfloat load(const bfloat16* p) { return (vfloat)(__builtin_convertvector(*(const vhalf_at*)p, vuint) << 16); }
inline void store(float* p, vfloat x) { *(vfloat_at*)p = x; }
inline void store(bfloat16* p, vfloat x) {
#ifdef EURYALE_BF16_PRODUCTS
    *(vhalf_at*)p = (vhalf)_mm512_cvtneps_pbh((__m512)x);
#else
    const vuint bits = (vuint)x;
    const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    *(vhalf_at*)p = __builtin_convertvector(rounded, vhalf);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bfloat16* p, float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    p->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vfloat broadcast(float x) { return x - vfloat{}; }
inline vfloat select(vint mask, vfloat a, vfloat b) { return (vfloat)((mask & (vint)a) | (~mask & (vint)b)); }
inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat sum(vfloat a, vfloat b) { return a + b; }

// Lane i of the result is lane i ^ D of x.
template <int D>
inline vfloat swap_lanes(vfloat x) {
    vint from;
    for (int i = 0; i < W; ++i) from[i] = i ^ D;
    return __builtin_shuffle(x, from);
}
inline float sum(vfloat x) {
    if (W > 8) x += swap_lanes<8 % W>(x);
    if (W > 4) x += swap_lanes<4 % W>(x);
    x += swap_lanes<2>(x);
    return x[0] + x[1];
}
inline float largest(vfloat x) {
    if (W > 8) x = larger(x, swap_lanes<8 % W>(x));
    if (W > 4) x = larger(x, swap_lanes<4 % W>(x));
    x = larger(x, swap_lanes<2>(x));
    return x[0] > x[1] ? x[0] : x[1];
}

// e^x with a relative error below 2e-7. Arguments below -87 give about 1e-38; arguments above 88 count as 88.
inline vfloat exponential(vfloat x) {
    x = larger(x, broadcast(-87.0f));
    x = select(x < 88.0f, x, broadcast(88.0f));
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const vfloat n = (x * 1.44269504f + magic) - magic;
    const vfloat f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    vfloat p = broadcast(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const vint power = (__builtin_convertvector(n, vint) + 127) << 23;
    return p * (vfloat)power;
}

// The natural logarithm of a normal number above zero, with a relative error below 2e-7 (1e-7 absolute near 1).
inline vfloat logarithm(vfloat x) {
    const vint above = (vint)x - 0x3f3504f3;  // bits of sqrt(1/2): the mantissa is taken from there on
    const vfloat n = __builtin_convertvector(above >> 23, vfloat);
    const vfloat f = (vfloat)((above & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vfloat p = broadcast(7.0376836292e-2f);  // minimax polynomial of Cephes' logf
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const vfloat square = f * f;
    const vfloat small = p * f * square - n * 2.12194440e-4f - 0.5f * square;  // ln 2 in two parts
    return f + small + n * 0.693359375f;
}

// 2^x for x up to 127, with a relative error below 3e-7; 0 for x of -127.5 and below.
inline vfloat power_of_two(vfloat x) {
    x = larger(x, broadcast(-127.0f));
    const vfloat moved = x + 12583039.0f;  // 1.5 * 2^23 + 127: the lowest bits are the exponent of the result
    const vfloat f = x - (moved - 12583039.0f);
    vfloat p = broadcast(1.3264726899e-3f);  // minimax polynomial with p(0) = 1
    p = p * f + 9.6715126606e-3f;
    p = p * f + 5.5507337442e-2f;
    p = p * f + 2.4022242085e-1f;
    p = p * f + 6.9314697760e-1f;
    p = p * f + 1.0f;
    return p * (vfloat)((vuint)moved << 23);
}

// A word is 32 bits: one float, or two adjacent bfloat16 whose products are summed in one lane.
inline vfloat load_words(const float* p) { return load(p); }
inline vuint load_words(const bfloat16* p) { return *(const vuint_at*)p; }
inline void store_words(float* p, vfloat words) { store(p, words); }
inline void store_words(bfloat16* p, vuint words) { *(vuint_at*)p = words; }
inline vfloat spread_word(const float* p) { return broadcast(*p); }
inline vuint spread_word(const bfloat16* p) {
    uint32_t both;
    __builtin_memcpy(&both, p, sizeof both);
    return both - vuint{};
}
// Packs floats into words of two bfloat16: `even` gives the first (low) half of each word, `odd` the second.
inline vuint to_words(vfloat even, vfloat odd) {
    const vuint first = (vuint)even, second = (vuint)odd;  // rounded to nearest, ties to even
    return ((first + 0x7fff + ((first >> 16) & 1)) >> 16) | ((second + 0x7fff + ((second >> 16) & 1)) & 0xffff0000u);
}
inline vfloat add_products(vfloat to, vfloat a, vfloat b) { return to + a * b; }
inline vfloat add_products(vfloat to, vuint a, vuint b) {
#ifdef EURYALE_BF16_PRODUCTS
    return (vfloat)_mm512_dpbf16_ps((__m512)to, (__m512bh)a, (__m512bh)b);
#else
    to += (vfloat)(a << 16) * (vfloat)(b << 16);
    return to + (vfloat)(a & 0xffff0000u) * (vfloat)(b & 0xffff0000u);
#endif
}

template <int D>
inline void exchange(vfloat& low, vfloat& high) {
    vint pick_low, pick_high;
    for (int c = 0; c < W; ++c) {
        pick_low[c] = (c & D) ? W + (c ^ D) : c;
        pick_high[c] = (c & D) ? W + c : (c | D);
    }
    const vfloat a = low, b = high;
    low = __builtin_shuffle(a, b, pick_low);
    high = __builtin_shuffle(a, b, pick_high);
}

template <int D>
inline void transpose_stage(vfloat* v) {
    for (int i = 0; i < W; ++i)
        if (!(i & D)) exchange<D>(v[i], v[i | D]);
}

// v[i][j] becomes v[j][i].
inline void transpose(vfloat* v) {
    if (W > 8) transpose_stage<8 % W>(v);
    if (W > 4) transpose_stage<4 % W>(v);
    transpose_stage<2>(v);
    transpose_stage<1>(v);
}

template <int D, vfloat (*F)(vfloat, vfloat)>
inline void fold_stage(vfloat* v) {
    for (int i = 0; i < W; ++i)
        if (!(i & D) && i < 2 * D) {
            exchange<D>(v[i], v[i | D]);
            v[i] = F(v[i], v[i | D]);
        }
}

// Lane i of the result is the reduction by F of all lanes of v[i]. Overwrites v.
template <vfloat (*F)(vfloat, vfloat)>
inline vfloat fold_lanes(vfloat* v) {
    if (W > 8) fold_stage<8 % W, F>(v);
    if (W > 4) fold_stage<4 % W, F>(v);
    fold_stage<2, F>(v);
    fold_stage<1, F>(v);
    return v[0];
}

}  // namespace EURYALE_ISA
}  // namespace euryale
