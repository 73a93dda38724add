// Weights as panels of 32 columns, [steps][32] dwords: prepared ones as they lie, plain ones laid on the fly into a buffer that stays in L2.
#pragma once
#include <algorithm>

#include "simd.h"
#include "tile.h"

namespace moe_fn {

// The matrix of each expert: `columns` outputs, `inner` products. Panels of a gated first product hold 16 gates, then the 16 ups that match.
struct Weight {
  const char* data;
  int64_t expert_bytes, columns, inner;
  int element;  // bytes
  bool prepared, transposed, gated, interleaved;  // transposed: [columns, inner]; interleaved: gate and up alternate
  int panels() const { return int(gated ? (columns / 2 + PANEL / 2 - 1) / (PANEL / 2) : (columns + PANEL - 1) / PANEL); }
  int steps() const { return int((inner * element + 3) / 4); }
};

// Where the two halves of a panel come from: 16 columns each from `start`, `stride` apart, `count` of them there.
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

// out[j * ldo + i] = in[i][j] for WIDTH x WIDTH dwords.
static inline void transpose(const char* const* in, float* out, int64_t ldo) {
  vec x[WIDTH], y[WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++) x[i] = load(in[i]);
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

// Steps [first, first + count) of one panel from [columns, inner] rows: a transposition of dwords.
static inline void lay_transposed(const Weight& w, const char* matrix, const Columns& from, int first, int count, float* out) {
  const int64_t row_bytes = w.inner * w.element;
  for (int half = 0; half < 2; half++)
    for (int c0 = 0; c0 < PANEL / 2; c0 += WIDTH) {
      const int there = std::clamp(from.count[half] - c0, 0, WIDTH);
      float* to = out + half * (PANEL / 2) + c0;
      auto row = [&](int i) { return matrix + (from.start[half] + int64_t(c0 + i) * from.stride) * row_bytes + int64_t(first) * 4; };
      int s = 0;
      if (there == WIDTH)
        for (; s + WIDTH <= count && (int64_t(first) + s + WIDTH) * 4 <= row_bytes; s += WIDTH) {
          const char* in[WIDTH];
          for (int i = 0; i < WIDTH; i++) in[i] = row(i) + int64_t(s) * 4;
          transpose(in, to + int64_t(s) * PANEL, PANEL);
        }
      for (; s < count; s++)
        for (int i = 0; i < WIDTH; i++) {
          float dword = 0;
          if (i < there) std::memcpy(&dword, row(i) + int64_t(s) * 4, std::min<int64_t>(4, row_bytes - (int64_t(first) + s) * 4));
          to[int64_t(s) * PANEL + i] = dword;
        }
    }
}

// Half a panel's dwords of one step from [inner, columns] rows: `one` is the row of the step, `two` the next one (bfloat16 pairs) or null.
template <class D>
inline void lay_step(const char* one, const char* two, int64_t start, int stride, int there, float* out) {
  constexpr int half = PANEL / 2;
  using Element = typename D::Element;
  const Element *x = (const Element*)one + start, *y = two ? (const Element*)two + start : nullptr;
  if (there == half && stride == 1) {
    for (int c = 0; c < half; c += WIDTH) {
      if constexpr (D::PER_DWORD == 1) {
        store(out + c, load(x + c));
      } else {
        vec hi = y ? D::load(y + c) : vec{};
        store(out + c, (vec)((veci)hi | (veci)((__builtin_convertvector((veci)D::load(x + c), veci) >> 16) & 0xffff)));
      }
    }
    return;
  }
  for (int c = 0; c < half; c++) {
    float dword = 0;
    if (c < there) {
      std::memcpy(&dword, x + int64_t(c) * stride, sizeof(Element));
      if (y) std::memcpy((char*)&dword + sizeof(Element), y + int64_t(c) * stride, sizeof(Element));
    }
    out[c] = dword;
  }
}

// The panel of the rows that row(r) gives, r from `first` steps on: [inner, columns] weights, or the right side of an outer product.
template <class D, class Row>
inline void lay_rows(const Columns& from, int64_t inner, Row row, int first, int count, float* out) {
  for (int s = 0; s < count; s++) {
    const int64_t r = (int64_t(first) + s) * D::PER_DWORD;
    const char *one = row(r), *two = D::PER_DWORD == 2 && r + 1 < inner ? row(r + 1) : nullptr;
    for (int half = 0; half < 2; half++)
      lay_step<D>(one, two, from.start[half], from.stride, from.count[half], out + int64_t(s) * PANEL + half * (PANEL / 2));
  }
}

constexpr int DOTS_UNTIL = 28;  // rows of an expert; from there on a panel laid once is read often enough

// The panels of one expert.
template <class D>
struct Panels {
  const Weight& w;
  const char* matrix;
  Panels(const Weight& w, int64_t expert) : w(w), matrix(w.data + expert * w.expert_bytes) {}
  const float* at(int panel, int first) const { return (const float*)matrix + (int64_t(panel) * w.steps() + first) * PANEL; }  // prepared
  const float* get(int panel, int first, int count, float* scratch) const {
    if (w.prepared) return at(panel, first);
    const Columns from = columns_of(w, panel);
    if (w.transposed)
      lay_transposed(w, matrix, from, first, count, scratch);
    else
      lay_rows<D>(from, w.inner, [&](int64_t r) { return matrix + r * w.columns * w.element; }, first, count, scratch);
    return scratch;
  }
  bool suits_dots(int64_t rows) const { return !w.prepared && w.transposed && rows <= DOTS_UNTIL; }
  const char* column(const Columns& from, int c) const {
    const int half = c / (PANEL / 2), i = c % (PANEL / 2);
    return i < from.count[half] ? matrix + (from.start[half] + int64_t(i) * from.stride) * w.inner * w.element : nullptr;
  }
};

}  // namespace moe_fn
