// Weights as panels of 32 columns, [steps][32] dwords: prepared weights are stored as panels, plain weights are packed on the fly into a
// buffer that stays in L2.
#pragma once
#include <algorithm>

#include "simd.h"
#include "tile.h"

namespace moe_fn {

struct Codes;  // of quantized weights: codes.h

// The matrices of all experts: `columns` outputs, `inner` inputs. Panels of a gated first product have 16 gates, then the 16 matching ups.
struct Weight {
  const char* data;
  int64_t expert_bytes, columns, inner;
  int element;  // bytes
  bool prepared, transposed, gated, interleaved;  // transposed: [columns, inner]; interleaved: gate and up alternate
  int panels() const { return int(gated ? (columns / 2 + PANEL / 2 - 1) / (PANEL / 2) : (columns + PANEL - 1) / PANEL); }
  const Codes* codes = nullptr;  // null: floats
  int per_byte = 1;              // codes per byte
  bool invariant = false;        // a row's sums are added in the same order for any number of rows
  int64_t row_bytes() const { return (inner * element + per_byte - 1) / per_byte; }
  int steps() const { return int((row_bytes() + 3) / 4); }
  Weight flipped() const {  // the transposed matrices, for plain weights
    Weight w{data, expert_bytes, inner, columns, element, prepared, !transposed, false, false};
    w.invariant = invariant;
    return w;
  }
};

// Source of the two halves of a panel: 16 columns each from `start`, `stride` apart, of which `count` exist.
struct Columns { int64_t start[2]; int stride; int count[2]; };

static inline Columns columns_of(const Weight& w, int panel) {
  constexpr int half = PANEL / 2;
  auto there = [](int64_t first, int64_t end) { return int(std::clamp<int64_t>(end - first, 0, half)); };
  if (!w.gated) {
    int64_t first = int64_t(panel) * PANEL;
    return {{first, first + half}, 1, {there(first, w.columns), there(first + half, w.columns)}};
  }
  int64_t first = int64_t(panel) * half, pairs = w.columns / 2;
  int n = there(first, pairs);
  if (w.interleaved) return {{2 * first, 2 * first + 1}, 2, {n, n}};
  return {{first, pairs + first}, 1, {n, n}};
}

// out[j * ldo + i] = x[i][j] for WIDTH x WIDTH dwords; x is overwritten.
static inline void transpose(vec* x, float* out, int64_t ldo) {
  vec y[WIDTH];
#pragma GCC unroll 4
  for (int stage = 1; stage < WIDTH; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH / 2; i++) y[2 * i] = low(x[i], x[i + WIDTH / 2]), y[2 * i + 1] = high(x[i], x[i + WIDTH / 2]);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int j = 0; j < WIDTH; j++) store(out + j * ldo, x[j]);
}

// Packs steps [first, first + count) of one panel from [columns, inner] weights: a transposition of dwords.
static inline void lay_transposed(const Weight& w, const char* matrix, const Columns& from, int first, int count, float* out) {
  const int64_t row_bytes = w.row_bytes();
  for (int half = 0; half < 2; half++)
    for (int c0 = 0; c0 < PANEL / 2; c0 += WIDTH) {
      const int there = std::clamp(from.count[half] - c0, 0, WIDTH);
      float* to = out + half * (PANEL / 2) + c0;
      auto row = [&](int i) { return matrix + (from.start[half] + int64_t(c0 + i) * from.stride) * row_bytes + int64_t(first) * 4; };
      const int64_t following = WIDTH * from.stride * row_bytes;  // as in `dot`
      int s = 0;
      if (there == WIDTH)
        for (; s + WIDTH <= count && (int64_t(first) + s + WIDTH) * 4 <= row_bytes; s += WIDTH) {
          vec x[WIDTH];
#pragma GCC unroll 16
          for (int i = 0; i < WIDTH; i++) {
            x[i] = load(row(i) + int64_t(s) * 4);
            __builtin_prefetch(row(i) + int64_t(s) * 4 + following, 0, 2);
          }
          transpose(x, to + int64_t(s) * PANEL, PANEL);
        }
      for (; s < count; s++)
        for (int i = 0; i < WIDTH; i++) {
          float dword = 0;
          if (i < there) std::memcpy(&dword, row(i) + int64_t(s) * 4, std::min<int64_t>(4, row_bytes - (int64_t(first) + s) * 4));
          to[int64_t(s) * PANEL + i] = dword;
        }
    }
}

// WIDTH dwords of one step from rows of weights: `one` is the row of the step, `two` the next one (of pairs) or null.
template <class D>
inline vec step_of_rows(const typename D::Element* one, const typename D::Element* two) {
  if constexpr (D::PER_DWORD == 1) {
    return load(one);
  } else {
    const veci low = integers((const uint16_t*)one);
    return (vec)(two ? low | (integers((const uint16_t*)two) << 16) : low);
  }
}
template <class D>
inline float dword_of_rows(const typename D::Element* one, const typename D::Element* two) {
  float dword = 0;
  std::memcpy(&dword, one, sizeof *one);
  if (D::PER_DWORD == 2 && two) std::memcpy((char*)&dword + sizeof *two, two, sizeof *two);
  return dword;
}

// Packs a panel's dwords of one step from [inner, columns] weights.
template <class D>
inline void lay_step(const char* one, const char* two, const Columns& from, float* out) {
  constexpr int half = PANEL / 2;
  using Element = typename D::Element;
  const Element *x = (const Element*)one, *y = (const Element*)two;
  auto dwords = [&](int64_t i) __attribute__((always_inline)) { return step_of_rows<D>(x + i, y ? y + i : nullptr); };
  if (from.stride == 2 && from.count[1] == half) {  // both halves of a panel alternate in memory
    for (int c = 0; c < half; c += WIDTH) {
      const int64_t i = from.start[0] + 2 * c;
      const vec a = dwords(i), b = dwords(i + WIDTH);
      store(out + c, even(a, b)), store(out + half + c, odd(a, b));
    }
    return;
  }
  for (int h = 0; h < 2; h++, out += half) {
    if (from.stride == 1 && from.count[h] == half) {
      for (int c = 0; c < half; c += WIDTH) store(out + c, dwords(from.start[h] + c));
      continue;
    }
    for (int c = 0; c < half; c++) {
      const int64_t i = from.start[h] + int64_t(c) * from.stride;
      out[c] = c < from.count[h] ? dword_of_rows<D>(x + i, y ? y + i : nullptr) : 0.f;
    }
  }
}

// Packs panels of the rows row(r), from step `first` on: of [inner, columns] weights, or of the right operand of an outer product.
// Several panels at once: consecutive rows are a page apart, so with one panel every cache line is a TLB miss.
constexpr int PANELS_AT_ONCE = 4;
template <class D, class Row>
inline void lay_rows(const Columns* from, int panels, int64_t inner, Row row, int first, int count, float* out) {
  bool adjacent = true;  // 32 columns of each panel, and the panels, follow each other in memory: true of all but gated and last ones
  for (int p = 0; p < panels; p++)
    adjacent &= from[p].stride == 1 && from[p].count[1] == PANEL / 2 && from[p].start[1] == from[p].start[0] + PANEL / 2 && from[p].start[0] == from[0].start[0] + p * PANEL;
  for (int s = 0; s < count; s++) {
    const int64_t r = (int64_t(first) + s) * D::PER_DWORD;
    const char *one = row(r), *two = D::PER_DWORD == 2 && r + 1 < inner ? row(r + 1) : nullptr;
    if (adjacent) {
      const auto *x = (const typename D::Element*)one + from[0].start[0], *y = two ? (const typename D::Element*)two + from[0].start[0] : nullptr;
      for (int p = 0; p < panels; p++)
        for (int c = 0; c < PANEL; c += 2 * WIDTH) {
          vec both[2];
          D::step(x + p * PANEL + c, y ? y + p * PANEL + c : nullptr, both);
          float* to = out + (int64_t(p) * count + s) * PANEL + c;
          store(to, both[0]), store(to + WIDTH, both[1]);
        }
    } else {
      for (int p = 0; p < panels; p++) lay_step<D>(one, two, from[p], out + (int64_t(p) * count + s) * PANEL);
    }
  }
}

// Rows of an expert; with more rows packing a panel pays off. Tiles read packed panels for 1 row too: packing hides behind the memory's reads,
// and their products cost a twentieth of those of `dot`.
constexpr int DOTS_UNTIL = 28;

// The panels of one expert.
template <class D>
struct Panels {
  const Weight& w;
  const char* matrix;
  Panels(const Weight& w, int64_t expert) : w(w), matrix(w.data + expert * w.expert_bytes) {}
  const float* at(int panel, int first) const { return (const float*)matrix + (int64_t(panel) * w.steps() + first) * PANEL; }  // prepared
  int at_once() const { return w.prepared || w.transposed ? 1 : PANELS_AT_ONCE; }
  // Steps [first, first + count) of panel `panel` in a loop from begin to end; scratch has the panels packed together with an earlier one.
  const float* get(int panel, int begin, int end, int first, int count, float* scratch) const {
    if (w.prepared) return at(panel, first);
    if (w.transposed) {
      lay_transposed(w, matrix, columns_of(w, panel), first, count, scratch);
      return scratch;
    }
    const int ahead = (panel - begin) % PANELS_AT_ONCE, here = std::min(PANELS_AT_ONCE, end - panel);
    if (ahead == 0) {
      Columns from[PANELS_AT_ONCE];
      for (int p = 0; p < here; p++) from[p] = columns_of(w, panel + p);
      lay_rows<D>(from, here, w.inner, [&](int64_t r) { return matrix + r * w.columns * w.element; }, first, count, scratch);
    }
    return scratch + int64_t(ahead) * count * PANEL;
  }
  bool suits_dots(int64_t rows) const { return !TILED<D> && !w.prepared && w.transposed && (rows <= DOTS_UNTIL || w.invariant); }
  const char* column(const Columns& from, int c) const {
    const int half = c / (PANEL / 2), i = c % (PANEL / 2);
    return i < from.count[half] ? matrix + (from.start[half] + int64_t(i) * from.stride) * w.inner * w.element : nullptr;
  }
};

}  // namespace moe_fn
