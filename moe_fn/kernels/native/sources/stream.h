// Few rows times weights stored as [inner, columns]: rows of the weights are read once, in order, with a strip of columns and HELD steps in
// registers, and the sums of all columns stay in cache. Packing panels would write and read every weight once more.
#pragma once
#include "panels.h"

namespace moe_fn {

struct RowBlock {  // sorted slots [start, start + rows)
  int64_t start;
  int rows;
  bool decoded = false;  // quantized weights are decoded to floats before they are multiplied
};

constexpr int STREAM_UNTIL = 64;        // rows of an expert; with more rows packing panels pays off
constexpr int STREAM_FLOATS = 16 << 10;  // sums: 64 KB, at worst in L2
constexpr int STREAM_BYTES = 8 << 10;   // prefetched ahead
// Columns of a strip, and its steps: half of the registers. Tiles take 16 steps of a panel's width from L1.
template <class D>
constexpr int STRIP = TILED<D> ? PANEL : 2 * WIDTH;
template <class D>
constexpr int HELD = TILED<D> ? CHUNK : (WIDTH == 16 ? 8 : 4) * int(sizeof(vec)) / int(sizeof(typename D::Split));

template <class D>
static inline bool suits_stream(const Weight& w, int64_t rows) {
  return !w.prepared && !w.transposed && (rows <= STREAM_UNTIL || (w.invariant && !TILED<D>));
}
template <class D>
static inline int64_t stream_floats(const Weight& w) {
  return w.prepared || w.transposed ? 0 : STREAM_FLOATS + STREAM_UNTIL * (PANEL + 2 * STRIP<D>);
}

// The sums of all columns, in strips of [rows][STRIP]: the address of column c of part `part`, for the first row.
template <class D>
struct Strips {
  float* sums;
  int64_t of_strip, of_part;
  Strips(float* sums, int64_t rows, int columns_of_part)
      : sums(sums), of_strip(round_up(int(rows), ROWS_TOGETHER<D>) * STRIP<D>), of_part((columns_of_part + STRIP<D> - 1) / STRIP<D> * of_strip) {}
  float* at(int part, int64_t c) const { return sums + part * of_part + c / STRIP<D> * of_strip + c % STRIP<D>; }
};

template <class D>
inline void prefetch_ahead(const typename D::Element* ahead, int64_t pitch, int step) {
#pragma GCC unroll 2
  for (int j = 0; j < D::PER_DWORD; j++)
#pragma GCC unroll 2
    for (int line = 0; line < STRIP<D> * int(sizeof(*ahead)); line += 64)
      __builtin_prefetch((const char*)(ahead + (step * D::PER_DWORD + j) * pitch) + line, 0, 2);
}

// sums[row][STRIP] += rows [HELD steps] times weights [HELD steps][STRIP]; rows of weights are `pitch` elements apart.
// rows(b) are the packed rows of block b. Steps are summed from zero: short chains of additions keep float32's accuracy.
template <class D, class Rows>
inline void strip(const typename D::Element* w, int64_t pitch, const typename D::Element* ahead, int64_t pitch_ahead, const RowBlock* blocks, int count,
                  Rows rows, int k, float* c) {
  constexpr int STEPS = HELD<D>;
  if constexpr (TILED<D>) {
    alignas(64) float panel[STEPS * PANEL];
    for (int i = 0; i < STEPS; i++) {
      for (int c = 0; c < PANEL; c += 2 * WIDTH) {
        const auto* one = w + i * D::PER_DWORD * pitch + c;
        vec both[2];
        D::step(one, one + (D::PER_DWORD - 1) * pitch, both);
        store(panel + i * PANEL + c, both[0]), store(panel + i * PANEL + c + WIDTH, both[1]);
      }
      prefetch_ahead<D>(ahead, pitch_ahead, i);
    }
    for (int b = 0; b < count; b++)
      tiles<D>.of[blocks[b].rows](rows(b) + int64_t(k) * blocks[b].rows, panel, STEPS, c + (blocks[b].start - blocks[0].start) * PANEL, true, nullptr, 0);
    return;
  }
  typename D::Split s[STEPS][2];
#pragma GCC unroll 8
  for (int i = 0; i < STEPS; i++) {
    const auto* one = w + i * D::PER_DWORD * pitch;
    D::two_rows(one, one + (D::PER_DWORD - 1) * pitch, s[i]);
    prefetch_ahead<D>(ahead, pitch_ahead, i);
  }
  for (int b = 0; b < count; b++) {
    const float* x = rows(b) + int64_t(k / CHUNK) * blocks[b].rows * CHUNK + k % CHUNK;
    for (int r = 0; r < blocks[b].rows; r++, x += CHUNK, c += STRIP<D>) {
      alignas(64) float widened[std::max(STEPS * WIDENED<D>, WIDTH)];
      const float* y = for_mac<D, STEPS>(x, widened);
      vec one{}, two{};
#pragma GCC unroll 8
      for (int i = 0; i < STEPS; i++) one = D::mac(one, y + i * WIDENED<D>, s[i][0]), two = D::mac(two, y + i * WIDENED<D>, s[i][1]);
      store(c, load(c) + one);
      store(c + WIDTH, load(c + WIDTH) + two);
    }
  }
}

// Multiplies one chunk by panels [first, last), like `multiply`; tile: 32 floats per row of a block, scratch: stream_floats.
template <class D, class Rows, class Before, class Epilogue>
inline void stream(const RowBlock* blocks, int count, int64_t total, Rows rows, const Panels<D>& panels, int first, int last, float* tile, float* scratch,
                   Before before, Epilogue epilogue) {
  using Element = typename D::Element;
  constexpr int ROWS = HELD<D> * D::PER_DWORD;
  const Weight& w = panels.w;
  const bool interleaved = w.gated && w.interleaved;
  const int steps = w.steps(), parts = w.gated && !interleaved ? 2 : 1, width = PANEL / parts;
  const int64_t pitch = w.columns, end = w.inner * pitch, columns = w.columns / parts;
  const Element* matrix = (const Element*)panels.matrix;
  const int per = int(std::clamp<int64_t>(STREAM_FLOATS / (round_up(int(total), ROWS_TOGETHER<D>) * PANEL), 1, last - first));
  for (int p0 = first; p0 < last; p0 += per) {
    const int here = std::min(per, last - p0);
    const Strips<D> strips(scratch, total, here * width);
    std::memset(scratch, 0, size_t(parts * strips.of_part) * 4);
    const int blocks_ahead = std::max(1, STREAM_BYTES / int(ROWS * here * PANEL * sizeof(Element)));
    for (int k = 0; k < steps; k += HELD<D>) {
      const int64_t row = int64_t(k) * D::PER_DWORD, row_ahead = row + blocks_ahead * ROWS;
      const int64_t ahead = row_ahead < w.inner ? (row_ahead - row) * pitch : (row_ahead - row - w.inner) * pitch + here * width;
      for (int part = 0; part < parts; part++) {
        const int64_t start = part * columns + int64_t(p0) * width, stop = std::min((part + 1) * columns, start + here * width);
        for (int64_t c = start; c < stop; c += STRIP<D>) {
          const Element* from = matrix + row * pitch + c;
          float* to = strips.at(part, c - start);
          // Past the end of a row is the next one, whose products are dropped below; memory past the last row may not be readable.
          if ((row + ROWS - 1) * pitch + c + STRIP<D> <= end) {
            strip<D>(from, pitch, from + ahead, pitch, blocks, count, rows, k, to);
          } else {
            Element last_rows[ROWS * STRIP<D>] = {};
            for (int64_t r = 0; r < std::min<int64_t>(ROWS, w.inner - row); r++)
              std::memcpy(last_rows + r * STRIP<D>, from + r * pitch, sizeof(Element) * std::min<int64_t>(STRIP<D>, stop - c));
            strip<D>(last_rows, STRIP<D>, last_rows, 0, blocks, count, rows, k, to);
          }
        }
      }
    }
    for (int p = p0; p < p0 + here; p++) {
      const Columns at = columns_of(w, p);
      const int c = (p - p0) * width;
      int64_t row = 0;
      for (int b = 0; b < count; b++) {
        before(p, b);
        for (int r = 0; r < blocks[b].rows; r++, row += STRIP<D>) {
          float* to = tile + r * PANEL;
          for (int v = 0; v < PANEL / 2; v += WIDTH) {
            const float* second = parts == 2 ? strips.at(1, c + v) : strips.at(0, interleaved ? c + 2 * v + WIDTH : c + PANEL / 2 + v);
            const vec x = load(strips.at(0, interleaved ? c + 2 * v : c + v) + row), y = load(second + row);
            store(to + v, interleaved ? even(x, y) : x);
            store(to + PANEL / 2 + v, interleaved ? odd(x, y) : y);
          }
          for (int half = 0; half < 2; half++)
            for (int i = at.count[half]; i < PANEL / 2; i++) to[half * (PANEL / 2) + i] = 0;
        }
        epilogue(p, b, tile);
      }
    }
  }
}

}  // namespace moe_fn
