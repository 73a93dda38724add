// Vectors of one instruction-set level, in the compilers' vector types, so that one source serves every level. The compiler flags (LEVELS in
// library.py) choose the level: AVX-512 with or without bfloat16 products, AVX2, or the compiler's default target.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moe_fn {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, MAX_ROWS = 14;  // 14 rows x 2 vectors of sums, 2 of weights, 1 broadcast: 31 of 32 registers
#elif defined(__AVX2__)
constexpr int WIDTH = 8, MAX_ROWS = 3;
#else
constexpr int WIDTH = 4, MAX_ROWS = 1;
#endif
constexpr int PANEL = 32;              // columns of a panel of weights
constexpr int NV = PANEL / WIDTH;      // vectors of a panel
constexpr int CHUNK = 16;              // consecutive steps of a row in packed rows

static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t veci __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t vech __attribute__((vector_size(WIDTH * 2)));

static inline vec load(const void* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(void* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec splat(float s) { return s - vec{}; }  // s - 0 is exactly s, also for -0
// Broadcasts a dword from memory as an integer: on Zen 4 the load unit does it, while a broadcast of floats uses a port of the products.
static inline vec splat_at(const float* p) {
#if defined(__AVX512F__)
  int32_t bits; std::memcpy(&bits, p, 4);
  return (vec)_mm512_set1_epi32(bits);
#else
  return splat(*p);
#endif
}
static inline veci splat_int(int32_t s) { return s - veci{}; }
static inline vec select(veci mask, vec a, vec b) { return (vec)((mask & (veci)a) | (~mask & (veci)b)); }

// low, high: lanes of two vectors interleaved, of their first and second halves. even, odd: every other lane of two concatenated vectors.
#if defined(__AVX512F__)
static inline vec low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
static inline vec high(vec a, vec b) { return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
static inline vec even(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
static inline vec odd(vec a, vec b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
#elif defined(__AVX2__)
static inline vec low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline vec high(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
static inline vec even(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
static inline vec odd(vec a, vec b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#else
static inline vec low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline vec high(vec a, vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
static inline vec even(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
static inline vec odd(vec a, vec b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
#endif

// Integers of 8 or 16 bits without a sign, in lanes.
template <class T>
static inline veci integers(const T* p) {
  typedef T lanes __attribute__((vector_size(WIDTH * sizeof(T))));
  lanes v; std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, veci);
}

// bfloat16 <-> float32, rounded to nearest, ties to even; NaN stays NaN.
static inline vec widen(const uint16_t* p) {
  vech h; std::memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, veci) << 16);
}
static inline float widen_one(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f; std::memcpy(&f, &u, 4);
  return f;
}
static inline float widen_one(float f) { return f; }
static inline void narrow(uint16_t* p, vec v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v); std::memcpy(p, &h, sizeof h);
#else
  veci u = (veci)v, odd_bit = (u >> 16) & 1;
  veci rounded = (veci)select(v == v, (vec)(u + 0x7fff + odd_bit), (vec)splat_int(0x7fc00000));
  vech h = __builtin_convertvector((rounded >> 16) & 0xffff, vech); std::memcpy(p, &h, sizeof h);
#endif
}

// float16 <-> float32, in the same way. Subnormals are kept, also while the CPU flushes those of float32 to zero; 65520 and more are infinite.
struct Half { uint16_t bits; };
#if defined(__AVX512F__)  // "maskz" of all lanes: GCC 12 warns of the undefined lanes of the others
static inline vec widen_half(vech h) { return (vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h); }
static inline vech narrow_half(vec v) { return (vech)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
static inline vec widen_half(vech h) { return (vec)_mm256_cvtph_ps((__m128i)h); }
static inline vech narrow_half(vec v) { return (vech)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
static inline vec widen_code(veci code) {
  const veci m = code & 0x7fff, shifted = m << 13;
  const vec normal = (vec)(shifted + ((127 - 15) << 23)), subnormal = __builtin_convertvector(m, vec) * 0x1p-24f;
  const vec finite = select(m < 0x0400, subnormal, normal);
  return (vec)((veci)select(m >= 0x7c00, (vec)(shifted | 0x7f800000), finite) | ((code & 0x8000) << 16));
}
static inline vec widen_half(vech h) { return widen_code(__builtin_convertvector(h, veci)); }
static inline vech narrow_half(vec v) {
  const veci u = (veci)v & 0x7fffffff, sign = ((veci)v >> 16) & 0x8000;
  // Adding 0.5 rounds a number below 2^-14 at the 24th place after the point, and leaves the code in the low bits.
  const veci subnormal = (veci)((vec)u + 0.5f) - 0x3f000000;
  const veci normal = (u - ((127 - 15) << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
  const veci infinite_or_nan = (veci)select(u > 0x7f800000, (vec)splat_int(0x7e00), (vec)splat_int(0x7c00));
  const veci finite = (veci)select(u < 0x38800000, (vec)subnormal, (vec)normal);
  return __builtin_convertvector((veci)select(u >= 0x47800000, (vec)infinite_or_nan, (vec)finite) | sign, vech);
}
#endif
static inline vec widen(const Half* p) {
  vech h; std::memcpy(&h, p, sizeof h);
  return widen_half(h);
}
static inline float widen_one(Half h) {
  vech all{};
  all[0] = h.bits;
  return widen_half(all)[0];
}
static inline void narrow(Half* p, vec v) {
  const vech h = narrow_half(v);
  std::memcpy(p, &h, sizeof h);
}

// Operations on dwords of a product's inner dimension: one float32, or a pair of bfloat16 or float16. "mac" adds the product of a broadcast
// dword and a vector of dwords to sums; "dot" adds the products of two vectors of dwords lane by lane.
struct F32 {
  using Element = float;
  static constexpr int PER_DWORD = 1;
  struct Split { vec all; };
  static inline Split split(vec b) { return {b}; }
  static inline vec mac(vec sum, const float* a, Split b) { return sum + splat(*a) * b.all; }
  static inline vec dot(vec sum, vec a, vec b) { return sum + a * b; }
  // A step's weights of 2 * WIDTH columns from one row of weights, or from two consecutive rows.
  static inline void two_rows(const float* one, const float*, Split* out) { out[0] = {load(one)}, out[1] = {load(one + WIDTH)}; }
  // A step's dwords of 2 * WIDTH columns, from vectors of one row or of two consecutive rows.
  static inline void step(const float* one, const float*, vec* out) { out[0] = moe_fn::load(one), out[1] = moe_fn::load(one + WIDTH); }
  static inline vec load(const float* p) { return moe_fn::load(p); }
  static inline void store(float* p, vec v) { moe_fn::store(p, v); }
};
struct BF16 {
  using Element = uint16_t;
  static constexpr int PER_DWORD = 2;
  static inline void dwords(vec one, vec two, vec* out) {
#if defined(__AVX512F__)
    typedef uint16_t halves __attribute__((vector_size(WIDTH * 4)));
    const halves a = (halves)one, b = (halves)two;
    out[0] = (vec)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    out[1] = (vec)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
#else
    const veci a = (veci)one, b = (veci)two, high_half = splat_int(int32_t(0xffff0000));
    const vec even_columns = (vec)((a & 0xffff) | (b << 16)), odd_columns = (vec)(((a >> 16) & 0xffff) | (b & high_half));
    out[0] = low(even_columns, odd_columns), out[1] = high(even_columns, odd_columns);
#endif
  }
  static inline void step(const uint16_t* one, const uint16_t* two, vec* out) { dwords(moe_fn::load(one), two ? moe_fn::load(two) : vec{}, out); }
#if defined(__AVX512BF16__)
  struct Split { vec all; };
  static inline Split split(vec b) { return {b}; }
  static inline vec mac(vec sum, const float* a, Split b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat_at(a), (__m512bh)b.all); }
  static inline vec dot(vec sum, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  static inline void two_rows(const uint16_t* one, const uint16_t* two, Split* out) {
    vec both[2];
    dwords(moe_fn::load(one), moe_fn::load(two), both);
    out[0] = {both[0]}, out[1] = {both[1]};
  }
#else
  struct Split { vec first, second; };
  static inline Split split(vec b) { return {(vec)((veci)b << 16), (vec)((veci)b & splat_int(int32_t(0xffff0000)))}; }
  static inline vec mac(vec sum, const float* a, Split b) {
    uint32_t u, one, two; std::memcpy(&u, a, 4);
    one = u << 16, two = u & 0xffff0000u;
    float x, y; std::memcpy(&x, &one, 4); std::memcpy(&y, &two, 4);
    return sum + splat(x) * b.first + splat(y) * b.second;
  }
  static inline void two_rows(const uint16_t* one, const uint16_t* two, Split* out) {
    out[0] = {widen(one), widen(two)}, out[1] = {widen(one + WIDTH), widen(two + WIDTH)};
  }
  static inline vec dot(vec sum, vec a, vec b) { Split p = split(a), q = split(b); return sum + p.first * q.first + p.second * q.second; }
#endif
  static inline vec load(const uint16_t* p) { return widen(p); }
  static inline void store(uint16_t* p, vec v) { narrow(p, v); }
};
// float32 products of pairs that are widened. A row's dwords are widened once, and not in every broadcast: "mac" takes a pair of float32.
struct F16 {
  using Element = Half;
  static constexpr int PER_DWORD = 2;
  struct Split { vec first, second; };
  static inline Split split(vec b) {
#if defined(__F16C__)
    typedef uint16_t pairs __attribute__((vector_size(WIDTH * 4)));
    const pairs p = (pairs)b;
#if defined(__AVX512F__)
    const pairs apart = __builtin_shufflevector(p, p, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    const pairs apart = __builtin_shufflevector(p, p, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
    vech x[2];
    std::memcpy(x, &apart, sizeof apart);
    return {widen_half(x[0]), widen_half(x[1])};
#else
    return {widen_code((veci)b & 0xffff), widen_code(((veci)b >> 16) & 0xffff)};
#endif
  }
  static inline vec mac(vec sum, const float* pair, Split b) { return sum + splat(pair[0]) * b.first + splat(pair[1]) * b.second; }
  static inline vec dot(vec sum, vec a, vec b) {  // lanes of the first half of each vector, then of the second: no shuffles
    vech x[2], y[2];
    std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b);
    return sum + widen_half(x[0]) * widen_half(y[0]) + widen_half(x[1]) * widen_half(y[1]);
  }
  static inline void step(const Half* one, const Half* two, vec* out) { BF16::step((const uint16_t*)one, (const uint16_t*)two, out); }
  static inline void two_rows(const Half* one, const Half* two, Split* out) {
    out[0] = {widen(one), widen(two)}, out[1] = {widen(one + WIDTH), widen(two + WIDTH)};
  }
  static inline vec load(const Half* p) { return widen(p); }
  static inline void store(Half* p, vec v) { narrow(p, v); }
};
// Floats that "mac" reads for a dword of a row.
template <class D>
constexpr int WIDENED = 1;
template <>
constexpr int WIDENED<F16> = 2;
// Dwords of a row, as "mac" reads them: where they lie, or widened in `out`, which holds a whole vector at least.
template <class D, int DWORDS>
static inline const float* for_mac(const float* row, float* out) {
  if constexpr (WIDENED<D> == 1) {
    return row;
  } else {
    typename D::Element from[std::max(2 * DWORDS, WIDTH)] = {};
    std::memcpy(from, row, 4 * DWORDS);
#pragma GCC unroll 4
    for (int i = 0; i < 2 * DWORDS; i += WIDTH) store(out + i, D::load(from + i));
    return out;
  }
}

struct Int8;  // decode.h
// Whether products of D run on AMX tiles (amx.h); rows of a full block of packed rows, the largest number that `tiles` takes; and how many of
// them take as long as one.
#if defined(MOE_FN_EMULATED_AMX) || (defined(__AMX_TILE__) && defined(__AMX_BF16__))
#define MOE_FN_AMX
#endif
template <class D>
constexpr bool TILED = false;
#if defined(MOE_FN_AMX)
template <>
constexpr bool TILED<BF16> = true;
template <>
constexpr bool TILED<Int8> = true;
#endif
template <class D>
constexpr int ROWS_OF = TILED<D> ? 32 : MAX_ROWS;
template <class D>
constexpr int ROWS_TOGETHER = TILED<D> ? 16 : 1;

}  // namespace moe_fn
