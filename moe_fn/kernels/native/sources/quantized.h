// Products with quantized weights. For each span of the inner dimension, dwords are decoded and their products summed from zero in registers,
// then   total += (sum + correction[column] * (sum of x)) * scale[column]
// Weights are decoded in registers and used immediately by up to 12 rows (6 without bfloat16 products). With vectors shorter than AVX-512's,
// several blocks of rows share a span of a panel that is decoded to memory. Both add in the same order, so a token's bits do not depend on
// the batch. Experts with many rows are multiplied by decoded.h instead, unless the config is batch_invariant.
#pragma once
#include "coded_rows.h"

namespace moe_fn {

#if defined(__AVX512BF16__)
constexpr int FEW_ROWS = 12;  // 12 x 2 vectors of sums; the other registers decode
#else
constexpr int FEW_ROWS = WIDTH == 16 ? 6 : MAX_ROWS;  // a pair of bfloat16 takes two vectors, and 12 rows would take a minute to compile
#endif
constexpr int BLOCK_ROWS = WIDTH == 16 ? FEW_ROWS : MAX_ROWS;

// A panel's scales and corrections.
struct PanelScales { const float *scale, *correction; int pitch; };  // pitch: between the corrections of two tiles

template <class Sum>
static inline vec scaled(vec total, Sum sum, const PanelScales& s, int tile, int v, bool corrected, float sum_of_x) {
  vec x = to_float(sum);
  if (corrected) x = x + load(s.correction + tile * s.pitch + v * WIDTH) * sum_of_x;
  return total + x * load(s.scale + tile * PANEL + v * WIDTH);
}

// c[ROWS][32] = rows times one panel. Few rows of 4-bit codes process two spans at a time, because a single chain of sums is latency-bound. Four
// at a time are faster in cache, but as many streams from memory are slower: 0.61 instead of 0.84 of the read rate (1 row, 2 cores of a Zen 5).
template <class C, int ROWS>
void few(const Weight& w, const C& code, const float* a, const char* b, const PanelScales& scales, float* c, int64_t ahead) {
  using D = typename C::Dot;
  using Sum = typename SumOf<D>::type;
  const Codes& q = *w.codes;
  const C here = code;  // a copy, so that its tables are in registers
  const bool corrected = q.corrected(RowShape<C>::BF16_ROWS);
  const float* extra = a + int64_t(RowShape<C>(w).dwords) * ROWS;
  constexpr size_t pitch = size_t(ROWS) * CHUNK;
  vec total[ROWS][NV] = {};
  const Span* spans = q.spans.data();
  const int count = int(q.spans.size());
  const char* next = b + ahead;  // in the order of memory, not of the products
  int at = 0;
  auto some = [&]<int SPANS>(std::integral_constant<int, SPANS>) __attribute__((always_inline)) {
    Sum sum[SPANS][ROWS][NV] = {};
    const char* from[SPANS];
    const float* x[SPANS];
    for (int s = 0; s < SPANS; s++) {
      const unsigned step = spans[at + s].first, dword = step * C::PER;
      from[s] = b + size_t(step) * (PANEL * 4);
      x[s] = a + size_t(dword / CHUNK) * pitch + dword % CHUNK;
    }
    auto step = [&](int s, int i) __attribute__((always_inline)) {
      const char* w = from[s] + i * (PANEL * 4);
#pragma GCC unroll 2
      for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch(next + line, 0, 2);
      next += PANEL * 4;
      typename C::Open open[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) open[v] = here.open((veci)load(w + v * WIDTH * 4));
#pragma GCC unroll 8
      for (int j = 0; j < C::PER; j++) {
        typename D::Split part[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) part[v] = D::split(here.part(open[v], j));
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
          for (int v = 0; v < NV; v++) sum[s][r][v] = D::mac(sum[s][r][v], x[s] + i * C::PER + r * CHUNK + j, part[v]);
      }
    };
    // Whole chunks of x, where every displacement is a constant; a short span is a part of a chunk.
    constexpr int IN_CHUNK = CHUNK / C::PER, TOGETHER = IN_CHUNK < 4 ? IN_CHUNK : 4;
    const bool whole = spans[at].first % IN_CHUNK == 0;
    int left = spans[at].count;
    for (; whole && left >= IN_CHUNK; left -= IN_CHUNK) {
      for (int i = 0; i < IN_CHUNK; i += TOGETHER) {
#pragma GCC unroll 4
        for (int k = 0; k < TOGETHER; k++)
#pragma GCC unroll 4
          for (int s = 0; s < SPANS; s++) step(s, k);
#pragma GCC unroll 4
        for (int s = 0; s < SPANS; s++) from[s] += TOGETHER * PANEL * 4, x[s] += TOGETHER * C::PER;
      }
#pragma GCC unroll 4
      for (int s = 0; s < SPANS; s++) x[s] += pitch - CHUNK;
    }
    for (unsigned next = spans[at].first + spans[at].count - left; left > 0; left--) {
#pragma GCC unroll 4
      for (int s = 0; s < SPANS; s++) step(s, 0), from[s] += PANEL * 4, x[s] += C::PER;
      if (++next % IN_CHUNK == 0)
        for (int s = 0; s < SPANS; s++) x[s] += pitch - CHUNK;
    }
#pragma GCC unroll 4
    for (int s = 0; s < SPANS; s++, at++) {
      const float* sums_of_x = extra + (1 + at) / CHUNK * pitch + (1 + at) % CHUNK;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++)
          total[r][v] = scaled(total[r][v], sum[s][r][v], scales, spans[at].tile, v, corrected, corrected ? sums_of_x[r * CHUNK] : 0.f);
    }
  };
  auto alike = [&](int many) {  // spans of equal length at the same offsets in chunks, or within one chunk
    constexpr int IN_CHUNK = CHUNK / C::PER;
    const int of_chunk = std::min(spans[at].count, IN_CHUNK);
    if (spans[at].first % of_chunk || spans[at].count % of_chunk || IN_CHUNK % of_chunk) return false;
    for (int s = 0; s < many; s++)
      if (at + s >= count || spans[at + s].count != spans[at].count || spans[at + s].first != spans[at].first + s * spans[at].count) return false;
    return true;
  };
  while (at < count) {
    if constexpr (WIDTH == 16 && ROWS <= 3 && C::INPUTS == 8)
      if (alike(2)) { some(std::integral_constant<int, 2>{}); continue; }
    some(std::integral_constant<int, 1>{});
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < NV; v++) store(c + r * PANEL + v * WIDTH, std::is_same_v<D, Int8> ? total[r][v] * extra[r * CHUNK] : total[r][v]);
}

// Decodes a span of a panel to [dwords of products][32].
template <class C>
inline void decode(const C& code, const Span& span, const char* panel, const char* ahead, float* out) {
  const C here = code;
  for (int i = span.first; i < span.first + span.count; i++, out += C::PER * PANEL) {
    for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch(ahead + int64_t(i) * (PANEL * 4) + line, 0, 2);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      const typename C::Open open = here.open((veci)load(panel + int64_t(i) * (PANEL * 4) + v * WIDTH * 4));
#pragma GCC unroll 8
      for (int j = 0; j < C::PER; j++) store(out + j * PANEL + v * WIDTH, here.part(open, j));
    }
  }
}

// c[ROWS][32] = or += rows times one decoded span, scaled; with `last` also multiplied by the row's scale.
struct SpanOfRows { int first, dwords, tile, index; bool last; };
template <class D, int ROWS>
void span_tile(const float* a, const float* b, const SpanOfRows& span, const float* extra, bool corrected, const PanelScales& scales, float* c) {
  using Sum = typename SumOf<D>::type;
  Sum sum[ROWS][NV];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) sum[r][v] = Sum{};
  const float* x = a + (span.first / CHUNK) * (ROWS * CHUNK) + span.first % CHUNK;
  for (int left = span.dwords, here = std::min(left, CHUNK - span.first % CHUNK); left > 0; left -= here, here = std::min(left, CHUNK)) {
#pragma GCC unroll 4
    for (int i = 0; i < here; i++, b += PANEL) {
      typename D::Split s[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) s[v] = D::split(load(b + v * WIDTH));
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) sum[r][v] = D::mac(sum[r][v], x + i + r * CHUNK, s[v]);
    }
    x += here + (ROWS - 1) * CHUNK;
  }
  const float* sums_of_x = extra + (1 + span.index) / CHUNK * (ROWS * CHUNK) + (1 + span.index) % CHUNK;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      float* to = c + r * PANEL + v * WIDTH;
      vec total = scaled(span.index ? load(to) : vec{}, sum[r][v], scales, span.tile, v, corrected, corrected ? sums_of_x[r * CHUNK] : 0.f);
      if (std::is_same_v<D, Int8> && span.last) total = total * extra[r * CHUNK];
      store(to, total);
    }
}

template <class C>
using Few = void (*)(const Weight&, const C&, const float*, const char*, const PanelScales&, float*, int64_t);
using SpanTile = void (*)(const float*, const float*, const SpanOfRows&, const float*, bool, const PanelScales&, float*);
template <class C>
struct QuantizedTiles {  // indexed by the number of rows
  Few<C> few_rows[FEW_ROWS + 1] = {};
  SpanTile many_rows[MAX_ROWS + 1] = {};
  template <int... R>
  constexpr void fill_few(std::integer_sequence<int, R...>) { ((few_rows[R + 1] = few<C, R + 1>), ...); }
  template <int... R>
  constexpr void fill_many(std::integer_sequence<int, R...>) { ((many_rows[R + 1] = span_tile<typename C::Dot, R + 1>), ...); }
  constexpr QuantizedTiles() {
    fill_few(std::make_integer_sequence<int, FEW_ROWS>{});
    if constexpr (WIDTH != 16) fill_many(std::make_integer_sequence<int, MAX_ROWS>{});
  }
};
template <class C>
static constexpr QuantizedTiles<C> quantized_tiles{};

#if defined(MOE_FN_AMX)
// A chunk of many int8 rows times one panel: the panel is decoded once, and spans are multiplied by tiles. scratch: the decoded panel, then the
// sums of a span.
template <class C, class Before, class Epilogue>
void tiled(const RowBlock* blocks, int count, auto rows, const Weight& w, const C& code, const char* panel, const char* ahead, const PanelScales& scales,
           float* sums, float* scratch, Before before, Epilogue epilogue) {
  const Codes& q = *w.codes;
  const RowShape<C> shape(w);
  const bool corrected = q.corrected(RowShape<C>::BF16_ROWS);
  float* of_span = scratch + int64_t(w.steps()) * C::PER * PANEL;
  for (const Span& span : q.spans) decode(code, span, panel, ahead, scratch + int64_t(span.first) * C::PER * PANEL);
  for (int b = 0; b < count; b++) {
    before(b);
    const int n = blocks[b].rows;
    const float* extra = rows(b) + int64_t(shape.dwords) * n;
    for (int i = 0; i < int(q.spans.size()); i++) {
      const Span& span = q.spans[i];
      const int first = span.first * C::PER;
      tiles<Int8>.of[n](rows(b) + int64_t(first) * n, scratch + int64_t(first) * PANEL, span.count * C::PER, of_span, false, nullptr, 0);
      const float* sums_of_x = extra + int64_t(1 + i) / CHUNK * n * CHUNK + (1 + i) % CHUNK;
      const bool last = i + 1 == int(q.spans.size());
      for (int r = 0; r < n; r++)
        for (int v = 0; v < NV; v++) {
          float* to = sums + r * PANEL + v * WIDTH;
          const veci sum = (veci)load(of_span + r * PANEL + v * WIDTH);
          const vec total = scaled(i ? load(to) : vec{}, sum, scales, span.tile, v, corrected, corrected ? sums_of_x[r * CHUNK] : 0.f);
          store(to, last ? total * extra[r * CHUNK] : total);
        }
    }
    epilogue(b);
  }
}
#endif

// The multiplication that by_rows and second_product use for codes C, like Floats for float weights.
template <class C>
struct Quantized {
  static constexpr bool TILES = TILED<Int8> && std::is_same_v<typename C::Dot, Int8>;
  using Region = moe_fn::Region<BF16>;  // adapters are in bfloat16 tiles where codes are not
  static int row_dwords(const Weight& w) { return RowShape<C>(w).all(); }
  static int64_t row_bytes(const Weight& w) { return int64_t(row_dwords(w)) * 4; }
  static bool in_blocks(const Weight&) { return false; }
  static int chunk_rows(const Weight& w) { return std::max(2 * MAX_ROWS, 512 * 256 / row_dwords(w)); }  // 512 KB of packed rows
  static int64_t sums_floats(const Weight&, int rows, int) { return int64_t(rows) * PANEL; }
  // Tiles take 16 dwords, so that shorter spans would be multiplied with zeros. Sums of a span are integers, so a row's bits are the same
  // with and without tiles.
  static bool suits_tiles(const Weight& w) {
    if (!TILES) return false;
    for (const Span& span : w.codes->spans)
      if (span.first * C::PER % CHUNK || (span.count * C::PER % CHUNK && span.first + span.count != w.steps())) return false;
    return true;
  }
  static int64_t decoded_floats(const Weight& w) {  // a span, or a panel and the sums of a span
    return TILES ? (int64_t(w.steps()) * C::PER + ROWS_OF<Int8>) * PANEL : int64_t(SPAN_INPUTS) / C::INPUTS * C::PER * PANEL;
  }
  static int64_t scratch_floats(const Weight& w) {
    return decoded_floats(w) + 2 * w.codes->in_tiles * PANEL + (w.prepared ? 0 : int64_t(w.steps()) * PANEL);
  }
  static void run(const RowBlock* blocks, int count, auto rows, const Weight& w, int64_t expert, int first, int last, const float* next, float* sums,
                  float* scratch, auto before, auto epilogue) {
    const Codes& q = *w.codes;
    const C code(q);
    const int dwords = RowShape<C>(w).dwords;
    float* scale = scratch + decoded_floats(w);
    float *correction = scale + q.in_tiles * PANEL, *laid = correction + q.in_tiles * PANEL;
    const PanelScales scales{scale, correction, q.zero ? PANEL : 0};
    constexpr bool bf16 = RowShape<C>::BF16_ROWS;
    const bool corrected = q.corrected(bf16);
    for (int p = first; p < last; p++) {
      const char *panel = (const char*)laid, *ahead = panel;
      if (w.prepared) {
        panel = (const char*)panel_at(w, expert, p);
        ahead = p + 1 < last ? (const char*)panel_at(w, expert, p + 1) : next ? (const char*)next : panel;
      } else {
        lay_transposed(w, w.data + expert * w.expert_bytes, columns_of(w, p), 0, w.steps(), laid);
      }
      panel_scales(w, expert, p, bf16, scale, correction);
      if constexpr (TILES) {
        if (blocks[0].rows > FEW_ROWS) {
          tiled(blocks, count, rows, w, code, panel, ahead, scales, sums, scratch, [&](int b) { before(p, b); }, [&](int b) { epilogue(p, b, sums); });
          continue;
        }
      }
      if (WIDTH == 16 || count == 1) {  // decoding is hidden behind the products, which use other ports
        for (int b = 0; b < count; b++) {
          before(p, b);
          quantized_tiles<C>.few_rows[blocks[b].rows](w, code, rows(b), panel, scales, sums, b ? 0 : ahead - panel);
          epilogue(p, b, sums);
        }
        continue;
      }
      for (int i = 0; i < int(q.spans.size()); i++) {
        const Span& span = q.spans[i];
        decode(code, span, panel, ahead, scratch);
        float* c = sums;
        for (int b = 0; b < count; c += blocks[b++].rows * PANEL)
          quantized_tiles<C>.many_rows[blocks[b].rows](rows(b), scratch, {span.first * C::PER, span.count * C::PER, span.tile, i, i + 1 == int(q.spans.size())},
                                                       rows(b) + int64_t(dwords) * blocks[b].rows, corrected, scales, c);
      }
      float* c = sums;
      for (int b = 0; b < count; c += blocks[b++].rows * PANEL) {
        before(p, b);
        epilogue(p, b, c);
      }
    }
  }
};

}  // namespace moe_fn
