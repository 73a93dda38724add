#include "decoded.h"
#include "forward.h"

namespace moe_fn {
namespace {

// C: the codes as operands of products, F: as float32 in their order. Experts with many rows get decoded weights, unless a row's bits must not
// depend on the number of rows.
template <class D, class C, class F>
void experts_of(const Pool& pool, const RoutedExperts& q) {
  using Coded = Quantized<C>;
  constexpr bool CAN_DECODE = std::is_same_v<typename C::Dot, D>;
  const bool decodes = CAN_DECODE && !q.gate_up.invariant;
  const bool tiled = Coded::suits_tiles(q.gate_up) && Coded::suits_tiles(q.down);
  const int chunk = Coded::chunk_rows(q.gate_up), chunk_of_decoded = chunk_rows<D>(as_floats<D>(q.gate_up));
  Plan plan = plan_of_routing(q, [&](Plan& plan, int64_t expert, int64_t start, int64_t end) {
    const bool many = decodes && end - start >= DECODED_FROM;
    const size_t first = plan.blocks.size();
    if (many) plan.add(expert, start, end, chunk_of_decoded, ROWS_OF<D>, ROWS_TOGETHER<D>);
    else if (tiled && end - start >= ROWS_TOGETHER<Int8>) plan.add(expert, start, end, chunk, ROWS_OF<Int8>, ROWS_TOGETHER<Int8>);
    else plan.add(expert, start, end, chunk, BLOCK_ROWS, 1);
    for (size_t b = first; b < plan.blocks.size(); b++) plan.blocks[b].decoded = many;
  });
  const int64_t rows = int64_t(plan.source.size());
  const RowShape<C> x_shape(q.gate_up), hidden_shape(q.down);
  const int width = hidden_width(q);
  const int padded = std::max(round_up(std::max(width / D::PER_DWORD, as_floats<D>(q.down).steps()), CHUNK), hidden_shape.all());
  Buffer hidden = buffer(rows * padded);
  clear_pre<D>(q, rows);
  if (width / D::PER_DWORD % CHUNK) std::memset(hidden.get(), 0, size_t(rows) * padded * 4);  // tiles multiply whole chunks
  const Adapted adapted = adapted_rows(q, plan, ROWS_OF<D>);
  const auto to_x = adapters_of_x<D>(pool, adapted, q);
  // Adapters know a block by its place in the plan, so only its chunks are exchanged.
  const std::vector<Chunk> all = plan.chunks;
  auto only = [&](bool decoded) {
    plan.chunks = all;
    std::erase_if(plan.chunks, [&](const Chunk& chunk) { return plan.blocks[chunk.first_block].decoded != decoded; });
    return !plan.chunks.empty();
  };
  if (only(false)) {
    Buffer x = buffer(q.tokens * x_shape.all());
    code_rows<C, D>(pool, q.gate_up, q.x, q.tokens, x.get());
    first_product<D, Coded>(pool, plan, q, x.get(), hidden.get(), padded, to_x);
  }
  if constexpr (CAN_DECODE)
    if (only(true)) first_product<D, Decoded<D, F>>(pool, plan, q, q.x, hidden.get(), padded, to_x);
  plan.chunks = all;
  const Added<D> added = adapters_of_hidden<D>(pool, adapted, q, hidden.get(), padded);
  code_blocks<C, D>(pool, q.down, plan.blocks, hidden.get(), padded);
  using Second = std::conditional_t<CAN_DECODE, Either<Coded, Decoded<D, F>>, Coded>;
  second_product<D, Second>(pool, plan, plan.weight.data(), q, hidden.get(), padded, added);
}

template <class D, class Dot>
void with_scheme(const Pool& pool, const RoutedExperts& q) {
  const Codes& codes = *q.gate_up.codes;
  if (codes.scheme == Scheme::int4) return experts_of<D, Nibbles<Dot, false>, Nibbles<F32, false>>(pool, q);
  if (codes.scheme == Scheme::int8) return experts_of<D, Bytes<Dot, false>, Bytes<F32, false>>(pool, q);
  if constexpr (!std::is_same_v<Dot, Int8>) {
    if (codes.scheme == Scheme::e2m1) return experts_of<D, Nibbles<Dot, true>, Nibbles<F32, true>>(pool, q);
    experts_of<D, Bytes<Dot, true>, Bytes<F32, true>>(pool, q);
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
