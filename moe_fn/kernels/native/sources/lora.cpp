#include "lora.h"

namespace moe_fn {

Adapted adapted_rows(const RoutedExperts& q, const Plan& all, int most_rows) {
  Adapted found{all, {}, {}, {}};
  Plan& plan = found.plan;
  if (!q.adapters) return found;
  for (const Chunk& chunk : all.chunks) {
    int64_t last = -1;  // adapter of the chunk before this one, in the same chunk of `all`
    for (int b = chunk.first_block; b < chunk.last_block; b++) {
      found.first.push_back(int(plan.blocks.size()));
      const int64_t end = all.blocks[b].start + all.blocks[b].rows;
      for (int64_t start = all.blocks[b].start, next; start < end; start = next) {
        const int64_t adapter = all.adapter[start];
        for (next = start + 1; next < std::min(end, start + most_rows) && all.adapter[next] == adapter; next++) {}
        if (adapter == q.adapters) continue;
        const int64_t pair = adapter * q.experts + chunk.expert;
        const int number = int(plan.blocks.size()), rows = int(next - start);
        if (adapter != last) plan.chunks.push_back({pair, start, number, number, 0});
        last = adapter;
        plan.blocks.push_back({start, rows});
        found.pair.push_back(pair);
        plan.chunks.back().last_block++;
        plan.chunks.back().rows += rows;
        plan.most_rows = std::max(plan.most_rows, plan.chunks.back().rows);
      }
    }
  }
  found.first.push_back(int(plan.blocks.size()));
  return found;
}

namespace {

// Rows of a chunk out of packed rows of `all`: they are in other blocks there.
void pack_again(const Adapted& rows, const Chunk& chunk, const GivenRows& given, int64_t row_bytes, int padded, float* out) {
  const std::vector<RowBlock>& blocks = rows.all.blocks;
  auto after = [](int64_t start, const RowBlock& block) { return start < block.start; };
  for (int b = chunk.first_block; b < chunk.last_block; b++) {
    const RowBlock &here = rows.plan.blocks[b], &from = *(std::upper_bound(blocks.begin(), blocks.end(), here.start, after) - 1);
    for (int r = 0; r < here.rows; r++) {
      const float* row = static_cast<const float*>(given.data) + from.start * given.packed + (here.start - from.start + r) * CHUNK;
      float* to = out + (here.start - chunk.start) * padded + r * CHUNK;
      int64_t left = row_bytes;
      for (; left > 0; left -= CHUNK * 4, row += int64_t(from.rows) * CHUNK, to += int64_t(here.rows) * CHUNK) {
        std::memcpy(to, row, size_t(std::min<int64_t>(left, CHUNK * 4)));
        if (left < CHUNK * 4) std::memset((char*)to + left, 0, size_t(CHUNK * 4 - left));
      }
    }
  }
}

}  // namespace

template <class D>
Added<D> low_rank(const Pool& pool, const Adapted& rows, const Factor& a, const Factor& b, const GivenRows& given, typename D::Element* plain) {
  using Element = typename D::Element;
  Added<D> added;
  if (!a.weight.data) return added;
  const Weight& w = a.weight;
  const int inputs = padded_steps(w), panels = w.panels(), padded = panels * (PANEL / D::PER_DWORD);
  const int64_t row_bytes = w.inner * w.element;
  added.rows = &rows, added.b = b, added.padded = padded;
  added.u = buffer(int64_t(rows.all.source.size()) * padded);
  const Plan& plan = rows.plan;
  std::atomic<size_t> counter{0};
  pool([&](int) {
    [[maybe_unused]] const Region<D> region;
    Buffer packed = buffer(int64_t(plan.most_rows) * inputs), sums = buffer(Floats<D>::sums_floats(w, round_up(plan.most_rows, ROWS_TOGETHER<D>), panels));
    Buffer scratch = buffer(scratch_floats<D>(w));
    for (size_t c = counter++; c < plan.chunks.size(); c = counter++) {
      const Chunk& chunk = plan.chunks[c];
      if (given.packed) pack_again(rows, chunk, given, row_bytes, inputs, packed.get());
      else pack_rows<D>(plan, chunk, given.source, given.data, row_bytes, inputs, packed.get());
      Weight matrix = w;
      matrix.data = a.at(chunk.expert);
      // Tiles write whole units of rows, and blocks of one adapter are not whole units: they are multiplied one by one.
      const int together = TILED<D> ? 1 : chunk.last_block - chunk.first_block;
      for (int first = chunk.first_block; first < chunk.last_block; first += together) {
        const RowBlock* blocks = plan.blocks.data() + first;
        Floats<D>::run(
            blocks, together, [&](int i) { return packed.get() + (blocks[i].start - chunk.start) * inputs; }, matrix, 0, 0, panels, nullptr, sums.get(),
            scratch.get(), [](int, int) {}, [&](int p, int i, float* tile) {
              const RowBlock& block = blocks[i];
              for (int r = 0; r < block.rows; r++, tile += PANEL) {
                for (int c = columns_here(w.columns, p); c < PANEL; c++) tile[c] = 0;  // for infinite x they are NaN
                for (int v = 0; v < PANEL; v += WIDTH) {
                  const int dword = (p * PANEL + v) / D::PER_DWORD;
                  D::store((Element*)(added.u.get() + block.start * padded + int64_t(dword / CHUNK) * block.rows * CHUNK + r * CHUNK + dword % CHUNK),
                           load(tile + v));
                }
                if (plain) store_panel<D>(plain + (block.start + r) * w.columns, w.columns, p, tile);
              }
            });
      }
    }
  });
  return added;
}
template Added<F32> low_rank<F32>(const Pool&, const Adapted&, const Factor&, const Factor&, const GivenRows&, float*);
template Added<BF16> low_rank<BF16>(const Pool&, const Adapted&, const Factor&, const Factor&, const GivenRows&, uint16_t*);
template Added<F16> low_rank<F16>(const Pool&, const Adapted&, const Factor&, const Factor&, const GivenRows&, Half*);

}  // namespace moe_fn
