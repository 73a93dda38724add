#include "quantized.h"

#include "forward.h"

namespace moe_fn {
namespace {

template <class D, class C>
void experts_of(const Pool& pool, const RoutedExperts& q) {
  using M = Quantized<C>;
  const int chunk = M::chunk_rows(q.gate_up);
  const bool tiled = M::suits_tiles(q.gate_up) && M::suits_tiles(q.down);
  const Plan plan = plan_of_routing(q, [&](Plan& plan, int64_t expert, int64_t start, int64_t end) {
    if (tiled && end - start >= ROWS_TOGETHER<Int8>) plan.add(expert, start, end, chunk, ROWS_OF<Int8>, ROWS_TOGETHER<Int8>);
    else plan.add(expert, start, end, chunk, BLOCK_ROWS, 1);
  });
  const int64_t rows = int64_t(plan.source.size());
  const RowShape<C> x_shape(q.gate_up), hidden_shape(q.down);
  const int padded = round_up(hidden_width(q) / D::PER_DWORD, CHUNK);
  Buffer x = buffer(q.tokens * x_shape.all());
  code_rows<C, D>(pool, q.gate_up, q.x, q.tokens, x.get());
  Buffer hidden = buffer(rows * padded);
  clear_pre<D>(q, rows);
  const Adapted adapted = adapted_rows(q, plan, ROWS_OF<D>);
  first_product<D, M>(pool, plan, q, x.get(), hidden.get(), padded, adapters_of_x<D>(pool, adapted, q));
  const Added<D> added = adapters_of_hidden<D>(pool, adapted, q, hidden.get(), padded);
  Buffer coded = buffer(rows * hidden_shape.all());
  code_blocks<C, D>(pool, q.down, plan.blocks, hidden.get(), padded, coded.get());
  second_product<D, M>(pool, plan, plan.weight.data(), q, coded.get(), hidden_shape.all(), added);
}

template <class D, class Dot>
void with_scheme(const Pool& pool, const RoutedExperts& q) {
  const Codes& codes = *q.gate_up.codes;
  if (codes.scheme == Scheme::int4) return experts_of<D, Nibbles<Dot, false>>(pool, q);
  if (codes.scheme == Scheme::int8) return experts_of<D, Bytes<Dot, false>>(pool, q);
  if constexpr (!std::is_same_v<Dot, Int8>) {
    if (codes.scheme == Scheme::e2m1) return experts_of<D, Nibbles<Dot, true>>(pool, q);
    experts_of<D, Bytes<Dot, true>>(pool, q);
  }
}

}  // namespace

void quantized_experts(const Pool& pool, const RoutedExperts& q) {
  if (!q.tokens) return;
  with_type(q.type, [&](auto d) {
    using D = decltype(d);
    using Dot = std::conditional_t<WIDENED<D> == 1, D, F32>;
    q.gate_up.codes->int8_rows ? with_scheme<D, Int8>(pool, q) : with_scheme<D, Dot>(pool, q);
  });
}

}  // namespace moe_fn
