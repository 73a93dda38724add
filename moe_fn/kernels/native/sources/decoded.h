// Products of many rows with quantized weights: steps of a panel are decoded once into a panel of floats that stays in L2, and multiplied by
// the tiles of float weights. Codes times the scale of their tile are rounded to the type of the rows, as `decoded` of moe_fn.quant.codes does;
// a single scale of a column multiplies sums. With few rows decoding would cost more than the products (quantized.h).
#pragma once
#include "quantized.h"

namespace moe_fn {

constexpr int DECODED_FROM = 24;  // rows of an expert
// Pairs of bfloat16, rounded to nearest, ties to even.
static inline vec rounded_pair(vec first, vec second) {
#if defined(__AVX512BF16__)
  typedef uint16_t words __attribute__((vector_size(64)));
  const words both = (words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (vec)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  auto rounded = [](vec v) {
    const veci u = (veci)v;
    return (veci)select(v == v, (vec)(u + 0x7fff + ((u >> 16) & 1)), (vec)splat_int(0x7fc00000)) & splat_int(int32_t(0xffff0000));
  };
  return pair_of((vec)rounded(first), (vec)rounded(second));
#endif
}

// The matrix of quantized weights as floats.
template <class D>
static inline Weight as_floats(const Weight& w) {
  return {nullptr, 0, w.columns, w.inner, int(sizeof(typename D::Element)), false, true, w.gated, w.interleaved};
}

// Panels of floats of one expert, decoded when they are multiplied. C: decodes to float32, in the order of the inputs.
template <class D, class C>
struct DecodedPanels : Panels<D> {
  static constexpr int PER = C::INPUTS / D::PER_DWORD;  // steps of a dword of codes
  const Weight& coded;
  int64_t expert;
  const char* next;
  C code;
  DecodedPanels(const Weight& floats, const Weight& coded, int64_t expert, const float* next)
      : Panels<D>(floats, 0), coded(coded), expert(expert), next((const char*)next), code(*coded.codes) {}
  bool suits_dots(int64_t) const { return false; }
  static int64_t scratch_floats(const Weight& w) {
    const int64_t steps = round_up(block_steps<D>(as_floats<D>(w)), PER);
    return steps * PANEL + (w.prepared ? 0 : steps / PER * PANEL);
  }
  const float* get(int panel, int, int end, int first, int count, float* scratch) const {
    const int dword = first / PER, last = (first + count + PER - 1) / PER;
    const char *from, *ahead;
    if (coded.prepared) {
      from = (const char*)(panel_at(coded, expert, panel) + dword * PANEL);
      ahead = panel + 1 < end ? from + int64_t(coded.steps()) * PANEL * 4 : next ? next : from;
    } else {
      float* laid = scratch + int64_t(last - dword) * PER * PANEL;
      lay_transposed(coded, coded.data + expert * coded.expert_bytes, columns_of(coded, panel), dword, last - dword, laid);
      from = ahead = (const char*)laid;
    }
    const Codes& q = *coded.codes;
    if (q.zero) q.global_scale ? decode<true, true, true, false>(panel, dword, last, from, ahead, scratch) : decode<true, true, false, false>(panel, dword, last, from, ahead, scratch);
    else if (q.scales_sums()) q.in_tiles == 1 ? decode<false, false, false, true>(panel, dword, last, from, ahead, scratch) : decode<false, true, false, true>(panel, dword, last, from, ahead, scratch);
    else q.global_scale ? decode<false, true, true, false>(panel, dword, last, from, ahead, scratch) : decode<false, true, false, false>(panel, dword, last, from, ahead, scratch);
    if (D::PER_DWORD == 2 && coded.inner % 2 && first + count == this->w.steps())  // x may be infinite, and a row's padding is 0
      for (int c = 0; c < PANEL; c++) ((uint16_t*)(scratch + int64_t(count - 1) * PANEL))[2 * c + 1] = 0;
    return scratch;
  }
  // Multiplies sums of `rows` rows by the scales that weights were not multiplied by.
  static void scale(const Weight& coded, int64_t expert, int panel, int rows, float* c) {
    const Codes& q = *coded.codes;
    const TilesOfPanel tiles(coded, expert, panel);
    tiles.read(0, 1, [&](int64_t, int v, vec s, vec) {
      vec left = q.in_tiles == 1 ? s * q.unit() : splat(1.f);
      if (q.global_scale) left = left * load(tiles.global + v * WIDTH);
      for (int r = 0; r < rows; r++) store(c + r * PANEL + v * WIDTH, load(c + r * PANEL + v * WIDTH) * left);
    });
  }

 private:
  // ZERO: with zero points; SCALED: multiplied by the scales of tiles, GLOBAL: also by those above; EXACT: no bfloat16 needs rounding.
  template <bool ZERO, bool SCALED, bool GLOBAL, bool EXACT>
  void decode(int panel, int dword, int last, const char* from, const char* ahead, float* to) const {
    const Codes& q = *coded.codes;
    const TilesOfPanel tiles(coded, expert, panel);
    const int of_tile = q.in_tiles == 1 ? coded.steps() : int(q.tile_in / q.inputs_per_dword());
    const float unit = q.unit(), offset = q.offset(false);
    const C here = code;  // a copy, so that its tables are in registers
    const int64_t distance = ahead - from;
    vec scales[NV], zeros[NV];
    int at = dword;
    tiles.read(dword / of_tile, (last - 1) / of_tile + 1, [&](int64_t t, int v, vec s, vec z) __attribute__((always_inline)) {
      scales[v] = s * unit;
      if (ZERO) zeros[v] = (z + offset) / unit;
      if (v < NV - 1) return;
      vec scale[NV], zero[NV], global[NV];  // not in memory, which stores may change
#pragma GCC unroll 8
      for (int u = 0; u < NV; u++) {
        scale[u] = scales[u];
        if (ZERO) zero[u] = zeros[u];
        if (GLOBAL) global[u] = load(tiles.global + u * WIDTH);
      }
      const char* w = from + int64_t(at - dword) * (PANEL * 4);
      float* out = to + int64_t(at - dword) * PER * PANEL;
      const int stop = std::min(last, (int(t) + 1) * of_tile);
      for (int left = stop - at; left > 0; left--, w += PANEL * 4, out += PER * PANEL) {
        for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch(w + distance + line, 0, 2);
#pragma GCC unroll 8
        for (int u = 0; u < NV; u++) {
          const typename C::Open open = here.open((veci)load(w + u * WIDTH * 4));
          auto value = [&](int j) __attribute__((always_inline)) {
            vec x = here.part(open, j);
            if (ZERO) x = x - zero[u];
            if (SCALED) x = x * scale[u];
            return GLOBAL ? x * global[u] : x;
          };
#pragma GCC unroll 8
          for (int j = 0; j < PER; j++)
            store(out + j * PANEL + u * WIDTH, D::PER_DWORD == 1 ? value(j) : EXACT ? pair_of(value(2 * j), value(2 * j + 1)) : rounded_pair(value(2 * j), value(2 * j + 1)));
        }
      }
      at = stop;
    });
  }
};

// The multiplication of many rows; rows are packed as for float weights.
template <class D, class C>
struct Decoded {
  using Region = moe_fn::Region<D>;
  static int row_dwords(const Weight& w) { return padded_steps(as_floats<D>(w)); }
  static int64_t row_bytes(const Weight& w) { return w.inner * int64_t(sizeof(typename D::Element)); }
  static bool in_blocks(const Weight& w) { return Floats<D>::in_blocks(as_floats<D>(w)); }
  static int64_t sums_floats(const Weight& w, int rows, int panels) { return Floats<D>::sums_floats(as_floats<D>(w), rows, panels); }
  static int64_t scratch_floats(const Weight& w) { return DecodedPanels<D, C>::scratch_floats(w); }
  static void run(const RowBlock* blocks, int count, auto rows, const Weight& w, int64_t expert, int first, int last, const float* next, float* sums,
                  float* scratch, auto before, auto epilogue) {
    const Weight floats = as_floats<D>(w);
    const bool scales = w.codes->scales_sums() && (w.codes->in_tiles == 1 || w.codes->global_scale);
    multiply<D>(blocks, count, rows, DecodedPanels<D, C>(floats, w, expert, next), first, last, nullptr, sums, scratch, before, [&](int p, int b, float* c) {
      if (scales) DecodedPanels<D, C>::scale(w, expert, p, blocks[b].rows, c);
      epilogue(p, b, c);
    });
  }
};

// The multiplication of each block by Q or by M.
template <class Q, class M>
struct Either {
  using Region = typename M::Region;
  static int64_t sums_floats(const Weight& w, int rows, int panels) { return std::max(Q::sums_floats(w, rows, panels), M::sums_floats(w, rows, panels)); }
  static int64_t scratch_floats(const Weight& w) { return std::max(Q::scratch_floats(w), M::scratch_floats(w)); }
  static void run(const RowBlock* blocks, int count, auto... rest) {
    blocks[0].decoded ? M::run(blocks, count, rest...) : Q::run(blocks, count, rest...);
  }
};

}  // namespace moe_fn
