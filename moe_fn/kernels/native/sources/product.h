// Products of sorted rows with their experts' matrices: how rows and panels are divided among workers, and in which order.
#pragma once
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "stream.h"

namespace moe_fn {

// Calls run(context, worker) for every worker, on the caller's thread pool.
using Run = void (*)(void*, int);
struct Pool {
  int workers;
  void (*start)(int workers, Run run, void* context);
  template <class F>
  void operator()(F&& f) const { start(workers, [](void* context, int worker) { (*static_cast<F*>(context))(worker); }, (void*)&f); }
};

// Memory for one call, in huge pages from 4 MB on: page faults of small pages cost as much as the weighted sum (30-60 MB at 1024 tokens).
// 1 KB more than asked for: a tile (amx.h) reads up to 15 packed rows of 64 bytes past the last one.
struct Free { void operator()(void* p) const { std::free(p); } };
using Buffer = std::unique_ptr<float[], Free>;
static inline Buffer buffer(int64_t floats) {
  const size_t bytes = (size_t(std::max<int64_t>(floats, 0)) * 4 + 1024 + 63) / 64 * 64, large = size_t(1) << 21;
  const bool huge = bytes >= 2 * large;
  void* p = std::aligned_alloc(huge ? large : 64, huge ? (bytes + large - 1) / large * large : bytes);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Buffer(static_cast<float*>(p));
}

struct Chunk { int64_t expert, start; int first_block, last_block, rows; };  // consecutive row blocks of one expert that fit in L2 together
struct Plan {
  std::vector<int64_t> source;  // row in x of each sorted slot
  std::vector<float> weight;    // routing weight of each sorted slot
  std::vector<int64_t> slot;    // index in [tokens, top_k] of each sorted slot
  std::vector<int64_t> adapter;  // of each sorted slot; empty without adapters
  std::vector<RowBlock> blocks;
  std::vector<Chunk> chunks;
  int most_rows = 0;  // the largest number of rows of a chunk, of which `together` take as long as one

  void add(int64_t expert, int64_t start, int64_t end, int chunk_rows, int block_rows, int together) {
    const int64_t n = end - start;
    if (n <= 0) return;
    const int64_t nb = (n + block_rows - 1) / block_rows, per = std::max(1, chunk_rows / block_rows), nc = (nb + per - 1) / per;
    const int64_t units = (n + together - 1) / together;  // blocks have equal numbers of units, or one less
    for (int64_t c = 0, b = 0; c < nc; c++) {
      Chunk chunk{expert, start, int(blocks.size()), 0, 0};
      for (const int64_t last = nb * (c + 1) / nc; b < last; b++) {
        const int rows = int(std::min(end - start, (units / nb + (b < units % nb)) * together));
        blocks.push_back({start, rows});
        start += rows;
      }
      chunk.last_block = int(blocks.size());
      chunk.rows = int(start - chunk.start);
      most_rows = std::max(most_rows, round_up(chunk.rows, together));
      chunks.push_back(chunk);
    }
  }
};

static inline int padded_steps(const Weight& w) { return round_up(w.steps(), CHUNK); }
// The longest inner dimension that is one block, in steps. A block of steps sums from zero, for float32's accuracy; tiles do without (amx.h),
// and a longer block has their rows, a panel and the next one in the 2 MB of L2 of CPUs with AMX.
template <class D>
static inline int one_block(const Weight& w) { return TILED<D> && w.prepared ? 2048 : 768; }
// Steps of a block of the inner dimension; it depends on the matrix only, so that the order of sums does not depend on the batch.
template <class D>
static inline int block_steps(const Weight& w) {
  const int steps = w.steps(), most = one_block<D>(w), wanted = most == 768 ? 512 : most;
  if (steps <= most) return steps;
  const int blocks = (steps + wanted - 1) / wanted;
  return round_up((steps + blocks - 1) / blocks, CHUNK);
}
template <class D>
static inline int64_t scratch_floats(const Weight& w) {
  return w.prepared ? 0 : std::max(int64_t(block_steps<D>(w)) * PANEL * (w.transposed ? 1 : PANELS_AT_ONCE), stream_floats<D>(w));
}
template <class D>
static inline int chunk_rows(const Weight& w) {  // 512 KB of packed rows, half of L2
  if (w.invariant && !w.prepared && !w.transposed && !TILED<D>) return STREAM_UNTIL;  // all chunks use `stream`
  return std::max(2 * ROWS_OF<D>, (w.prepared && !TILED<D> ? 1 : 2) * 512 * 256 / std::min(w.steps(), one_block<D>(w)));
}

// Prefetches the part-th of `parts` shares of packed rows: the rows that follow are read once from memory, while the panels of these ones are
// multiplied, and then from L2.
static inline void prefetch_share(const float* rows, int64_t floats, int part, int parts) {
  const int64_t lines = floats / CHUNK;
  for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; i++) __builtin_prefetch(rows + i * CHUNK, 0, 2);
}

// Multiplies one chunk by panels [first, last). rows(b) are the packed rows of block b; before(panel, b) is called before a tile's last step
// block, epilogue(panel, b, tile) after it. `next` is the memory read after this call, or null. sums: rows x 32 floats, times the number of
// panels if the steps are divided into blocks.
template <class D, class P, class Rows, class Before, class Epilogue>
inline void multiply(const RowBlock* blocks, int count, Rows rows, const P& panels, int first, int last, const float* next, float* sums,
                     float* scratch, Before before, Epilogue epilogue) {
  const int steps = panels.w.steps(), block = block_steps<D>(panels.w);
  const int64_t start = blocks[0].start, total = blocks[count - 1].start + blocks[count - 1].rows - start;
  if (panels.suits_dots(total)) {
    for (int p = first; p < last; p++) {
      const Columns from = columns_of(panels.w, p);
      for (int b = 0; b < count; b++) {
        before(p, b);
        dots<D>(rows(b), blocks[b].rows, [&](int c) { return panels.column(from, c); }, panels.w.inner * panels.w.element, sums);
        epilogue(p, b, sums);
      }
    }
    return;
  }
  if (suits_stream<D>(panels.w, total)) return stream<D>(blocks, count, total, rows, panels, first, last, sums, scratch, before, epilogue);
  // Loop over panels outside and blocks of steps inside if there is one block (of steps or of rows); otherwise the reverse: rows stay in L2.
  const bool panels_outside = block == steps || (count == 1 && panels.at_once() == 1);
  const int64_t padded_rows = round_up(int(total), ROWS_TOGETHER<D>);
  const int per = (8 + count - 1) / count;  // lines to prefetch per 4 steps of one tile
  const bool rows_ahead = panels.w.prepared && !panels_outside;
  auto one = [&](int p, int k) {
    const int steps_here = std::min(block, steps - k);
    const bool final = k + steps_here == steps;
    const float* b = panels.get(p, first, last, k, steps_here, scratch);
    const float* ahead = nullptr;
    if (panels.w.prepared) {
      if (panels_outside)
        ahead = !final ? b + int64_t(steps_here) * PANEL : p + 1 < last ? panels.at(p + 1, 0) : next;
      else
        ahead = p + 1 < last ? panels.at(p + 1, k) : !final ? panels.at(first, k + steps_here) : next;
    }
    for (int i = 0; i < count; i++) {
      const int64_t line = int64_t(i) * (steps_here / 4) * per;
      const bool on = ahead && line < 2 * steps_here;
      float* c = panels_outside ? sums : sums + (int64_t(p - first) * padded_rows + blocks[i].start - start) * PANEL;
      if (final) before(p, i);
      else if (rows_ahead) prefetch_share(rows(i) + int64_t(k + steps_here) * blocks[i].rows, blocks[i].rows * std::min(block, steps - k - steps_here), p - first, last - first);
      tiles<D>.of[blocks[i].rows](rows(i) + int64_t(k) * blocks[i].rows, b, steps_here, c, k > 0, (const char*)ahead + line * 64, on ? per : 0);
      if (final) epilogue(p, i, c);
    }
  };
  if (panels_outside) {
    for (int p = first; p < last; p++)
      for (int k = 0; k < steps; k += block) one(p, k);
  } else {
    for (int k = 0; k < steps; k += block)
      for (int p = first; p < last; p++) one(p, k);
  }
}

// The multiplication that by_rows and second_product use, for float weights; quantized.h has that of quantized weights.
template <class D>
struct Floats {
  using Region = moe_fn::Region<D>;
  static int row_dwords(const Weight& w) { return padded_steps(w); }  // size of a packed row
  static int64_t row_bytes(const Weight& w) { return w.inner * w.element; }  // size of a row of x
  static bool in_blocks(const Weight& w) { return block_steps<D>(w) != w.steps(); }  // then sums of all panels of a task are kept
  static int64_t sums_floats(const Weight& w, int rows, int panels) { return int64_t(rows) * PANEL * (in_blocks(w) ? panels : 1); }
  static int64_t scratch_floats(const Weight& w) { return moe_fn::scratch_floats<D>(w); }
  static void run(const RowBlock* blocks, int count, auto rows, const Weight& w, int64_t expert, int first, int last, const float* next, float* sums,
                  float* scratch, auto before, auto epilogue) {
    multiply<D>(blocks, count, rows, Panels<D>(w, expert), first, last, next, sums, scratch, before, epilogue);
  }
};
static inline const float* panel_at(const Weight& w, int64_t expert, int panel) {  // for prepared weights
  return (const float*)(w.data + expert * w.expert_bytes) + int64_t(panel) * w.steps() * PANEL;
}

// Packs a chunk's rows of x: row source[slot] of each sorted slot, or the slot's own row if source is null.
template <class D>
inline void pack_rows(const Plan& plan, const Chunk& chunk, const int64_t* source, const void* x, int64_t row_bytes, int padded, float* out) {
  for (int b = chunk.first_block; b < chunk.last_block; b++) {
    const RowBlock& block = plan.blocks[b];
    for (int r = 0; r < block.rows; r++) {
      const char* from = static_cast<const char*>(x) + (source ? source[block.start + r] : block.start + r) * row_bytes;
      char* to = (char*)(out + (block.start - chunk.start) * padded + r * CHUNK);
      int64_t left = row_bytes;
      for (; left >= CHUNK * 4; left -= CHUNK * 4, from += CHUNK * 4, to += int64_t(block.rows) * CHUNK * 4) std::memcpy(to, from, CHUNK * 4);
      if (left) {
        std::memcpy(to, from, left);
        std::memset(to + left, 0, CHUNK * 4 - left);
      }
    }
  }
}

// Runs tasks (chunk, group of panels) in the order of the weights in memory; epilogue(chunk, panel, block, tile) gets each tile.
template <class D, class M = Floats<D>, class Epilogue>
void by_rows(const Pool& pool, const Plan& plan, const void* x, const Weight& w, Epilogue epilogue) {
  const int panels = w.panels(), chunks = int(plan.chunks.size()), padded = M::row_dwords(w), workers = pool.workers;
  const int64_t row_bytes = M::row_bytes(w);
  if (!chunks) return;
  // 24 tasks per worker, in pairs of panels, so that workers finish at nearly the same time.
  int groups = chunks >= 24 * workers ? 1 : std::min(std::max(panels / 2, 1), (24 * workers + chunks - 1) / chunks);
  // Sums of all panels of a task are kept between blocks of steps: 256 KB, in addition to 512 KB of rows.
  if (M::in_blocks(w)) groups = std::max(groups, int(int64_t(plan.most_rows) * PANEL * 4 * panels / (256 << 10)));
  groups = std::clamp(groups, 1, panels);
  auto from = [&](int g) { int p = int(int64_t(panels) * g / groups); return g == groups ? panels : groups * 2 <= panels ? p & ~1 : p; };
  const int64_t sums_size = M::sums_floats(w, plan.most_rows, panels / groups + 3);
  const int64_t rows_size = int64_t(plan.most_rows) * padded, scratch_size = M::scratch_floats(w);
  std::atomic<int64_t> counter{0};
  const int64_t tasks = int64_t(chunks) * groups;
  pool([&](int) {
    [[maybe_unused]] const typename M::Region region;
    Buffer rows = buffer(rows_size), sums = buffer(sums_size), scratch = buffer(scratch_size);
    int64_t have = -1;
    for (int64_t task = counter++, following; task < tasks; task = following) {
      following = counter++;
      const Chunk& chunk = plan.chunks[task / groups];
      const int first = from(int(task % groups)), last = from(int(task % groups) + 1);
      if (first >= last) continue;
      if (have != task / groups) pack_rows<D>(plan, chunk, plan.source.data(), x, row_bytes, padded, rows.get());
      have = task / groups;
      const float* next = nullptr;
      if (w.prepared && following < tasks) next = panel_at(w, plan.chunks[following / groups].expert, from(int(following % groups)));
      const RowBlock* blocks = plan.blocks.data() + chunk.first_block;
      M::run(
          blocks, chunk.last_block - chunk.first_block, [&](int b) { return rows.get() + (blocks[b].start - chunk.start) * padded; },
          w, chunk.expert, first, last, next, sums.get(), scratch.get(), [](int, int) {},
          [&](int p, int b, float* c) { epilogue(chunk, p, blocks[b], c); });
    }
  });
}

}  // namespace moe_fn
