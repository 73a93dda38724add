// Converts the ops' arguments for quantized weights to Codes. The description is the JSON of moe_fn.config's QuantConfig.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "codes.h"

namespace moe_fn {

struct QuantTensors {
  c10::optional<at::Tensor> gate_up_scale, down_scale, gate_up_zero_point, down_zero_point, gate_up_global_scale, down_global_scale;
};

// The value of a key of flat JSON as text without quotes; "" for null and missing keys.
inline std::string value_of_key(const std::string& json, const std::string& key) {
  size_t at = json.find('"' + key + '"');
  if (at == std::string::npos) return "";
  at = json.find_first_not_of(" \t\n", json.find(':', at) + 1);
  const size_t end = json[at] == '[' ? json.find(']', at) + 1 : json[at] == '{' ? json.find('}', at) + 1 : json.find_first_of(",}", at);
  std::string value = json.substr(at, end - at);
  while (!value.empty() && (value.back() == ' ' || value.back() == '\n')) value.pop_back();
  if (!value.empty() && value[0] == '"') value = value.substr(1, value.size() - 2);
  return value == "null" ? "" : value;
}

inline Scheme scheme_of(const std::string& name) {
  if (name == "int4") return Scheme::int4;
  if (name == "int8") return Scheme::int8;
  if (name == "fp8_e4m3" || name == "mxfp8") return Scheme::e4m3;
  TORCH_CHECK_VALUE(name == "mxfp4" || name == "nvfp4", "moe_fn: weights are ", name, "; expected int4, int8, fp8_e4m3, mxfp4, mxfp8 or nvfp4");
  return Scheme::e2m1;
}

struct QuantDescription { Scheme scheme; bool int8_rows; int64_t tile_out, tile_in; };  // a tile of 0 is the whole dimension
inline QuantDescription description_of(std::string json) {
  QuantDescription d{};
  const std::string inner = value_of_key(json, "activations");
  if (!inner.empty()) {
    const std::string scheme = value_of_key(inner, "scheme"), granularity = value_of_key(inner, "granularity"), is_static = value_of_key(inner, "static");
    TORCH_CHECK_VALUE(scheme == "int8" && granularity == "token" && is_static != "true", "moe_fn: activations are ", inner, "; expected int8, one dynamic scale a token");
    d.int8_rows = true;
    json.replace(json.find(inner), inner.size(), "null");
  }
  d.scheme = scheme_of(value_of_key(json, "scheme"));
  const std::string granularity = value_of_key(json, "granularity"), group = value_of_key(json, "group_size"), block = value_of_key(json, "block_shape");
  if (granularity == "channel") d.tile_out = 1;
  if (granularity == "group") d.tile_out = 1, d.tile_in = std::stoll(group);
  if (granularity == "block") d.tile_out = std::stoll(block.substr(1)), d.tile_in = std::stoll(block.substr(block.find(',') + 1));
  return d;
}

inline ScaleType scale_type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return ScaleType::f32;
    case at::kBFloat16: return ScaleType::bf16;
    case at::kHalf: return ScaleType::f16;
    case at::kFloat8_e4m3fn: return ScaleType::e4m3;
    default: break;
  }
  TORCH_CHECK_VALUE(t.scalar_type() == at::kByte || t.element_size() == 1, "moe_fn: a scale is ", t.scalar_type(), "; expected float32, bfloat16, float16, uint8 or float8_e4m3fn");
  return ScaleType::e8m0;
}

// The codes of one matrix. w describes the payload; its `codes` are not set yet.
inline std::unique_ptr<Codes> codes_of(const QuantDescription& d, const Weight& w, int64_t experts, bool is_signed, const at::Tensor& scale,
                                       const c10::optional<at::Tensor>& zero, const c10::optional<at::Tensor>& global) {
  auto q = std::make_unique<Codes>();
  q->scheme = d.scheme;
  q->int8_rows = d.int8_rows;
  q->is_signed = is_signed;
  q->scale_type = scale_type_of(scale);
  q->halves = w.gated && !w.interleaved ? 2 : 1;
  const int64_t of_half = w.columns / q->halves;
  q->tile_out = d.tile_out && d.tile_out < of_half ? d.tile_out : of_half;
  q->tile_in = d.tile_in && d.tile_in < w.inner ? d.tile_in : w.inner;
  q->out_tiles = q->halves * ((of_half + q->tile_out - 1) / q->tile_out);
  q->in_tiles = (w.inner + q->tile_in - 1) / q->tile_in;
  TORCH_CHECK_VALUE(q->in_tiles == 1 || q->tile_in % q->inputs_per_dword() == 0, "moe_fn: ", q->tile_in, " inputs share a scale; expected a multiple of ", q->inputs_per_dword());
  auto fits = [&](const at::Tensor& t) {
    return t.is_contiguous() && (w.prepared ? t.dim() == 4 && t.size(0) == experts && t.size(1) == w.panels() && t.size(2) == q->in_tiles && t.size(3) == PANEL
                                            : t.dim() == 3 && t.size(0) == experts && t.size(1) == q->out_tiles && t.size(2) == q->in_tiles);
  };
  TORCH_CHECK_VALUE(fits(scale) && (!zero || fits(*zero)), "moe_fn: a scale is ", scale.sizes(), "; expected ", experts, " by ", q->out_tiles, " by ", q->in_tiles, ", plain or prepared");
  TORCH_CHECK_VALUE(!zero || zero->scalar_type() == at::kByte, "moe_fn: zero points are expected in uint8");
  TORCH_CHECK_VALUE(!global || (global->numel() == experts * q->halves && global->is_contiguous() && global->scalar_type() == at::kFloat), "moe_fn: a global scale is expected as float32, ", experts, " by ", q->halves);
  q->scale = scale.const_data_ptr();
  q->zero = zero ? zero->const_data_ptr<uint8_t>() : nullptr;
  q->global_scale = global ? global->const_data_ptr<float>() : nullptr;
  q->make_spans(w.steps());
  return q;
}

}  // namespace moe_fn
