// The first product of the forward pass, whatever the weights are.
#pragma once
#include "kernels.h"

namespace moe_fn {

// Prepared or not, the inner dimension of the second product covers whole panels of the first one: what is past its end is zero.
inline int hidden_width(const RoutedExperts& q) { return q.gate_up.panels() * (q.activation.gated ? PANEL / 2 : PANEL); }

template <class D>
void clear_pre(const RoutedExperts& q, int64_t rows) {  // rows of no expert: a result of an op holds nothing that was there before
  if (!q.pre) return;
  const int64_t row = q.gate_up.columns * int64_t(sizeof(typename D::Element));
  std::memset(static_cast<char*>(q.pre) + rows * row, 0, size_t(q.tokens * q.top_k - rows) * row);
}

// First product and activation: hidden rows, packed as the second product reads them.
template <class D, class M = Floats<D>>
void first_product(const Pool& pool, const Plan& plan, const RoutedExperts& q, const void* x, float* hidden, int padded) {
  const int per_panel = q.activation.gated ? PANEL / 2 : PANEL;
  by_rows<D, M>(pool, plan, x, q.gate_up, [&](const Chunk& chunk, int panel, const RowBlock& block, const float* tile) {
    float bias[PANEL];
    const bool biased = panel_bias(q.gate_up_bias, q.gate_up, chunk.expert, panel, bias);
    const Columns from = columns_of(q.gate_up, panel);
    const int dword = panel * per_panel / D::PER_DWORD, there = from.count[0];
    for (int r = 0; r < block.rows; r++, tile += PANEL) {
      if (q.pre) store_pre<D>(from, tile, biased ? bias : nullptr, static_cast<typename D::Element*>(q.pre) + (block.start + r) * q.gate_up.columns);
      float* to = hidden + block.start * padded + int64_t(dword / CHUNK) * block.rows * CHUNK + r * CHUNK + dword % CHUNK;
      for (int c = 0; c < PANEL / 2; c += WIDTH) {
        vec g = load(tile + c), u = load(tile + PANEL / 2 + c);
        if (biased) g += load(bias + c), u += load(bias + PANEL / 2 + c);
        auto* element = (typename D::Element*)to + c;
        if (q.activation.gated) {
          D::store(element, activate(q.activation, g, u));
          // Columns past the last one would be NaN for infinite x, and NaN times a padded zero weight is NaN.
          for (int i = std::max(there - c, 0); i < WIDTH; i++) element[i] = 0;
        } else {
          D::store(element, gate_function(q.activation, g));
          // The second half of 32 float32 columns is the next chunk of 16 dwords.
          auto* second = D::PER_DWORD == 1 ? (typename D::Element*)(to + block.rows * CHUNK) + c : element + PANEL / 2;
          D::store(second, gate_function(q.activation, u));
        }
      }
    }
  });
}

}  // namespace moe_fn
