#include "router.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace moe_fn {
namespace {

// Products and sums are loops of their own, through memory, so that no compiler makes one rounding of the two that torch's ops have.

constexpr float INF = std::numeric_limits<float>::infinity(), LOWEST = std::numeric_limits<float>::lowest();
constexpr int64_t BLOCK = 16;
constexpr int32_t TAKEN = std::numeric_limits<int32_t>::min();

float finite_or(float x, float other) { return std::fabs(x) < INF ? x : other; }

// The sum by halves, a tree of additions whose shape depends on n alone. Overwrites x, which has room for a power of two.
float tree_sum(float* x, int64_t n) {
  int64_t size = int64_t(std::bit_ceil(uint64_t(n)));
  std::fill(x + n, x + size, 0.f);
  while (size /= 2)
    for (int64_t i = 0; i < size; i++) x[i] += x[i + size];
  return x[0];
}

// Scores of z [n], 0 where they are not finite. `room` has place for n rounded up to a power of two.
void scores_of(Scoring scoring, const float* z, float* to, int64_t n, float* room) {
  switch (scoring) {
    case Scoring::softmax: {
      float largest = -INF;  // a NaN or an infinite logit makes the sum NaN, and so the whole row 0
      for (int64_t i = 0; i < n; i++) largest = z[i] > largest ? z[i] : largest;
      for (int64_t i = 0; i < n; i++) to[i] = std::exp(z[i] - largest);
      std::copy(to, to + n, room);
      const float sum = tree_sum(room, n);
      for (int64_t i = 0; i < n; i++) to[i] = to[i] / sum;
      break;
    }
    case Scoring::sigmoid:
      for (int64_t i = 0; i < n; i++) to[i] = 1 / (1 + std::exp(-z[i]));
      break;
    case Scoring::sqrtsoftplus:
      for (int64_t i = 0; i < n; i++) {
        const float y = z[i] > 20 ? z[i] : std::log1p(std::exp(z[i]));  // as torch has it
        to[i] = y > 0 ? std::sqrt(y) : 0;
      }
      break;
    case Scoring::identity: std::copy(z, z + n, to); break;
  }
  for (int64_t i = 0; i < n; i++) to[i] = finite_or(to[i], 0);
}

// An integer of the same order; -0 is as large as 0.
int32_t key_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.f);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
int32_t largest_of_block(const int32_t* keys) {
  int32_t most = TAKEN;
  for (int64_t i = 0; i < BLOCK; i++) most = std::max(most, keys[i]);
  return most;
}
int64_t first_in_block(const int32_t* keys, int32_t key) {
  int32_t first = BLOCK;
  for (int32_t i = 0; i < BLOCK; i++) first = std::min(first, keys[i] == key ? i : int32_t(BLOCK));
  return first;
}

// Indices of the `count` largest of n values, descending, ties to the lowest index.
struct Choice {
  std::vector<int32_t> keys, blocks;  // keys in blocks, and the largest of each block, in blocks again
  explicit Choice(int64_t most) : keys(rounded(most)), blocks(rounded(rounded(most) / BLOCK)) {}
  static int64_t rounded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

  template <class F>
  void best(const float* values, int64_t n, int64_t count, F&& chosen) {
    const int64_t full = rounded(n) / BLOCK, over = rounded(full);
    for (int64_t i = 0; i < n; i++) keys[i] = key_of(values[i]);
    std::fill(keys.begin() + n, keys.begin() + full * BLOCK, TAKEN);
    for (int64_t b = 0; b < full; b++) blocks[b] = largest_of_block(&keys[b * BLOCK]);
    std::fill(blocks.begin() + full, blocks.begin() + over, TAKEN);
    for (int64_t j = 0; j < count; j++) {
      int32_t most = TAKEN;
      for (int64_t b = 0; b < over; b += BLOCK) most = std::max(most, largest_of_block(&blocks[b]));
      int64_t b = 0, in_blocks;
      while ((in_blocks = first_in_block(&blocks[b], most)) == BLOCK) b += BLOCK;
      int32_t* block = &keys[(b + in_blocks) * BLOCK];
      const int64_t i = first_in_block(block, most);
      chosen(j, block - keys.data() + i);
      block[i] = TAKEN;
      blocks[b + in_blocks] = largest_of_block(block);
    }
  }
};

float worth(const float* values, int64_t n, bool top2) {
  float first = -INF, second = -INF;
  for (int64_t i = 0; i < n; i++) {
    second = values[i] > first ? first : std::max(second, values[i]);
    first = std::max(first, values[i]);
  }
  return top2 ? first + second : first;
}

void normalize(const Router& r, float* w, float* room) {
  for (int64_t j = 0; j < r.top_k; j++) room[j] = r.norm_order == 1 ? std::fabs(w[j]) : w[j] * w[j];
  float total = tree_sum(room, r.top_k);
  if (r.norm_order != 1) total = total > 0 ? std::sqrt(total) : 0;
  if (r.epsilon != 0) total += r.epsilon;
  total = std::max(total, r.minimum);
  for (int64_t j = 0; j < r.top_k; j++) w[j] /= total > 0 ? total : 1;
}

}  // namespace

void route_rows(const Router& r, const void* logits, bool bf16, int64_t stride, int64_t tokens, const float* bias, int64_t* ids, float* weights) {
  const int64_t n = r.choices, size = n / r.groups, power = int64_t(std::bit_ceil(uint64_t(n)));
  const bool after = r.order == ScoringOrder::after_top_k, by_scores = !after || r.bias == CorrectionBias::scores;
  std::vector<float> numbers(3 * n + power + r.groups);
  float *z = numbers.data(), *scores = z + n, *values = scores + n, *room = values + n, *worths = room + power;
  std::vector<char> kept(r.groups);
  Choice choice(n);
  for (int64_t t = 0; t < tokens; t++, ids += r.top_k, weights += r.top_k) {
    if (bf16)
      for (int64_t i = 0; i < n; i++) z[i] = widen_one(static_cast<const uint16_t*>(logits)[t * stride + i]);
    else
      std::copy_n(static_cast<const float*>(logits) + t * stride, n, z);
    if (r.multiplier != 1)
      for (int64_t i = 0; i < n; i++) z[i] *= r.multiplier;
    if (r.softcap != INF)
      for (int64_t i = 0; i < n; i++) z[i] = r.softcap * std::tanh(z[i] / r.softcap);
    if (by_scores) scores_of(r.scoring, z, scores, n, room);
    const float* from = r.bias == CorrectionBias::logits || (after && r.bias == CorrectionBias::none) ? z : scores;
    // What is not finite is below any finite value, but above choices of groups that are not kept.
    for (int64_t i = 0; i < n; i++) values[i] = finite_or(bias ? from[i] + bias[i] : from[i], LOWEST);
    if (r.groups > 1) {
      for (int64_t g = 0; g < r.groups; g++) worths[g] = worth(values + g * size, size, r.top2);
      std::fill(kept.begin(), kept.end(), 0);
      choice.best(worths, r.groups, r.kept, [&](int64_t, int64_t g) { kept[g] = 1; });
      for (int64_t g = 0; g < r.groups; g++) {
        if (kept[g]) continue;
        std::fill_n(values + g * size, size, r.fill);
        if (r.bias == CorrectionBias::none) std::fill_n(scores + g * size, size, 0.f);
      }
    }
    choice.best(values, n, r.top_k, [&](int64_t j, int64_t i) {
      ids[j] = i;
      weights[j] = (after ? z : scores)[i];
    });
    if (after) {
      std::copy_n(weights, r.top_k, z);  // the row's logits are not read again
      scores_of(r.scoring, z, weights, r.top_k, room);
    }
    if (r.renormalize) normalize(r, weights, room);
    if (r.scale != 1)
      for (int64_t j = 0; j < r.top_k; j++) weights[j] *= r.scale;
  }
}

}  // namespace moe_fn
