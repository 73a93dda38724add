// Gradients of routed_experts: the activation's derivatives in the epilogue of the product with down, and outer products. The first product
// is recomputed if the forward did not save it (2/9 of the FLOPs of all products); no [rows, hidden] tensor is allocated.
#include "lora_backward.h"

namespace moe_fn {
namespace {

// The first product, with its bias, as rows of D's elements in the order of the weights' columns.
template <class D>
void hidden_again(const Pool& pool, const Plan& plan, const RoutedExperts& q, typename D::Element* hidden, const Added<D>& added) {
  const int64_t width = q.gate_up.columns;
  by_rows<D>(pool, plan, q.x, q.gate_up, [&](const Chunk& chunk, int panel, const RowBlock& block, float* tile) {
    added(block, panel, tile);
    float bias[PANEL];
    const bool biased = panel_bias(q.gate_up_bias, q.gate_up, chunk.expert, panel, bias);
    const Columns to = columns_of(q.gate_up, panel);
    for (int r = 0; r < block.rows; r++) store_pre<D>(to, tile + r * PANEL, biased ? bias : nullptr, hidden + (block.start + r) * width);
  });
}

// 32 gates and 32 ups of a panel in a row of pre-activations: two runs of elements, or one in which they alternate. The last panel of a
// row has fewer, which go through a copy.
template <class D>
struct GatesAndUps {
  using Element = typename D::Element;
  const bool gated, interleaved;
  const int64_t first, inner;  // the panel's first activated column; activated columns
  const int count;
  int64_t run() const { return interleaved ? 2 * count : count; }
  int64_t start(int i) const { return interleaved ? 2 * first : first + i * inner; }
  template <class From, class To>
  void copy(From from, To to) const {
    for (int i = 0; i < (gated && !interleaved ? 2 : 1); i++) std::memcpy(to(i), from(i), size_t(run()) * sizeof(Element));
  }
  bool whole() const { return count == PANEL; }
  // f(v, gates, ups) -> their gradients, for vectors v of the panel.
  template <class F>
  void each(const Element* row, Element* d_row, F f) const {
    Element given[2 * PANEL] = {}, found[2 * PANEL];
    if (!whole()) copy([&](int i) { return row + start(i); }, [&](int i) { return given + i * PANEL; });
    const Element *g = whole() ? row + start(0) : given, *u = whole() ? row + start(1) : given + PANEL;
    Element *d_g = whole() ? d_row + start(0) : found, *d_u = whole() ? d_row + start(1) : found + PANEL;
    for (int v = 0; v < PANEL; v += WIDTH) {
      if (interleaved) {
        const vec a = D::load(g + 2 * v), b = D::load(g + 2 * v + WIDTH);
        const auto [to_gate, to_up] = f(v, even(a, b), odd(a, b));
        D::store(d_g + 2 * v, low(to_gate, to_up)), D::store(d_g + 2 * v + WIDTH, high(to_gate, to_up));
      } else {
        const auto [to_gate, to_up] = f(v, D::load(g + v), gated ? D::load(u + v) : vec{});
        D::store(d_g + v, to_gate);
        if (gated) D::store(d_u + v, to_up);
      }
    }
    if (!whole()) copy([&](int i) { return found + i * PANEL; }, [&](int i) { return d_row + start(i); });
  }
};

// d a = down.T g. Its epilogue computes d hidden from the pre-activations `pre` (which may be the same memory), the weighted activations
// `scaled`, and `dots`, the sums of a * d a over each panel.
template <class D>
void through_activation(const Pool& pool, const Plan& plan, const RoutedExperts& q, const void* gradient, const typename D::Element* pre,
                        typename D::Element* d_hidden, typename D::Element* scaled, float* dots, const Added<D>& added) {
  struct Pair { vec to_gate, to_up; };
  const int64_t inner = q.down.inner, width = q.gate_up.columns;
  const Weight flipped = q.down.flipped();
  const int panels = flipped.panels();
  const bool gated = q.activation.gated;
  by_rows<D>(pool, plan, gradient, flipped, [&](const Chunk&, int panel, const RowBlock& block, float* tile) {
    added(block, panel, tile);
    const GatesAndUps<D> columns{gated, gated && q.gate_up.interleaved, int64_t(panel) * PANEL, inner, columns_here(inner, panel)};
    for (int r = 0; r < block.rows; r++, tile += PANEL) {
      const int64_t slot = block.start + r;
      float a[PANEL];
      vec sum{};
      const vec weight = splat(plan.weight[slot]);
      columns.each(pre + slot * width, d_hidden + slot * width, [&](int v, vec g, vec u) {
        const vec d_a = load(tile + v);
        Slopes s;
        if (gated) {
          s = activation_slopes(q.activation, g, u);
        } else {
          const Slope f = gate_slope(q.activation, g);
          s = {f.value, f.slope, vec{}};
        }
        sum += d_a * s.value;
        store(a + v, weight * s.value);
        return Pair{weight * d_a * s.to_gate, weight * d_a * s.to_up};
      });
      float total = 0;
      for (int i = 0; i < WIDTH; i++) total += sum[i];
      dots[slot * panels + panel] = total;
      store_panel<D>(scaled + slot * inner, inner, panel, a);
    }
  });
}

// d x: second_product with d hidden instead of hidden rows, gate_up instead of down, and without routing weights. d hidden becomes packed
// rows, block by block in its own memory: fresh memory of its size would cost as much as packing it.
template <class D>
void gradient_of_x(const Pool& pool, const Plan& plan, const RoutedExperts& q, float* d_hidden, void* out, const Added<D>& added) {
  RoutedExperts back = q;
  back.down = q.gate_up.flipped();
  back.down_bias = {nullptr, Type::f32, 0};
  back.out = out;
  back.hidden_out = q.hidden_in;
  const int padded = padded_steps(back.down);
  const int64_t row = back.down.row_bytes();
  Buffer apart;
  if (row < padded * 4) apart = buffer(int64_t(plan.source.size()) * padded);  // a packed row is longer
  float* packed = apart ? apart.get() : d_hidden;
  std::atomic<size_t> counter{0};
  pool([&](int) {
    Buffer block = buffer(ROWS_OF<D> * padded);
    for (size_t b = counter++; b < plan.blocks.size(); b = counter++) {
      const RowBlock& rows = plan.blocks[b];
      pack_rows<D>(plan, {0, rows.start, int(b), int(b) + 1, rows.rows}, nullptr, d_hidden, row, padded, block.get());
      std::memcpy(packed + rows.start * padded, block.get(), size_t(rows.rows) * padded * 4);
    }
  });
  second_product<D>(pool, plan, nullptr, back, packed, padded, added);
}

// out = sums over rows row(slot), first <= slot < end, of their elements, times weight[slot] if there is one.
template <class D, class Row>
void sum_rows(Row row, int64_t first, int64_t end, const float* weight, int64_t columns, float* out) {
  std::memset(out, 0, size_t(columns) * 4);
  for (int64_t slot = first; slot < end; slot++) {
    const typename D::Element* from = row(slot);
    const float w = weight ? weight[slot] : 1.f;
    int64_t i = 0;
    for (; i + WIDTH <= columns; i += WIDTH) store(out + i, load(out + i) + splat(w) * D::load(from + i));
    for (; i < columns; i++) out[i] += w * widen_one(from[i]);
  }
}

template <class D>
float dot_of_floats(const typename D::Element* row, const float* with, int64_t count) {
  vec lanes{};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) lanes += D::load(row + i) * load(with + i);
  float sum = 0;
  for (; i < count; i++) sum += widen_one(row[i]) * with[i];
  for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
  return sum;
}

// Gradients of biases and routing weights. A task has some columns of an expert's bias, or the routing weights of its slots.
template <class D>
void small_gradients(const Pool& pool, const Plan& plan, const RoutedExperts& q, const RoutedGradients& to, const std::vector<int64_t>& starts,
                     const typename D::Element* d_hidden, const float* dots, int panels) {
  using Element = typename D::Element;
  constexpr int64_t COLUMNS = 512;
  const int64_t hidden = q.hidden_out, width = q.gate_up.columns;
  const Element* g = static_cast<const Element*>(to.gradient);
  if (to.expert_weights) std::memset(to.expert_weights, 0, size_t(q.tokens) * q.top_k * 4);
  const int64_t of_gate_up = to.gate_up_bias ? (width + COLUMNS - 1) / COLUMNS : 0, of_down = to.down_bias ? (hidden + COLUMNS - 1) / COLUMNS : 0;
  const int64_t parts = of_gate_up + of_down + (to.expert_weights ? 1 : 0);
  std::atomic<int64_t> counter{0};
  pool([&](int) {
    for (int64_t task = counter++; task < q.experts * parts; task = counter++) {
      const int64_t e = task / parts, part = task % parts, first = starts[e], end = starts[e + 1];
      if (part < of_gate_up) {
        const int64_t c = part * COLUMNS;
        sum_rows<D>([&](int64_t slot) { return d_hidden + slot * width + c; }, first, end, nullptr, std::min(COLUMNS, width - c), to.gate_up_bias + e * width + c);
      } else if (part < of_gate_up + of_down) {
        const int64_t c = (part - of_gate_up) * COLUMNS;
        const float* weight = plan.weight.data();
        sum_rows<D>([&](int64_t slot) { return g + plan.source[slot] * hidden + c; }, first, end, weight, std::min(COLUMNS, hidden - c), to.down_bias + e * hidden + c);
      } else {
        std::vector<float> bias(q.down_bias.data ? hidden : 0);
        for (int64_t i = 0; i < int64_t(bias.size()); i++) bias[i] = q.down_bias.at(e, i);
        for (int64_t slot = first; slot < end; slot++) {
          float sum = 0;
          for (int p = 0; p < panels; p++) sum += dots[slot * panels + p];
          if (q.down_bias.data) sum += dot_of_floats<D>(g + plan.source[slot] * hidden, bias.data(), hidden);
          to.expert_weights[plan.slot[slot]] = sum;
        }
      }
    }
  });
}

}  // namespace

void routed_experts_backward(const Pool& pool, const RoutedExperts& q, const RoutedGradients& to) {
  with_type(q.type, [&](auto d) {
    using D = decltype(d);
    using Element = typename D::Element;
    const Plan plan = plan_of_routing(q, std::min(chunk_rows<D>(q.gate_up), chunk_rows<D>(q.gate_up.flipped())), ROWS_OF<D>, ROWS_TOGETHER<D>);
    const std::vector<int64_t> starts = starts_of_plan(plan, q.experts);
    const int64_t rows = int64_t(plan.source.size()), width = q.gate_up.columns, inner = q.down.inner;
    const int panels = int((inner + PANEL - 1) / PANEL);
    auto elements = [](int64_t n) { return buffer((n * int64_t(sizeof(Element)) + 3) / 4); };
    Buffer hidden = elements(rows * width), scaled = elements(rows * inner), dots = buffer(rows * panels);
    Element *h = (Element*)hidden.get(), *a = (Element*)scaled.get();
    GradientsOfAdapters<D> adapters(pool, plan, q, to);
    if (!to.pre) hidden_again<D>(pool, plan, q, h, adapters.of_x());
    through_activation<D>(pool, plan, q, to.gradient, to.pre ? static_cast<const Element*>(to.pre) : h, h, a, dots.get(), adapters.back_from_gradient());
    small_gradients<D>(pool, plan, q, to, starts, h, dots.get(), panels);
    const Added<D> of_adapters = to.x ? adapters.back_from_hidden(h) : Added<D>{};
    adapters.store(h, a);
    const Side x{q.x, q.hidden_in, plan.source.data()}, g{to.gradient, q.hidden_out, plan.source.data()}, d_h{h, width, nullptr}, s{a, inner, nullptr};
    const bool out_in = q.gate_up.transposed;
    if (to.down) outer_products<D>(pool, out_in ? g : s, out_in ? s : g, starts, to.down);
    scaled.reset();
    if (to.gate_up) outer_products<D>(pool, out_in ? d_h : x, out_in ? x : d_h, starts, to.gate_up);
    if (to.x) gradient_of_x<D>(pool, plan, q, hidden.get(), to.x, of_adapters);  // the last, for it packs d hidden in place
  });
}

}  // namespace moe_fn
