// The first product of the forward pass, for float and quantized weights.
#pragma once
#include "lora.h"

namespace moe_fn {

// The inner dimension of the second product is padded to whole panels of the first one with zeros, for prepared and plain weights.
inline int hidden_width(const RoutedExperts& q) { return q.gate_up.panels() * (q.activation.gated ? PANEL / 2 : PANEL); }

template <class D>
void clear_pre(const RoutedExperts& q, int64_t rows) {  // rows without an expert: an op must not return uninitialized memory
  if (!q.pre) return;
  const int64_t row = q.gate_up.columns * int64_t(sizeof(typename D::Element));
  std::memset(static_cast<char*>(q.pre) + rows * row, 0, size_t(q.tokens * q.top_k - rows) * row);
}

// First product and activation: writes hidden rows, packed for the second product.
template <class D, class M = Floats<D>>
void first_product(const Pool& pool, const Plan& plan, const RoutedExperts& q, const void* x, float* hidden, int padded, const Added<D>& added) {
  const int per_panel = q.activation.gated ? PANEL / 2 : PANEL;
  const bool plain = is_swiglu(q.activation) && !q.pre && !q.gate_up_bias.data;
  by_rows<D, M>(pool, plan, x, q.gate_up, [&](const Chunk& chunk, int panel, const RowBlock& block, float* tile) {
    added(block, panel, tile);
    float bias[PANEL];
    const bool biased = panel_bias(q.gate_up_bias, q.gate_up, chunk.expert, panel, bias);
    const Columns from = columns_of(q.gate_up, panel);
    const int dword = panel * per_panel / D::PER_DWORD, there = from.count[0];
    if (plain && there == PANEL / 2) {
      float* to = hidden + block.start * padded + int64_t(dword / CHUNK) * block.rows * CHUNK + dword % CHUNK;
      for (int r = 0; r < block.rows; r++, tile += PANEL, to += CHUNK)
        for (int c = 0; c < PANEL / 2; c += WIDTH) D::store((typename D::Element*)to + c, swiglu(load(tile + c), load(tile + PANEL / 2 + c)));
      return;
    }
    for (int r = 0; r < block.rows; r++, tile += PANEL) {
      if (q.pre) store_pre<D>(from, tile, biased ? bias : nullptr, static_cast<typename D::Element*>(q.pre) + (block.start + r) * q.gate_up.columns);
      float* to = hidden + block.start * padded + int64_t(dword / CHUNK) * block.rows * CHUNK + r * CHUNK + dword % CHUNK;
      for (int c = 0; c < PANEL / 2; c += WIDTH) {
        vec g = load(tile + c), u = load(tile + PANEL / 2 + c);
        if (biased) g += load(bias + c), u += load(bias + PANEL / 2 + c);
        auto* element = (typename D::Element*)to + c;
        if (q.activation.gated) {
          D::store(element, activate(q.activation, g, u));
          // Columns past the last one would be NaN for infinite x, and NaN times the zero weight of padding is NaN.
          for (int i = std::max(there - c, 0); i < WIDTH; i++) element[i] = {};
        } else {
          D::store(element, gate_function(q.activation, g));
          // In float32 the second half of 32 columns is the next chunk of 16 dwords.
          auto* second = D::PER_DWORD == 1 ? (typename D::Element*)(to + block.rows * CHUNK) + c : element + PANEL / 2;
          D::store(second, gate_function(q.activation, u));
        }
      }
    }
  });
}

}  // namespace moe_fn
