// What forward and backward share: plans of a routing, the second product's walk, outer products.
#pragma once
#include "experts.h"

namespace moe_fn {

template <class F>
auto with_type(Type type, F f) { return type == Type::f32 ? f(F32{}) : type == Type::bf16 ? f(BF16{}) : f(F16{}); }

// The bias of the 32 columns of a panel; false if there is none.
inline bool panel_bias(const Bias& bias, const Weight& w, int64_t expert, int panel, float* out) {
  if (!bias.data) return false;
  const Columns from = columns_of(w, panel);
  for (int c = 0; c < PANEL; c++) {
    const int half = c / (PANEL / 2), i = c % (PANEL / 2);
    out[c] = i < from.count[half] ? bias.at(expert, from.start[half] + int64_t(i) * from.stride) : 0.f;
  }
  return true;
}

// Columns of a panel that lie in a row of so many.
inline int columns_here(int64_t columns, int panel) { return int(std::min<int64_t>(PANEL, columns - int64_t(panel) * PANEL)); }

template <class D>
void store_panel(typename D::Element* row, int64_t columns, int panel, const float* from) {
  typename D::Element* out = row + int64_t(panel) * PANEL;
  const int count = columns_here(columns, panel);
  if (count == PANEL) {
    for (int v = 0; v < NV; v++) D::store(out + v * WIDTH, load(from + v * WIDTH));
    return;
  }
  typename D::Element all[PANEL];
  for (int v = 0; v < NV; v++) D::store(all + v * WIDTH, load(from + v * WIDTH));
  std::memcpy(out, all, sizeof(typename D::Element) * count);
}

// One row of a tile of the first product, rounded, to its columns' places in a row of the weights' order.
template <class D>
void store_pre(const Columns& to, const float* tile, const float* bias, typename D::Element* row) {
  typename D::Element out[PANEL];
  for (int v = 0; v < PANEL; v += WIDTH) D::store(out + v, bias ? load(tile + v) + load(bias + v) : load(tile + v));
  for (int half = 0; half < 2; half++) {
    const typename D::Element* from = out + half * (PANEL / 2);
    if (to.stride == 1) std::memcpy(row + to.start[half], from, sizeof(*from) * std::max(to.count[half], 0));
    else
      for (int i = 0; i < to.count[half]; i++) row[to.start[half] + int64_t(i) * to.stride] = from[i];
  }
}

// add(plan, expert, start, end) divides an expert's rows.
template <class Add>
Plan plan_of_routing(const RoutedExperts& q, Add add) {
  Plan plan;
  const int64_t kinds = q.adapters ? q.adapters + 1 : 1;  // rows of an expert are sorted by adapter, those without one last
  auto valid = [&](int64_t id) { return uint64_t(id) < uint64_t(q.experts); };
  auto kind_of = [&](int64_t t) { return q.adapters && q.adapter_ids ? int64_t(std::min(uint64_t(q.adapter_ids[t]), uint64_t(q.adapters))) : 0; };
  std::vector<int64_t> at(q.experts * kinds + 1, 0);
  for (int64_t t = 0, i = 0; t < q.tokens; t++)
    for (int64_t j = 0; j < q.top_k; j++, i++)
      if (valid(q.expert_ids[i])) at[q.expert_ids[i] * kinds + kind_of(t) + 1]++;
  for (int64_t e = 0; e < q.experts * kinds; e++) at[e + 1] += at[e];
  const int64_t rows = at.back();
  plan.source.resize(rows);
  plan.weight.resize(rows);
  plan.slot.resize(rows);
  plan.adapter.resize(q.adapters ? rows : 0);
  std::vector<int64_t> to(at.begin(), at.end() - 1);
  for (int64_t t = 0, i = 0; t < q.tokens; t++)
    for (int64_t j = 0; j < q.top_k; j++, i++)
      if (valid(q.expert_ids[i])) {
        const int64_t slot = to[q.expert_ids[i] * kinds + kind_of(t)]++;
        plan.source[slot] = t;
        plan.weight[slot] = q.expert_weights[i];
        plan.slot[slot] = i;
        if (q.adapters) plan.adapter[slot] = kind_of(t);
      }
  for (int64_t e = 0; e < q.experts; e++) add(plan, e, at[e * kinds], at[(e + 1) * kinds]);
  return plan;
}
inline Plan plan_of_routing(const RoutedExperts& q, int rows_of_chunk, int rows_of_block, int rows_together) {
  return plan_of_routing(
      q, [&](Plan& plan, int64_t expert, int64_t start, int64_t end) { plan.add(expert, start, end, rows_of_chunk, rows_of_block, rows_together); });
}

// Second product and weighted sum: a task owns output columns and goes through all experts in order, so there is no combine pass, no
// buffer of rows x hidden, and one order of every sum. weights: of the sorted slots; null: 1.
// added(block, panel, tile) adds low-rank products to a tile (lora.h).
template <class D, class M = Floats<D>, class Add>
void second_product(const Pool& pool, const Plan& plan, const float* weights, const RoutedExperts& q, const float* hidden, int padded, const Add& added) {
  using Element = typename D::Element;
  const Weight& w = q.down;
  const int panels = w.panels(), workers = pool.workers, chunks = int(plan.chunks.size());
  // Tasks become smaller towards the end, so that workers finish together: each goes through the hidden rows once, so not too small.
  const int per = std::clamp(panels / (workers * 2), 1, 8), least = std::min(per, q.tokens > 64 ? 4 : 1);
  std::vector<int> from{0};
  while (from.back() < panels) from.push_back(std::min(panels, from.back() + std::clamp((panels - from.back()) / (workers * 2), least, per)));
  const int tasks = int(from.size()) - 1;
  const int ldo = per * PANEL, steps_ahead = std::min(padded, block_steps<D>(w));
  const int64_t sums_size = M::sums_floats(w, plan.most_rows, per + 1);
  std::atomic<int> counter{0};
  pool([&](int) {
    [[maybe_unused]] const typename M::Region region;
    Buffer all = buffer(q.tokens * ldo), sums = buffer(sums_size), scratch = buffer(M::scratch_floats(w));
    float* y = all.get();
    for (int task = counter++, following; task < tasks; task = following) {
      following = counter++;
      const int first = from[task], last = from[task + 1];
      std::memset(y, 0, size_t(q.tokens) * ldo * 4);
      for (int c = 0; c < chunks; c++) {
        const Chunk& chunk = plan.chunks[c];
        const float* next = nullptr;
        if (w.prepared && c + 1 < chunks) next = panel_at(w, plan.chunks[c + 1].expert, first);
        else if (w.prepared && following < tasks) next = panel_at(w, plan.chunks[0].expert, from[following]);
        const RowBlock* blocks = plan.blocks.data() + chunk.first_block;
        const int blocks_here = chunk.last_block - chunk.first_block, blocks_ahead = c + 1 < chunks ? plan.chunks[c + 1].last_block - chunk.last_block : 0;
        auto place = [&](int p, const RowBlock& block, int r) { return y + plan.source[block.start + r] * ldo + (p - first) * PANEL; };
        M::run(
            blocks, chunk.last_block - chunk.first_block, [&](int b) { return hidden + blocks[b].start * padded; }, w, chunk.expert, first, last,
            next, sums.get(), scratch.get(),
            [&](int p, int b) {
              if (b < blocks_ahead) prefetch_share(hidden + blocks[b + blocks_here].start * padded, int64_t(blocks[b + blocks_here].rows) * steps_ahead, p - first, last - first);
              for (int r = 0; r < blocks[b].rows; r++)
                for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch((const char*)place(p, blocks[b], r) + line, 1, 3);
            },
            [&](int p, int b, float* tile) {
              added(blocks[b], p, tile);
              float bias[PANEL];
              const bool biased = panel_bias(q.down_bias, w, chunk.expert, p, bias);
              for (int r = 0; r < blocks[b].rows; r++, tile += PANEL) {
                float* to = place(p, blocks[b], r);
                const vec weight = splat(weights ? weights[blocks[b].start + r] : 1.f);
                for (int v = 0; v < PANEL; v += WIDTH) {
                  vec product = load(tile + v);
                  if (biased) product += load(bias + v);
                  store(to + v, load(to + v) + weight * product);
                }
              }
            });
      }
      for (int64_t t = 0; t < q.tokens; t++)
        for (int p = first; p < last; p++)
          store_panel<D>(static_cast<Element*>(q.out) + t * q.hidden_out, q.hidden_out, p, y + t * ldo + (p - first) * PANEL);
    }
  });
}

// Columns [start, start + count) of rows row(0 .. inner), `width` wide, as packed rows of blocks of ROWS_OF<D>: the left side of an outer
// product. Vectors begin at multiples of WIDTH, though not all of the first and last one is asked for.
template <class D, class Row>
void pack_columns(Row row, int64_t inner, int64_t width, int64_t start, int count, int padded, float* out) {
  using Element = typename D::Element;
  constexpr int BLOCK = ROWS_OF<D>;
  int64_t places[16 * BLOCK], apart[16 * BLOCK];  // of a column's first chunk, and from one of its chunks to the next
  for (int i = 0; i < count; i++) {
    const int block = i / BLOCK, rows = std::min(BLOCK, count - block * BLOCK);
    places[i] = int64_t(block) * BLOCK * padded + (i - block * BLOCK) * CHUNK;
    apart[i] = int64_t(rows) * CHUNK;
  }
  for (int s0 = 0; s0 < padded; s0 += WIDTH) {
    const Element *one[WIDTH], *two[WIDTH];
    for (int s = 0; s < WIDTH; s++) {
      const int64_t r = int64_t(s0 + s) * D::PER_DWORD;
      one[s] = r < inner ? (const Element*)row(r) : nullptr;
      two[s] = D::PER_DWORD == 2 && r + 1 < inner ? (const Element*)row(r + 1) : nullptr;
    }
    for (int64_t c0 = start / WIDTH * WIDTH; c0 < start + count; c0 += WIDTH) {
      float all[WIDTH * WIDTH];
      if (c0 + WIDTH <= width) {
        vec x[WIDTH];
        for (int s = 0; s < WIDTH; s++) x[s] = one[s] ? step_of_rows<D>(one[s] + c0, two[s] ? two[s] + c0 : nullptr) : vec{};
        transpose(x, all, WIDTH);
      } else {
        for (int s = 0; s < WIDTH; s++)
          for (int64_t c = c0; c < width; c++) all[(c - c0) * WIDTH + s] = one[s] ? dword_of_rows<D>(one[s] + c, two[s] ? two[s] + c : nullptr) : 0.f;
      }
      const int64_t end = std::min(c0 + WIDTH, start + count);
      for (int64_t c = std::max(c0, start); c < end; c++)
        store(out + places[c - start] + s0 / CHUNK * apart[c - start] + s0 % CHUNK, load(all + (c - c0) * WIDTH));
    }
  }
}

// One side of outer products: rows of `width` elements, the r-th of them at source[r], or at r.
struct Side {
  const void* data;
  int64_t width;
  const int64_t* source;
  template <class D>
  const char* row(int64_t r) const {
    return static_cast<const char*>(data) + (source ? source[r] : r) * width * int64_t(sizeof(typename D::Element));
  }
};

// One task of an outer product: rows [first, last) of the result of one expert, panels [first_panel, last_panel).
struct OuterTask { int64_t expert, first, last; int first_panel, last_panel; };

// out[e] = left[rows of e].T right[rows of e], for rows [starts[e], starts[e + 1]).
template <class D>
void outer_products(const Pool& pool, const Side& left, const Side& right, const std::vector<int64_t>& starts, void* out) {
  using Element = typename D::Element;
  constexpr int BLOCK_STEPS = 512;
  const int64_t m = left.width, n = right.width, experts = int64_t(starts.size()) - 1;
  Element* to = static_cast<Element*>(out);
  int64_t most_rows = 0;
  for (int64_t e = 0; e < experts; e++) most_rows = std::max(most_rows, starts[e + 1] - starts[e]);
  const int most = round_up(int((most_rows + D::PER_DWORD - 1) / D::PER_DWORD), CHUNK);
  const Weight shape{nullptr, 0, n, 0, int(sizeof(Element)), false, false, false, false};
  // Both sides are laid once a task: `rows` of the left one at a time (256 KB, in L2), a group of panels of the right one (4 MB).
  const int rows = std::clamp(256 * 256 / std::max(most, 1) / ROWS_OF<D>, 1, 16) * ROWS_OF<D>;
  const int panels_at_once = int(std::clamp<int64_t>((4 << 20) / (int64_t(std::max(most, 1)) * PANEL * 4), 1, std::max(shape.panels(), 1)));
  const int64_t parts = std::clamp<int64_t>((8 * pool.workers + experts - 1) / std::max<int64_t>(experts, 1), 1, std::max<int64_t>((m + rows - 1) / rows, 1));
  std::vector<OuterTask> tasks;
  for (int64_t e = 0; e < experts; e++)
    for (int64_t part = 0; part < parts; part++)
      for (int p = 0; p < shape.panels(); p += panels_at_once)
        tasks.push_back({e, m * part / parts, m * (part + 1) / parts, p, std::min(p + panels_at_once, shape.panels())});
  std::atomic<int64_t> counter{0};
  pool([&](int) {
    [[maybe_unused]] const Region<D> region;
    Buffer packed = buffer(int64_t(rows) * most), panels = buffer(int64_t(panels_at_once) * most * PANEL), sum = buffer(ROWS_OF<D> * PANEL);
    for (int64_t t = counter++; t < int64_t(tasks.size()); t = counter++) {
      const OuterTask& task = tasks[t];
      Element* result = to + task.expert * m * n;
      const int64_t column = int64_t(task.first_panel) * PANEL, columns = std::min<int64_t>(n, int64_t(task.last_panel) * PANEL) - column;
      const int64_t start = starts[task.expert], inner = starts[task.expert + 1] - start;
      if (!inner) {
        for (int64_t i = task.first; i < task.last; i++) std::memset(result + i * n + column, 0, size_t(columns) * sizeof(Element));
        continue;
      }
      const int steps = int((inner + D::PER_DWORD - 1) / D::PER_DWORD), padded = round_up(steps, CHUNK);
      auto left_row = [&](int64_t r) { return left.row<D>(start + r); };
      auto right_row = [&](int64_t r) { return right.row<D>(start + r); };
      for (int p = task.first_panel; p < task.last_panel; p += PANELS_AT_ONCE) {
        const int together = std::min(PANELS_AT_ONCE, task.last_panel - p);
        Columns from[PANELS_AT_ONCE];
        for (int i = 0; i < together; i++) from[i] = columns_of(shape, p + i);
        lay_rows<D>(from, together, inner, right_row, 0, steps, panels.get() + int64_t(p - task.first_panel) * steps * PANEL);
      }
      for (int64_t i0 = task.first; i0 < task.last; i0 += rows) {
        const int here = int(std::min<int64_t>(rows, task.last - i0));
        pack_columns<D>(left_row, inner, m, i0, here, padded, packed.get());
        for (int p = task.first_panel; p < task.last_panel; p++) {
          const float* panel = panels.get() + int64_t(p - task.first_panel) * steps * PANEL;
          for (int i = 0; i < here; i += ROWS_OF<D>) {
            const int count = std::min(ROWS_OF<D>, here - i);
            for (int k = 0; k < steps; k += BLOCK_STEPS)
              tiles<D>.of[count](packed.get() + int64_t(i) * padded + int64_t(k) * count, panel + int64_t(k) * PANEL, std::min(BLOCK_STEPS, steps - k), sum.get(), k > 0,
                                 nullptr, 0);
            for (int r = 0; r < count; r++) store_panel<D>(result + (i0 + i + r) * n, n, p, sum.get() + r * PANEL);
          }
        }
      }
    }
  });
}

inline std::vector<int64_t> starts_of_plan(const Plan& plan, int64_t experts) {
  std::vector<int64_t> starts(experts + 1, 0);
  for (const Chunk& chunk : plan.chunks) starts[chunk.expert + 1] += chunk.rows;
  for (int64_t e = 0; e < experts; e++) starts[e + 1] += starts[e];
  return starts;
}

}  // namespace moe_fn
