// The router: scores of logits, the choice of experts and their weights, as moe_fn.stages._scores and _routing_weights have them. Each function
// is libm's, number by number, and sums of a row are the trees of moe_fn.ops.arithmetic, so that a token's bits depend on its logits alone and are
// those of torch's ops in a layer with batch_invariant. Independent of torch.
#pragma once
#include <cstdint>

#include "activation.h"

namespace moe_fn {

// Enums of the values of RouterConfig that the kernel computes (ROUTER in native/support.py).
WORDS(Scoring, softmax, sigmoid, sqrtsoftplus, identity)
WORDS(ScoringOrder, before_top_k, after_top_k)
WORDS(CorrectionBias, none, scores, logits)

struct Router {
  int64_t choices, top_k;
  Scoring scoring;
  ScoringOrder order;
  CorrectionBias bias;
  float multiplier, softcap;  // softcap: infinity for None
  int64_t groups, kept;       // 1 group: none
  bool top2, renormalize;
  float fill;  // what is chosen among, of groups that are not kept
  float norm_order, epsilon, minimum, scale;
};

// ids and weights [tokens, top_k] of logits [tokens, choices], float32 or bfloat16 in rows `stride` elements apart; bias [choices] or null.
void route_rows(const Router& router, const void* logits, bool bf16, int64_t stride, int64_t tokens, const float* bias, int64_t* ids, float* weights);

}  // namespace moe_fn
