// The functions and argument records of the library, independent of torch: binding.cpp converts tensors to them.
#pragma once
#include "activation.h"
#include "codes.h"
#include "product.h"

namespace moe_fn {

enum class Type { f32, bf16, f16 };
struct Bias {  // [experts, size], or no data
  const void* data;
  Type type;
  int64_t size;
  float at(int64_t expert, int64_t i) const;
};

// One matrix of low-rank adapters: [adapters, experts, ...], or [adapters, 1, ...] where experts share it.
struct Factor {
  Weight weight{};  // no data: this product has no adapters
  int64_t experts_sharing = 1;
  const char* at(int64_t pair) const { return weight.data + pair / experts_sharing * weight.expert_bytes; }  // pair: adapter * experts + expert
  Factor flipped() const { return {weight.data ? weight.flipped() : Weight{}, experts_sharing}; }
};
struct LowRank { Factor a, b; };  // A is [rank, inputs], B [outputs, rank]

struct RoutedExperts {
  Type type;
  int64_t tokens, top_k, experts, hidden_in, hidden_out;
  const int64_t* expert_ids;
  const float* expert_weights;
  const void* x;
  void *out, *pre;  // pre: [slots, columns of gate_up], pre-activations in the order of the plan; null: not saved
  Weight gate_up, down;
  Bias gate_up_bias, down_bias;
  Activation activation;
  int64_t adapters = 0;                  // 0: none
  const int64_t* adapter_ids = nullptr;  // [tokens], an id out of range is no adapter; null: adapter 0
  LowRank gate_up_lora, down_lora;
};
void routed_experts(const Pool& pool, const RoutedExperts& problem);
void quantized_experts(const Pool& pool, const RoutedExperts& problem);  // weights with codes

// Gradients of routed_experts from its arguments (plain weights), the gradient of its result, and the saved pre-activations (null:
// recomputed). Results that are null are not computed.
struct RoutedGradients {
  const void *gradient, *pre;
  void *x, *gate_up, *down;
  float *expert_weights, *gate_up_bias, *down_bias;
  void *gate_up_a, *gate_up_b, *down_a, *down_b;
};
void routed_experts_backward(const Pool& pool, const RoutedExperts& problem, const RoutedGradients& gradients);

// Groups of sorted rows, as in moe_fn.ops.grouped_matmul.
struct Groups {
  const int32_t* ends;
  int64_t count, rows, segments, weight_sets;
};
void grouped_matmul(const Pool& pool, Type type, const void* rows, const Weight& weight, const Groups& groups, void* out);
void grouped_outer(const Pool& pool, Type type, const void* left, int64_t left_size, const void* right, int64_t right_size, const Groups& groups, void* out);

// For the benchmark's lower bounds: a read of all bytes, and GFLOP/s of all workers in `tile` with operands in cache.
int64_t read_bytes(const Pool& pool, const void* data, int64_t bytes);
double tile_rate(const Pool& pool, Type type, int64_t repeats);

}  // namespace moe_fn
