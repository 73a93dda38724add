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
  // Of decoded weights: one scale of a column multiplies sums; codes, or codes times the other scales, are exact in bfloat16.
  bool scales_sums() const { return !zero && (in_tiles == 1 || (scheme == Scheme::e2m1 && (scale_type == ScaleType::e8m0 || scale_type == ScaleType::e4m3))); }
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
  const vec normal = (vec)((m << 20) + splat_int(120 << 23)), finite = m < 8 ? 2.f * normal - 0x1p-6f : normal;
  return with_sign(m == 0x7f ? (vec)splat_int(0x7fc00000) : finite, code, 7);
}

static inline vec scales_at(ScaleType type, const void* p) {  // WIDTH consecutive scales
  switch (type) {
    case ScaleType::f32: return load(p);
    case ScaleType::bf16: return widen((const uint16_t*)p);
    case ScaleType::f16: return widen((const Half*)p);
    case ScaleType::e8m0: {
      const veci s = integers((const uint8_t*)p);
      return (vec)(s == 0 ? splat_int(0x00400000) : s == 255 ? splat_int(0x7fc00000) : s << 23);
    }
    case ScaleType::e4m3: return e4m3(integers((const uint8_t*)p));
  }
  return vec{};
}

// Where the scales and zero points of a panel's columns are: 32 for each tile along the inner dimension.
struct TilesOfPanel {
  const Weight& w;
  const Codes& q;
  int64_t first;        // of prepared weights
  int64_t row[PANEL];   // of each column, of plain weights
  float global[PANEL];  // the scales above those of the tiles
  TilesOfPanel(const Weight& w, int64_t expert, int panel) : w(w), q(*w.codes), first((expert * w.panels() + panel) * w.codes->in_tiles * PANEL) {
    if (w.prepared && !q.global_scale) return;
    const Columns from = columns_of(w, panel);
    const int64_t of_half = w.columns / q.halves;
    for (int c = 0; c < PANEL; c++) {
      const int half = c / (PANEL / 2), i = c % (PANEL / 2);
      const int64_t column = i < from.count[half] ? from.start[half] + int64_t(i) * from.stride : 0;
      const int64_t of = q.halves == 1 ? 0 : column / of_half;
      if (q.global_scale) global[c] = q.global_scale[expert * q.halves + of];
      if (!w.prepared) row[c] = expert * q.out_tiles + of * (q.out_tiles / q.halves) + (column - of * of_half) / q.tile_out;
    }
  }
  // some(t, v, scales, zero points) of WIDTH columns each, for tiles [from, to).
  template <class Some>
  void read(int64_t from, int64_t to, Some some) const {
    switch (q.scale_type) {
      case ScaleType::f32: return read<ScaleType::f32>(from, to, some);
      case ScaleType::bf16: return read<ScaleType::bf16>(from, to, some);
      case ScaleType::f16: return read<ScaleType::f16>(from, to, some);
      case ScaleType::e8m0: return read<ScaleType::e8m0>(from, to, some);
      case ScaleType::e4m3: return read<ScaleType::e4m3>(from, to, some);
    }
  }

 private:
  template <ScaleType TYPE, class Some>
  void read(int64_t from, int64_t to, Some some) const {
    constexpr int size = TYPE == ScaleType::f32 ? 4 : TYPE == ScaleType::bf16 || TYPE == ScaleType::f16 ? 2 : 1;
    const int64_t next = w.prepared ? q.in_tiles * PANEL * size : 0;
    const vec symmetric = splat(q.symmetric_zero());
    for (int64_t t = from; t < to; t++) {
      char raw[PANEL * 4];
      uint8_t zeros[PANEL];
      const char* scales = static_cast<const char*>(q.scale) + (first + t * PANEL) * size;
      const uint8_t* zero = q.zero ? q.zero + first + t * PANEL : nullptr;
      if (next) {
        for (int line = 0; line < PANEL * size; line += 64) __builtin_prefetch(scales + next + line, 0, 2);  // of the next panel
      } else {
        for (int c = 0; c < PANEL; c++) {
          std::memcpy(raw + c * size, static_cast<const char*>(q.scale) + (row[c] * q.in_tiles + t) * size, size);
          if (zero) zeros[c] = q.zero[row[c] * q.in_tiles + t];
        }
        scales = raw;
        zero = zero ? zeros : nullptr;
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) some(t, v, scales_at(TYPE, scales + v * WIDTH * size), zero ? __builtin_convertvector(integers(zero + v * WIDTH), vec) : symmetric);
    }
  }
};

// Scales of all tiles of a panel, and the corrections: a sum gets correction * (sum of x) before it is scaled. Without zero points all tiles
// have the same correction, which is stored once.
static inline void panel_scales(const Weight& w, int64_t expert, int panel, bool bf16, float* scale, float* correction) {
  const Codes& q = *w.codes;
  const TilesOfPanel tiles(w, expert, panel);
  const float offset = q.offset(bf16), unit = q.unit();
  auto some = [&]<bool ZERO, bool GLOBAL>() {
    tiles.read(0, q.in_tiles, [=, &tiles](int64_t t, int v, vec s, vec z) __attribute__((always_inline)) {
      const int64_t at = t * PANEL + v * WIDTH;
      store(scale + at, (GLOBAL ? s * load(tiles.global + v * WIDTH) : s) * unit);
      if (ZERO) store(correction + at, -(z + offset) / unit);
    });
  };
  if (q.zero) q.global_scale ? some.template operator()<true, true>() : some.template operator()<true, false>();
  else q.global_scale ? some.template operator()<false, true>() : some.template operator()<false, false>();
  if (!q.zero)
    for (int v = 0; v < NV; v++) store(correction + v * WIDTH, splat(-(q.symmetric_zero() + offset) / unit));
}

}  // namespace moe_fn
