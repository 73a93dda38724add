// Low-rank adapters: a row with adapter l has W + B[l] A[l] in each product in the place of W. Before a product, `project` computes u = A x
// of these rows, rounded to the type of x; in the product's epilogue `Added` adds B u to its tiles.
#pragma once
#include "kernels.h"

namespace moe_fn {

// The rows of a plan that have an adapter, in its order: blocks of `plan` are the rows of one block with one adapter, its chunks those of
// one chunk with one adapter. The `expert` of a chunk is a pair, adapter * experts + expert.
struct Adapted {
  const Plan& all;
  Plan plan;
  std::vector<int> first;     // of each block of `all`, and the end: its first block in `plan`
  std::vector<int64_t> pair;  // of each block of `plan`
};
// Blocks of `plan` have at most `most_rows` rows.
Adapted adapted_rows(const RoutedExperts& q, const Plan& all, int most_rows);

// Rows that are projected: row source[slot] of `data`, or the slot's own row if source is null; or rows packed in the blocks of `all`, of
// `packed` dwords each.
struct GivenRows {
  const void* data;
  const int64_t* source;
  int packed = 0;
};

// Columns of N dwords, one after the other in memory, to [N][16] of a panel: each stage moves every other dword to the second half.
template <int N>
inline void lay_short(const char* columns, float* out) {
  constexpr int VECTORS = N * (PANEL / 2) / WIDTH, IN_STEP = PANEL / 2 / WIDTH;
  vec x[VECTORS], y[VECTORS];
#pragma GCC unroll 64
  for (int i = 0; i < VECTORS; i++) x[i] = load(columns + i * sizeof(vec));
#pragma GCC unroll 4
  for (int stage = 1; stage < N; stage *= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < VECTORS / 2; i++) y[i] = even(x[2 * i], x[2 * i + 1]), y[i + VECTORS / 2] = odd(x[2 * i], x[2 * i + 1]);
#pragma GCC unroll 64
    for (int i = 0; i < VECTORS; i++) x[i] = y[i];
  }
#pragma GCC unroll 64
  for (int i = 0; i < VECTORS; i++) store(out + i / IN_STEP * PANEL + i % IN_STEP * WIDTH, x[i]);
}

// `lay_transposed` for the few dwords of a rank: without a call of memcpy for each of them, which took as long as the base product of 16 rows.
inline void lay_rank(const Weight& w, const char* matrix, const Columns& from, int first, int count, float* out) {
  const int64_t row_bytes = w.row_bytes();
  const int64_t following = (w.gated ? PANEL / 2 : PANEL) * int64_t(from.stride) * row_bytes;  // to the same columns of the next panel
  for (int half = 0; half < 2; half++) {
    const char* columns = matrix + from.start[half] * row_bytes + int64_t(first) * 4;
    float* to = out + half * (PANEL / 2);
    if (from.stride == 1 && from.count[half] == PANEL / 2 && count * 4 == row_bytes && (count == 4 || count == 8 || count == 16)) {
      for (int line = 0; line < count; line++) __builtin_prefetch(columns + following + line * 64, 0, 3);
      if (count == 4) lay_short<4>(columns, to);
      if (count == 8) lay_short<8>(columns, to);
      if (count == 16) lay_short<16>(columns, to);
      continue;
    }
    for (int i = 0; i < PANEL / 2; i++) {
      const char* column = columns + i * int64_t(from.stride) * row_bytes;
      const int whole = i < from.count[half] ? int(std::min<int64_t>(count, (row_bytes - int64_t(first) * 4) / 4)) : 0;
      if (whole) __builtin_prefetch(column + following, 0, 3);
      for (int s = 0; s < whole; s++) std::memcpy(to + s * PANEL + i, column + s * 4, 4);
      for (int s = whole; s < count; s++) to[s * PANEL + i] = 0;
      if (i < from.count[half] && whole < count) std::memcpy(to + whole * PANEL + i, column + whole * 4, 2);  // half a dword
    }
  }
}

// What is added to a product's tiles: u is stored as [rank in chunks][rows][CHUNK] for each block of adapted rows.
template <class D>
struct Added {
  const Adapted* rows = nullptr;  // null: nothing is added
  Factor b;
  Buffer u;
  int padded = 0;  // dwords of a row of u

  // tile: the product of a panel and a block of `all`.
  void operator()(const RowBlock& block, int panel, float* tile) const {
    if (!rows) return;
    constexpr int LAID = 64;  // steps of B that are laid at once: 8 KB
    const int steps = b.weight.steps(), number = int(&block - rows->all.blocks.data());
    const Columns from = columns_of(b.weight, panel);
    alignas(64) float laid[LAID * PANEL];
    for (int i = rows->first[number]; i < rows->first[number + 1]; i++) {
      const RowBlock& here = rows->plan.blocks[i];
      for (int k = 0; k < steps; k += LAID) {
        const int count = std::min(LAID, steps - k);
        lay(from, b.at(rows->pair[i]), k, count, laid);
        const float* x = u.get() + here.start * padded + int64_t(k) * here.rows;
        float* to = tile + (here.start - block.start) * PANEL;
        if constexpr (TILED<D>) {  // a tile writes 16 rows, also those of other adapters
          alignas(64) float sum[ROWS_OF<D> * PANEL];
          tiles<D>.of[here.rows](x, laid, count, sum, false, nullptr, 0);
          for (int i = 0; i < here.rows * PANEL; i += WIDTH) store(to + i, load(to + i) + load(sum + i));
        } else {
          tiles<D>.of[here.rows](x, laid, count, to, true, nullptr, 0);
        }
      }
    }
  }

 private:
  void lay(const Columns& from, const char* matrix, int first, int count, float* out) const {
    const Weight& w = b.weight;
    if (w.transposed) return lay_rank(w, matrix, from, first, count, out);
    lay_rows<D>(&from, 1, w.inner, [&](int64_t r) { return matrix + r * w.columns * w.element; }, first, count, out);
  }
};

// The product of rows with a, to be added through b; nothing without adapters of this product. plain: [slots, rank], also as plain rows;
// null: not wanted.
template <class D>
Added<D> low_rank(const Pool& pool, const Adapted& rows, const Factor& a, const Factor& b, const GivenRows& given, typename D::Element* plain);

template <class D>
Added<D> adapters_of_x(const Pool& pool, const Adapted& rows, const RoutedExperts& q, typename D::Element* plain = nullptr) {
  return low_rank<D>(pool, rows, q.gate_up_lora.a, q.gate_up_lora.b, {q.x, rows.all.source.data()}, plain);
}
template <class D>
Added<D> adapters_of_hidden(const Pool& pool, const Adapted& rows, const RoutedExperts& q, const float* hidden, int padded) {
  return low_rank<D>(pool, rows, q.down_lora.a, q.down_lora.b, {hidden, nullptr, padded}, nullptr);
}

}  // namespace moe_fn
