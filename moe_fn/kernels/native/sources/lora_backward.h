// Gradients of low-rank adapters, and what they add to the gradients of their products' rows.
#pragma once
#include "lora.h"

namespace moe_fn {

// With v = B.T g of the gradient g of a product's result, d A = v.T (its rows) and d B = g.T u, and A.T v is added
// to the gradient of its rows. Here g of the second product is without the routing weight, so its rows are the weighted activations.
template <class D>
class GradientsOfAdapters {
  using Element = typename D::Element;
  const Pool& pool;
  const Plan& plan;
  const RoutedExperts& q;
  const RoutedGradients& to;
  const Adapted adapted;
  Buffer from_gradient, from_hidden;  // v of both products, [slots, rank]

  Element* rows_of(Buffer& rows, const Factor& b) {
    if (!rows) rows = buffer((int64_t(plan.source.size()) * b.weight.inner * int64_t(sizeof(Element)) + 3) / 4);
    return (Element*)rows.get();
  }
  // out[group] = left.T right over the rows of one matrix of `like`: of an adapter and expert, or of an adapter.
  void outer(const Side& left, const Side& right, const Factor& like, void* out) const {
    std::vector<int64_t> starts(q.adapters * q.experts / like.experts_sharing + 1, 0), slots;
    for (size_t i = 0; i < adapted.pair.size(); i++) starts[adapted.pair[i] / like.experts_sharing + 1] += adapted.plan.blocks[i].rows;
    for (size_t g = 1; g < starts.size(); g++) starts[g] += starts[g - 1];
    slots.resize(starts.back());
    std::vector<int64_t> next(starts);
    for (size_t i = 0; i < adapted.pair.size(); i++)
      for (int r = 0; r < adapted.plan.blocks[i].rows; r++) slots[next[adapted.pair[i] / like.experts_sharing]++] = adapted.plan.blocks[i].start + r;
    std::vector<int64_t> tokens(slots.size());
    for (size_t i = 0; i < slots.size(); i++) tokens[i] = plan.source[slots[i]];
    auto sorted = [&](const Side& side) { return Side{side.data, side.width, (side.source ? tokens : slots).data()}; };
    outer_products<D>(pool, sorted(left), sorted(right), starts, out);
  }

 public:
  GradientsOfAdapters(const Pool& pool, const Plan& plan, const RoutedExperts& q, const RoutedGradients& to)
      : pool(pool), plan(plan), q(q), to(to), adapted(adapted_rows(q, plan, ROWS_OF<D>)) {}
  Added<D> of_x() const { return adapters_of_x<D>(pool, adapted, q); }
  Added<D> back_from_gradient() {
    const Factor a = q.down_lora.a.flipped(), b = q.down_lora.b.flipped();
    return low_rank<D>(pool, adapted, b, a, {to.gradient, plan.source.data()}, rows_of(from_gradient, q.down_lora.b));
  }
  Added<D> back_from_hidden(const Element* d_hidden) {
    const Factor a = q.gate_up_lora.a.flipped(), b = q.gate_up_lora.b.flipped();
    return low_rank<D>(pool, adapted, b, a, {d_hidden, nullptr}, rows_of(from_hidden, q.gate_up_lora.b));
  }
  void store(const Element* d_hidden, const Element* scaled) {
    const int64_t* source = plan.source.data();
    const int64_t of_gate_up = q.gate_up_lora.b.weight.inner, of_down = q.down_lora.b.weight.inner;
    Buffer u;
    if (to.gate_up_a) {
      if (!from_hidden) back_from_hidden(d_hidden);
      outer({from_hidden.get(), of_gate_up, nullptr}, {q.x, q.hidden_in, source}, q.gate_up_lora.a, to.gate_up_a);
    }
    if (to.gate_up_b) {
      adapters_of_x<D>(pool, adapted, q, rows_of(u, q.gate_up_lora.b));
      outer({d_hidden, q.gate_up.columns, nullptr}, {u.get(), of_gate_up, nullptr}, q.gate_up_lora.b, to.gate_up_b);
    }
    if (to.down_a) outer({from_gradient.get(), of_down, nullptr}, {scaled, q.down.inner, nullptr}, q.down_lora.a, to.down_a);
    if (to.down_b) {
      u = nullptr;
      low_rank<D>(pool, adapted, q.down_lora.a, q.down_lora.b, {scaled, nullptr}, rows_of(u, q.down_lora.b));
      outer({to.gradient, q.hidden_out, source}, {u.get(), of_down, nullptr}, q.down_lora.b, to.down_b);
    }
  }
};

}  // namespace moe_fn
