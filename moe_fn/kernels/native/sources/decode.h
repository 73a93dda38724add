// Decodes weights in registers: a vector of dwords, each with 8 or 4 codes of a column, becomes PER vectors of dwords, the operands of
// products. The order of inputs in a dword is chosen for cheap decoding, and rows of x are permuted to match (coded_rows.h).
#pragma once
#include <type_traits>

#include "codes.h"

namespace moe_fn {

// Four int8 of x times four uint8 of weights.
struct Int8 {
  static constexpr int PER_DWORD = 4;
  struct Split { veci all; };
  static inline Split split(vec b) { return {(veci)b}; }
  static inline veci mac(veci sum, const float* a, Split b) {
    int32_t x; std::memcpy(&x, a, 4);
#if defined(__AVX512VNNI__)
    return (veci)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b.all, _mm512_set1_epi32(x));
#else
    return sum + (b.all & 255) * int8_t(x) + ((b.all >> 8) & 255) * int8_t(x >> 8) + ((b.all >> 16) & 255) * int8_t(x >> 16) + ((b.all >> 24) & 255) * (x >> 24);
#endif
  }
};
template <class D> struct SumOf { using type = vec; };
template <> struct SumOf<Int8> { using type = veci; };
static inline vec to_float(vec sum) { return sum; }
static inline vec to_float(veci sum) { return __builtin_convertvector(sum, vec); }

static inline uint16_t bfloat_of(float f) {  // of values that are exact in bfloat16
  uint32_t u; std::memcpy(&u, &f, 4);
  return uint16_t(u >> 16);
}
static inline vec pair_of(vec first, vec second) {  // both exact in bfloat16: their low 16 bits are 0
  typedef uint32_t unsigned_lanes __attribute__((vector_size(WIDTH * 4)));
  return (vec)((unsigned_lanes)second | ((unsigned_lanes)first >> 16));
}
static inline vec e2m1(veci code) {
  const veci m = code & 7;
  return with_sign(small_float<1, 1>(m, m > 7), code, 3);
}

// 4-bit codes. A dword's codes k0..k7 become pairs (k0, k4), (k1, k5), (k2, k6), (k3, k7) of bfloat16, (k0, k2, k4, k6), (k1, k3, k5, k7) of
// 8 bits, and k0..k7 of float32. Table lookups need no mask, because they index with the low bits of a lane. As bfloat16 integers become 16 + k,
// whose mantissa is the code: a shift, an AND and an OR, which run on any port of the CPU, while lookups share a port with the products.
template <class D, bool FLOATS>
struct Nibbles {
  using Dot = D;
  using Open = veci;
  static constexpr int INPUTS = 8, PER = 8 / D::PER_DWORD;
  alignas(64) uint16_t table16[32];
  alignas(64) float table[16];
  explicit Nibbles(const Codes&) {
    for (int i = 0; i < 16; i++) {
      constexpr float magnitude[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
      table[i] = !FLOATS ? float(i - 8) : i < 8 ? magnitude[i] : -magnitude[i - 8];
      table16[i] = table16[i + 16] = bfloat_of(table[i]);
    }
  }
  static vec value(veci code) { return FLOATS ? e2m1(code) : __builtin_convertvector((code & 15) - 8, vec); }
  Open open(veci w) const { return w; }
  vec part(Open w, int j) const {
    if constexpr (std::is_same_v<D, Int8>) {
      return (vec)((w >> (4 * j)) & 0x0f0f0f0f);
    } else if constexpr (std::is_same_v<D, F32>) {
#if defined(__AVX512F__)
      return (vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(w >> (4 * j)), (__m512)load(table));
#else
      return value(w >> (4 * j));
#endif
    } else if constexpr (!FLOATS) {
      const veci shifted = j ? w >> (4 * j - 3) : w << 3;
      return (vec)((shifted & 0x00780078) | 0x41804180);
    } else {
#if defined(__AVX512BW__)
      return (vec)_mm512_permutexvar_epi16((__m512i)(w >> (4 * j)), (__m512i)load(table16));
#else
      return pair_of(value(w >> (4 * j)), value(w >> (4 * j + 16)));
#endif
    }
  }
};

// 8-bit codes: k0..k3 of a dword become (k0, k2), (k1, k3) of bfloat16; k0..k3 of float32; (k0, k1, k2, k3) of 8 bits.
template <class D, bool FLOATS>
struct Bytes {
  using Dot = D;
  struct Open { veci even, odd; };
  static constexpr int INPUTS = 4, PER = 4 / D::PER_DWORD;
  int32_t flip;  // XOR that converts codes to two's complement, or for int8 rows to 0..255
  alignas(64) uint8_t low[128], high[128];  // the bytes of the bfloat16 of a magnitude
  explicit Bytes(const Codes& q) : flip(!FLOATS && (std::is_same_v<D, Int8> == q.is_signed) ? int32_t(0x80808080) : 0) {
    for (int i = 0; i < 128; i += WIDTH) {
      veci code;
      for (int j = 0; j < WIDTH; j++) code[j] = i + j;
      const vec value = e4m3(code);
      for (int j = 0; j < WIDTH; j++) low[i + j] = uint8_t(bfloat_of(value[j])), high[i + j] = uint8_t(bfloat_of(value[j]) >> 8);
    }
  }
  // Converts a code in the top byte of a lane to float32: an integer times 2^24, which the scale divides out (two instructions fewer).
  static vec value(veci top) { return FLOATS ? e4m3(top >> 24) : __builtin_convertvector(top, vec); }
  Open open(veci w) const {
    w ^= flip;
    if constexpr (std::is_same_v<D, Int8> || (std::is_same_v<D, F32> && !FLOATS)) {
      return {w, w};
    } else {
#if defined(__AVX512VBMI__)
      if constexpr (FLOATS) {
        const __m512i l = _mm512_permutex2var_epi8((__m512i)load(low), (__m512i)w, (__m512i)load(low + 64));
        __m512i h = _mm512_permutex2var_epi8((__m512i)load(high), (__m512i)w, (__m512i)load(high + 64));
        h = _mm512_ternarylogic_epi32(h, (__m512i)w, _mm512_set1_epi8(-128), 0xf8);  // h | (w & sign)
        const __m512i byte = _mm512_set1_epi16(255);
        return {(veci)_mm512_ternarylogic_epi32(byte, l, _mm512_slli_epi16(h, 8), 0xca),  // low bytes of l, high bytes of h << 8
                (veci)_mm512_ternarylogic_epi32(byte, _mm512_srli_epi16(l, 8), h, 0xca)};
      }
#endif
      const veci top = splat_int(int32_t(0xff000000));
      return {(veci)pair_of(value(w << 24), value((w << 8) & top)), (veci)pair_of(value((w << 16) & top), value(w & top))};
    }
  }
  vec part(Open w, int j) const {
    if constexpr (!std::is_same_v<D, F32>) return (vec)(j ? w.odd : w.even);
    if constexpr (!FLOATS) return value((w.even << (24 - 8 * j)) & splat_int(int32_t(0xff000000)));
    const veci pair = j % 2 ? w.odd : w.even;
    return (vec)(j < 2 ? pair << 16 : pair & splat_int(int32_t(0xffff0000)));
  }
};

}  // namespace moe_fn
