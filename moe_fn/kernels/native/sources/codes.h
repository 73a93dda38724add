// Quantized weights: the values of their codes and scales.
//   weight[column, k] = (code[column, k] - zero) * scale * global_scale,  scale and zero of the tile of (column, k)
// Codes are bytes along the inner dimension; a byte has two 4-bit codes, the even input in the low nibble. Every code is exact in bfloat16.
#pragma once
#include <vector>

#include "panels.h"

namespace moe_fn {

enum class Scheme { int4, int8, e4m3, e2m1 };
static inline int codes_in_byte(Scheme scheme) { return scheme == Scheme::int4 || scheme == Scheme::e2m1 ? 2 : 1; }
enum class ScaleType { f32, bf16, f16, e8m0, e4m3 };

// Dwords [first, first + count) of a column, with one scale: their products are summed from zero, in registers.
struct Span { int first, count, tile; };
constexpr int SPAN_INPUTS = 256;  // maximum: sums of int8 products are exact in float32, and a span of a decoded panel fits in L1

struct Codes {
  Scheme scheme;
  bool int8_rows;  // rows of x are int8 codes with one scale each
  ScaleType scale_type;
  const void* scale;         // [experts, out_tiles, in_tiles]; prepared: [experts, panels, in_tiles, 32]
  const uint8_t* zero;       // as scale, or null
  const float* global_scale; // [experts, halves], or null
  int64_t halves, out_tiles, in_tiles, tile_out, tile_in;
  bool is_signed;            // int8: the payload is two's complement, not 0..255
  std::vector<Span> spans;

  int inputs_per_dword() const { return 4 * codes_in_byte(scheme); }
  // Operands of products are codes plus an offset, which makes decoding exact and cheap (decode.h); sums of x subtract it again.
  float offset(bool bf16) const { return int8_rows ? 0.f : scheme == Scheme::int4 ? (bf16 ? 16.f : -8.f) : scheme == Scheme::int8 ? -128.f : 0.f; }
  float unit() const { return scheme == Scheme::int8 && !int8_rows ? 0x1p-24f : 1.f; }  // of an operand
  float symmetric_zero() const { return scheme == Scheme::int4 ? 8.f : scheme == Scheme::int8 ? 128.f : 0.f; }
  bool corrected(bool bf16) const { return zero || offset(bf16) + symmetric_zero() != 0; }

  void make_spans(int steps) {
    const int per = inputs_per_dword(), limit = SPAN_INPUTS / per;
    const int tile = in_tiles == 1 ? steps : int(tile_in / per), parts = (tile + limit - 1) / limit;
    const int most = parts == 1 ? tile : std::min(limit, ((tile + parts - 1) / parts + 15) / 16 * 16);
    for (int t = 0; t * tile < steps; t++)
      for (int first = t * tile, end = std::min(first + tile, steps); first < end; first += most) spans.push_back({first, std::min(most, end - first), t});
  }
};

// float32 of small floats with BITS bits of mantissa, exponent bias BIAS and subnormals; given as integers in lanes without their sign.
template <int BITS, int BIAS>
static inline vec small_float(veci magnitude, veci not_a_number) {
  const vec normal = (vec)((magnitude << (23 - BITS)) + splat_int((127 - BIAS) << 23));
  const vec subnormal = __builtin_convertvector(magnitude, vec) * (1.f / float(int64_t(1) << (BITS + BIAS - 1)));
  const vec finite = select(magnitude < (1 << BITS), subnormal, normal);
  return select(not_a_number, (vec)((magnitude << (23 - BITS)) | splat_int(0x7f800000)), finite);
}
static inline vec with_sign(vec magnitude, veci code, int place) {
  return (vec)((veci)magnitude | ((code << (31 - place)) & splat_int(INT32_MIN)));
}
static inline vec e4m3(veci code) {
  const veci m = code & 0x7f;
  return with_sign(small_float<3, 7>(m, m == 0x7f), code, 7);
}

static inline int size_of(ScaleType type) { return type == ScaleType::f32 ? 4 : type == ScaleType::bf16 || type == ScaleType::f16 ? 2 : 1; }
static inline vec scales_at(ScaleType type, const void* p) {  // WIDTH consecutive scales
  switch (type) {
    case ScaleType::f32: return load(p);
    case ScaleType::bf16: return widen((const uint16_t*)p);
    case ScaleType::f16: return widen((const Half*)p);
    case ScaleType::e8m0: {
      const veci s = integers((const uint8_t*)p);
      return select(s == 0, (vec)splat_int(0x00400000), select(s == 255, (vec)splat_int(0x7fc00000), (vec)(s << 23)));
    }
    case ScaleType::e4m3: return e4m3(integers((const uint8_t*)p));
  }
  return vec{};
}

// Scales of a panel's columns, 32 for each tile along the inner dimension, and the corrections: a sum gets correction * (sum of x) before
// it is scaled.
static inline void panel_scales(const Weight& w, int64_t expert, int panel, bool bf16, float* scale, float* correction) {
  const Codes& q = *w.codes;
  const bool corrected = q.corrected(bf16);
  const float offset = q.offset(bf16), unit = q.unit();
  const int size = size_of(q.scale_type);
  const Columns from = columns_of(w, panel);
  float global[PANEL];
  int64_t row[PANEL];
  const int64_t of_half = w.columns / q.halves;
  for (int c = 0; c < PANEL; c++) {
    const int half = c / (PANEL / 2), i = c % (PANEL / 2);
    const int64_t column = i < from.count[half] ? from.start[half] + int64_t(i) * from.stride : 0;
    if (q.global_scale) global[c] = q.global_scale[expert * q.halves + column / of_half];
    if (!w.prepared) row[c] = expert * q.out_tiles + column / of_half * (q.out_tiles / q.halves) + column % of_half / q.tile_out;
  }
  const int64_t first = (expert * w.panels() + panel) * q.in_tiles * PANEL;
  for (int64_t t = 0; t < q.in_tiles; t++, scale += PANEL, correction += PANEL) {
    char raw[PANEL * 4];
    uint8_t zeros[PANEL];
    const char* scales = static_cast<const char*>(q.scale) + (first + t * PANEL) * size;
    const uint8_t* zero = q.zero ? q.zero + first + t * PANEL : nullptr;
    if (w.prepared) {
      for (int line = 0; line < PANEL * size; line += 64) __builtin_prefetch(scales + q.in_tiles * PANEL * size + line, 0, 2);  // of the next panel
    } else {
      for (int c = 0; c < PANEL; c++) {
        std::memcpy(raw + c * size, static_cast<const char*>(q.scale) + (row[c] * q.in_tiles + t) * size, size);
        if (zero) zeros[c] = q.zero[row[c] * q.in_tiles + t];
      }
      scales = raw;
      zero = zero ? zeros : nullptr;
    }
    for (int v = 0; v < NV; v++) {
      const vec s = scales_at(q.scale_type, scales + v * WIDTH * size);
      store(scale + v * WIDTH, (q.global_scale ? s * load(global + v * WIDTH) : s) * unit);
      if (!corrected) continue;
      const vec z = zero ? __builtin_convertvector(integers(zero + v * WIDTH), vec) : splat(q.symmetric_zero());
      store(correction + v * WIDTH, -(z + offset) / unit);
    }
  }
}

}  // namespace moe_fn
