// The inner loop of the products: C[rows][32] += A[rows][steps] B[steps][32], in registers. A step is one dword of the inner dimension.
//   packed rows    [steps / 16][rows][16] dwords: one pointer, every displacement a constant
//   a panel        [steps][32 columns] dwords
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "simd.h"
#if defined(MOE_FN_AMX)
#include "amx.h"
#endif

namespace moe_fn {

// Prefetches `lines` cache lines from `ahead` on per 4 steps: the next panel, spread over the row blocks of this one. Prefetching at a fixed
// distance was 8-12 % slower, two panels at once 6 %.
template <class D, int ROWS>
void tile(const float* a, const float* b, int steps, float* c, bool add, const char* ahead, int lines) {
  vec sum[ROWS][NV];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) sum[r][v] = vec{};
  constexpr int PITCH = CHUNK * WIDENED<D>;
  alignas(64) float widened[WIDENED<D> > 1 ? ROWS * PITCH : 1];
  auto chunk_of_rows = [&](const float* x) __attribute__((always_inline)) {
    if constexpr (WIDENED<D> == 1) return x;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) for_mac<D, CHUNK>(x + r * CHUNK, widened + r * PITCH);
    return (const float*)widened;
  };
  auto step = [&](const float* x, const float* w) __attribute__((always_inline)) {
    typename D::Split s[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) s[v] = D::split(load(w + v * WIDTH));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sum[r][v] = D::mac(sum[r][v], x + r * PITCH, s[v]);
  };
  for (int chunk = steps / CHUNK; chunk > 0; chunk--) {
    const float* x = chunk_of_rows(a);
    for (int q = 0; q < 4; q++) {
      for (int i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) step(x + s * WIDENED<D>, b + s * PANEL);
      x += 4 * WIDENED<D>, b += 4 * PANEL;
    }
    a += ROWS * CHUNK;
  }
  if (const int rest = steps % CHUNK) {
    const float* x = chunk_of_rows(a);
    for (int s = 0; s < rest; s++, x += WIDENED<D>, b += PANEL) step(x, b);
  }
  // Sums of a block of steps start from zero and are added to earlier ones: a single chain of 7168 products would lose accuracy in float32.
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      float* to = c + r * PANEL + v * WIDTH;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

using Tile = void (*)(const float*, const float*, int, float*, bool, const char*, int);
template <class D>
struct Tiles {  // indexed by the number of rows
  Tile of[ROWS_OF<D> + 1] = {};
  template <int... R>
  constexpr void fill(std::integer_sequence<int, R...>) {
#if defined(MOE_FN_AMX)
    if constexpr (TILED<D>) ((of[R + 1] = amx_tile<D, R + 1>), ...);
    else
#endif
      ((of[R + 1] = tile<D, R + 1>), ...);
  }
  constexpr Tiles() { fill(std::make_integer_sequence<int, ROWS_OF<D>>{}); }
};
template <class D>
static constexpr Tiles<D> tiles{};  // not inline: a process that loads two levels would use the first one's tiles for both

// What a worker holds while it calls `tiles`.
struct NoRegion {};
#if defined(MOE_FN_AMX)
template <class D>
using Region = std::conditional_t<TILED<D>, TileRegion, NoRegion>;
#else
template <class D>
using Region = NoRegion;
#endif

// C[rows][32] from weights stored with each column's dwords contiguous, for so few rows that packing a panel would cost more. column(c) is the
// first byte of column c, or null; every column has `bytes` bytes. The next 16 dwords of packed rows are `ahead` dwords further.
constexpr int DOT_ROWS = MAX_ROWS < 4 ? MAX_ROWS : 4;
constexpr int DOT_COLUMNS = WIDTH == 16 ? 4 : 2;

template <class D, int ROWS, class Column>
void dot(const float* a, int64_t ahead, Column column, int64_t bytes, float* c) {
  constexpr int PER_CHUNK = CHUNK / WIDTH;
  vec lanes[ROWS][PANEL];
  const int64_t whole = bytes / (CHUNK * 4);
  for (int c0 = 0; c0 < PANEL; c0 += DOT_COLUMNS) {
    if (!column(c0)) {  // nor are the columns after it
      for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < DOT_COLUMNS; j++) lanes[r][c0 + j] = vec{};
      continue;
    }
    vec sum[ROWS][DOT_COLUMNS];
    const char* w[DOT_COLUMNS];
    for (int j = 0; j < DOT_COLUMNS; j++) {
      w[j] = column(c0 + j) ? column(c0 + j) : column(0);  // results of missing columns are dropped below
      for (int r = 0; r < ROWS; r++) sum[r][j] = vec{};
    }
    auto chunk = [&](const float* x, const char* const* from) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int part = 0; part < PER_CHUNK; part++)
#pragma GCC unroll 4
        for (int j = 0; j < DOT_COLUMNS; j++) {
          vec weight = load(from[j] + part * WIDTH * 4);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++) sum[r][j] = D::dot(sum[r][j], load(x + r * CHUNK + part * WIDTH), weight);
        }
    };
    const char* from[DOT_COLUMNS];
    // Prefetches the columns after the next ones: a column is often one page, and the hardware does not prefetch across pages (raises the
    // speed from 0.56 to 0.77 of the lower bound).
    const int64_t following = 2 * DOT_COLUMNS * (w[1] - w[0]);
    for (int64_t i = 0; i < whole; i++) {
      for (int j = 0; j < DOT_COLUMNS; j++) {
        from[j] = w[j] + i * CHUNK * 4;
        __builtin_prefetch(from[j] + following, 0, 2);
      }
      chunk(a + i * ahead, from);
    }
    if (const int64_t rest = bytes % (CHUNK * 4)) {  // memory past the last column's end may be NaN
      char last[DOT_COLUMNS][CHUNK * 4] = {};
      for (int j = 0; j < DOT_COLUMNS; j++) {
        std::memcpy(last[j], w[j] + whole * CHUNK * 4, rest);
        from[j] = last[j];
      }
      chunk(a + whole * ahead, from);
    }
    for (int r = 0; r < ROWS; r++)
      for (int j = 0; j < DOT_COLUMNS; j++) lanes[r][c0 + j] = column(c0 + j) ? sum[r][j] : vec{};
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < NV; v++) {  // the sums of the lanes of WIDTH vectors, as one vector
      vec* x = lanes[r] + v * WIDTH;
      for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] = low(x[i], x[i + half]) + high(x[i], x[i + half]);
      store(c + r * PANEL + v * WIDTH, x[0]);
    }
}

// `dot` for any number of rows of one block, DOT_ROWS at a time.
template <class D, class Column>
void dots(const float* a, int rows, Column column, int64_t bytes, float* c) {
  const int64_t ahead = int64_t(rows) * CHUNK;
  for (; rows > 0; rows -= DOT_ROWS, a += DOT_ROWS * CHUNK, c += DOT_ROWS * PANEL) switch (rows) {
      case 1: dot<D, 1>(a, ahead, column, bytes, c); break;
      case 2: dot<D, std::min(2, DOT_ROWS)>(a, ahead, column, bytes, c); break;
      case 3: dot<D, std::min(3, DOT_ROWS)>(a, ahead, column, bytes, c); break;
      default: dot<D, DOT_ROWS>(a, ahead, column, bytes, c);
    }
}

}  // namespace moe_fn
