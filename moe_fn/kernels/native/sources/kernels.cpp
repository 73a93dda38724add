#include "forward.h"

#include <chrono>

namespace moe_fn {

float Bias::at(int64_t expert, int64_t i) const {
  return with_type(type, [&](auto d) { return widen_one(static_cast<const typename decltype(d)::Element*>(data)[expert * size + i]); });
}

namespace {

Plan plan_of_groups(const Groups& g, int rows_of_chunk, int rows_of_block, int rows_together) {
  Plan plan;
  const int64_t experts = g.count / g.segments, rows_of_segment = g.rows / g.segments, sets = g.weight_sets;
  for (int64_t set = 0; set < sets; set++)
    for (int64_t e = 0; e < experts; e++) {
      const int64_t start = int64_t(plan.source.size());
      for (int64_t s = 0; s < g.segments; s++) {
        if (s * sets / g.segments != set) continue;
        const int64_t group = s * experts + e;
        for (int64_t r = e ? g.ends[group - 1] : s * rows_of_segment; r < g.ends[group]; r++) plan.source.push_back(r);
      }
      plan.add(set * experts + e, start, int64_t(plan.source.size()), rows_of_chunk, rows_of_block, rows_together);
    }
  return plan;
}

}  // namespace

void routed_experts(const Pool& pool, const RoutedExperts& q) {
  if (q.gate_up.codes) return quantized_experts(pool, q);
  with_type(q.type, [&](auto d) {
    using D = decltype(d);
    if (!q.tokens) return;
    const Plan plan = plan_of_routing(q, chunk_rows<D>(q.gate_up), ROWS_OF<D>, ROWS_TOGETHER<D>);
    const int width = hidden_width(q);
    const int padded = round_up(std::max(width / D::PER_DWORD, q.down.steps()), CHUNK);
    const int64_t rows = int64_t(plan.source.size());
    Buffer hidden = buffer(rows * padded);
    if (width / D::PER_DWORD < padded) std::memset(hidden.get(), 0, size_t(rows) * padded * 4);
    clear_pre<D>(q, rows);
    const Adapted adapted = adapted_rows(q, plan, ROWS_OF<D>);
    first_product<D>(pool, plan, q, q.x, hidden.get(), padded, adapters_of_x<D>(pool, adapted, q));
    second_product<D>(pool, plan, plan.weight.data(), q, hidden.get(), padded, adapters_of_hidden<D>(pool, adapted, q, hidden.get(), padded));
  });
}

void grouped_matmul(const Pool& pool, Type type, const void* rows, const Weight& weight, const Groups& groups, void* out) {
  with_type(type, [&](auto d) {
    using D = decltype(d);
    using Element = typename D::Element;
    const Plan plan = plan_of_groups(groups, chunk_rows<D>(weight), ROWS_OF<D>, ROWS_TOGETHER<D>);
    Element* to = static_cast<Element*>(out);
    const int64_t n = weight.columns;
    // Rows without a group are 0.
    int64_t done = 0;
    auto clear = [&](int64_t until) {
      if (until > done) std::memset(to + done * n, 0, size_t(until - done) * n * sizeof(Element));
    };
    const int64_t experts = groups.count / groups.segments, rows_of_segment = groups.rows / groups.segments;
    for (int64_t s = 0; s < groups.segments; s++) {
      clear(s * rows_of_segment);
      done = groups.ends[(s + 1) * experts - 1];
    }
    clear(groups.rows);
    by_rows<D>(pool, plan, rows, weight, [&](const Chunk&, int panel, const RowBlock& block, const float* tile) {
      for (int r = 0; r < block.rows; r++)
        store_panel<D>(to + plan.source[block.start + r] * n, n, panel, tile + r * PANEL);
    });
  });
}

void grouped_outer(const Pool& pool, Type type, const void* left, int64_t m, const void* right, int64_t n, const Groups& groups, void* out) {
  with_type(type, [&](auto d) {
    using D = decltype(d);
    const Plan plan = plan_of_groups(groups, 1 << 30, ROWS_OF<D>, ROWS_TOGETHER<D>);
    const std::vector<int64_t> starts = starts_of_plan(plan, groups.count / groups.segments * groups.weight_sets);
    outer_products<D>(pool, {left, m, plan.source.data()}, {right, n, plan.source.data()}, starts, out);
  });
}

int64_t read_bytes(const Pool& pool, const void* data, int64_t bytes) {
  std::atomic<int64_t> total{0};
  const int64_t share = bytes / pool.workers / 512 * 256;  // two streams per worker
  pool([&](int worker) {
    const char *one = static_cast<const char*>(data) + 2 * share * worker, *two = one + share;
    veci a{}, b{};
    for (int64_t i = 0; i < share; i += 256)
#pragma GCC unroll 16
      for (int u = 0; u < 256; u += WIDTH * 4) a += (veci)load(one + i + u), b += (veci)load(two + i + u);
    int64_t sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += a[i] + int64_t(b[i]);
    total += sum;
  });
  return total;
}

double tile_rate(const Pool& pool, Type type, int64_t repeats) {
  double seconds = 0;
  constexpr int STEPS = 512, BLOCKS = 8;  // 224 KB of rows (512 KB with tiles), 64 KB of panel
  with_type(type, [&](auto d) {
    using D = decltype(d);
    auto start = std::chrono::steady_clock::now();
    pool([&](int) {
      [[maybe_unused]] const Region<D> region;
      Buffer a = buffer(BLOCKS * ROWS_OF<D> * STEPS), b = buffer(STEPS * PANEL), c = buffer(ROWS_OF<D> * PANEL);
      std::memset(a.get(), 0, BLOCKS * ROWS_OF<D> * STEPS * 4);
      std::memset(b.get(), 0, STEPS * PANEL * 4);
      for (int64_t i = 0; i < repeats; i++)
        for (int block = 0; block < BLOCKS; block++)
          tiles<D>.of[ROWS_OF<D>](a.get() + int64_t(block) * ROWS_OF<D> * STEPS, b.get(), STEPS, c.get(), false, nullptr, 0);
    });
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    seconds /= 2.0 * ROWS_OF<D> * PANEL * STEPS * D::PER_DWORD * BLOCKS * double(repeats) * pool.workers;
  });
  return 1e-9 / seconds;
}

}  // namespace moe_fn
