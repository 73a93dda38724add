// The kernels as torch ops. Compiled with NAME, a namespace of this library's own, in which its ops stand beside those of other levels;
// `install` puts them in place as the CPU kernels of moe_fn's ops.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "experts.h"
#include "quant_arguments.h"
#include "router_arguments.h"

namespace {
using at::Tensor;
using std::optional;
using namespace moe_fn;

Pool pool() {
  return {at::get_num_threads(), [](int workers, Run run, void* context) {
            at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
              for (int64_t worker = first; worker < last; worker++) run(context, int(worker));
            });
          }};
}
// Fresh memory. Huge pages from 4 MB on: small ones fault 256 times a MB (a 400 MB gradient: half of its product's time), and read more
// slowly on a virtual machine (2 cores of a Zen 4: 26-30 against 33-34 GB/s).
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  const uintptr_t page = uintptr_t(1) << 21, first = (uintptr_t(t.mutable_data_ptr()) + page - 1) / page * page;
  const uintptr_t last = (uintptr_t(t.mutable_data_ptr()) + t.nbytes()) / page * page;
  if (last > first + page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}
Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: break;
  }
  TORCH_CHECK_VALUE(false, "moe_fn: dtype is ", t.scalar_type(), "; expected float32, bfloat16 or float16");
}
Weight weight_of(const Tensor& t, int64_t columns, int64_t inner, bool transposed, bool gated, bool interleaved, int per_byte = 1) {
  Weight w{static_cast<const char*>(t.const_data_ptr()), 0, columns, inner, int(t.element_size()), t.dim() == 4, transposed, gated, interleaved};
  w.per_byte = per_byte;
  const int64_t in = (inner + per_byte - 1) / per_byte;
  w.expert_bytes = t.numel() / std::max<int64_t>(t.size(0), 1) * w.element;
  const bool fits = w.prepared ? t.size(1) == w.panels() && t.size(2) == w.steps() && t.size(3) * w.element == PANEL * 4
                               : t.dim() == 3 && t.size(1) == (transposed ? columns : in) && t.size(2) == (transposed ? in : columns);
  TORCH_CHECK_VALUE(fits, "moe_fn: weight is ", t.sizes(), "; expected ", columns, " columns of ", inner, " products, plain or prepared");
  return w;
}
Bias bias_of(const optional<Tensor>& t, int64_t experts, int64_t size) {
  if (!t) return {nullptr, Type::f32, size};
  TORCH_CHECK_VALUE(t->dim() == 2 && t->size(0) == experts && t->size(1) == size && t->is_contiguous(), "moe_fn: bias is ", t->sizes(), "; expected ", experts, " by ", size);
  return {t->const_data_ptr(), type_of(*t), size};
}
// One product's adapters: A [adapters, experts or 1, rank, inputs], B [adapters, experts or 1, outputs, rank].
LowRank low_rank_of(const optional<Tensor>& a, const optional<Tensor>& b, int64_t adapters, int64_t experts, const Weight& w, const Tensor& x) {
  if (!a && !b) return {};
  TORCH_CHECK_VALUE(a && b, "moe_fn: an adapter has one of A and B; expected both or none");
  auto fits = [&](const Tensor& t) { return t.dim() == 4 && t.size(0) == adapters && (t.size(1) == 1 || t.size(1) == experts) && t.scalar_type() == x.scalar_type(); };
  TORCH_CHECK_VALUE(fits(*a) && fits(*b) && a->size(3) == w.inner && b->size(2) == w.columns && a->size(2) == b->size(3) && a->size(2) > 0, "moe_fn: adapters are ", a->sizes(), " and ",
                    b->sizes(), "; expected ", adapters, " by ", experts, " or 1 by the rank by ", w.inner, ", and by ", w.columns, " by the rank, in ", x.scalar_type());
  auto factor = [&](const Tensor& t, bool gated) {
    Weight of{static_cast<const char*>(t.const_data_ptr()), t.size(2) * t.size(3) * int64_t(t.element_size()), t.size(2), t.size(3), int(t.element_size()), false, true, gated, gated && w.interleaved};
    of.invariant = w.invariant;
    return Factor{of, t.size(1) == experts ? 1 : experts};
  };
  return {factor(*a, false), factor(*b, w.gated)};
}
float number(double value) { return float(value); }
float number(optional<double> value) { return float(value.value_or(std::numeric_limits<double>::infinity())); }

// f of each number, one by one and by libm: at::exp has vectors, and other code for what is left of them, so bits depend on where a number lies.
template <class T, class F>
void map(const Tensor& x, const Tensor& out, F f) {
  const T* from = x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, x.numel(), 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) to[i] = f(from[i]);
  });
}
template <class T>
void map_named(const Tensor& x, const Tensor& out, c10::string_view name) {
  if (name == "exp") return map<T>(x, out, [](T v) { return std::exp(v); });
  if (name == "sigmoid") return map<T>(x, out, [](T v) { return 1 / (1 + std::exp(-v)); });
  if (name == "softplus") return map<T>(x, out, [](T v) { return v > 20 ? v : std::log1p(std::exp(v)); });  // as torch has it
  if (name == "tanh") return map<T>(x, out, [](T v) { return std::tanh(v); });
  if (name == "erf") return map<T>(x, out, [](T v) { return std::erf(v); });
  TORCH_CHECK_VALUE(false, "moe_fn: function is ", name, "; expected exp, sigmoid, softplus, tanh or erf");
}
Tensor elementwise_op(const Tensor& x_, c10::string_view function) {
  const Tensor x = x_.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "moe_fn: dtype is ", x.scalar_type(), "; expected float32 or float64");
  x.scalar_type() == at::kFloat ? map_named<float>(x, out, function) : map_named<double>(x, out, function);
  return out;
}

// ARGUMENTS, PASSED and ACTIVATION are of arguments.h, which is generated; torch compares the schema of moe_fn's op with this one when the
// ops are installed.

// The arguments of routed_experts, contiguous and checked; the tensors live as long as the problem that points into them.
struct Call {
  Tensor x, ids, weights, gate_up, down;
  optional<Tensor> gate_up_bias, down_bias, adapter_ids, gate_up_a, gate_up_b, down_a, down_b;
  RoutedExperts problem;
  QuantTensors beside;
  std::unique_ptr<Codes> gate_up_codes, down_codes;
};
Call call_of(ARGUMENTS) {
  auto dense = [](const optional<Tensor>& t) { return t ? optional<Tensor>(t->contiguous()) : optional<Tensor>(); };
  Call c{x.contiguous(), expert_ids.to(at::kLong).contiguous(), expert_weights.to(at::kFloat).contiguous(), gate_up.contiguous(), down.contiguous(), dense(gate_up_bias), dense(down_bias),
         adapter_ids ? optional<Tensor>(adapter_ids->to(at::kLong).contiguous()) : optional<Tensor>(), dense(gate_up_a), dense(gate_up_b), dense(down_a), dense(down_b), {}, {}, {}, {}};
  TORCH_CHECK_VALUE(x.dim() == 2 && expert_ids.dim() == 2 && expert_ids.size(0) == x.size(0) && expert_ids.sizes() == expert_weights.sizes(), "moe_fn: x is ", x.sizes(),
                    ", expert_ids ", expert_ids.sizes(), ", expert_weights ", expert_weights.sizes(), "; expected [tokens, hidden] and twice [tokens, top_k]");
  const bool floats = quant.empty();
  const QuantDescription described = floats ? QuantDescription{} : description_of(std::string(quant));
  const int per_byte = floats ? 1 : codes_in_byte(described.scheme);
  TORCH_CHECK_VALUE(floats || (transposed && gate_up.element_size() == 1 && down.element_size() == 1), "moe_fn: quantized weights are ", gate_up.scalar_type(), " and ",
                    down.scalar_type(), "; expected bytes, laid as out_in");
  TORCH_CHECK_VALUE(!floats || (gate_up.scalar_type() == x.scalar_type() && down.scalar_type() == x.scalar_type()), "moe_fn: weights are ", gate_up.scalar_type(), " and ",
                    down.scalar_type(), "; expected the dtype of x, ", x.scalar_type());
  TORCH_CHECK_VALUE(gate_up.size(0) == down.size(0), "moe_fn: gate_up and down have ", gate_up.size(0), " and ", down.size(0), " experts");
  const int64_t hidden = x.size(1), experts = gate_up.size(0), columns = gated ? 2 * intermediate_size : intermediate_size;
  c.problem = {type_of(x), x.size(0), expert_ids.size(1), experts, hidden, hidden, c.ids.const_data_ptr<int64_t>(), c.weights.const_data_ptr<float>(),
               c.x.const_data_ptr(), nullptr, nullptr, weight_of(c.gate_up, columns, hidden, transposed, gated, interleaved, per_byte),
               weight_of(c.down, hidden, intermediate_size, transposed, false, false, per_byte), bias_of(c.gate_up_bias, experts, columns),
               bias_of(c.down_bias, experts, hidden),
               ACTIVATION};
  c.problem.gate_up.invariant = c.problem.down.invariant = invariant;
  if (const optional<Tensor>& any = gate_up_a ? gate_up_a : down_a) {
    c.problem.adapters = any->dim() ? any->size(0) : 0;
    TORCH_CHECK_VALUE(c.problem.adapters == 1 || adapter_ids, "moe_fn: ", c.problem.adapters, " adapters without adapter_ids");
    TORCH_CHECK_VALUE(!adapter_ids || (adapter_ids->dim() == 1 && adapter_ids->size(0) == x.size(0)), "moe_fn: adapter_ids is ", adapter_ids ? adapter_ids->sizes() : x.sizes(), "; expected ", x.size(0), " ids");
    c.problem.adapter_ids = c.adapter_ids ? c.adapter_ids->const_data_ptr<int64_t>() : nullptr;
  }
  c.problem.gate_up_lora = low_rank_of(c.gate_up_a, c.gate_up_b, c.problem.adapters, experts, c.problem.gate_up, x);
  c.problem.down_lora = low_rank_of(c.down_a, c.down_b, c.problem.adapters, experts, c.problem.down, x);
  if (!floats) {
    TORCH_CHECK_VALUE(gate_up_scale && down_scale, "moe_fn: quantized weights without scales");
    c.beside = {dense(gate_up_scale), dense(down_scale), dense(gate_up_zero_point), dense(down_zero_point), dense(gate_up_global_scale), dense(down_global_scale)};
    const bool is_signed = gate_up.scalar_type() == at::kChar;
    auto codes = [&](Weight& w, const optional<Tensor>& scale, const optional<Tensor>& zero, const optional<Tensor>& global) {
      auto found = codes_of(described, w, experts, is_signed, *scale, zero, global);
      w.codes = found.get();
      return found;
    };
    c.gate_up_codes = codes(c.problem.gate_up, c.beside.gate_up_scale, c.beside.gate_up_zero_point, c.beside.gate_up_global_scale);
    c.down_codes = codes(c.problem.down, c.beside.down_scale, c.beside.down_zero_point, c.beside.down_global_scale);
  }
  return c;
}

std::tuple<Tensor, Tensor> run(Call c, const Tensor& x, const Tensor& ids, bool keep) {
  Tensor out = empty(x.sizes(), x.options()), pre = keep ? empty({ids.numel(), c.problem.gate_up.columns}, x.options()) : at::empty({0}, x.options());
  c.problem.out = out.mutable_data_ptr();
  c.problem.pre = keep ? pre.mutable_data_ptr() : nullptr;
  moe_fn::routed_experts(pool(), c.problem);
  return {out, pre};
}
std::tuple<Tensor, Tensor> routed_experts_op(ARGUMENTS, bool keep) { return run(call_of(PASSED), x, expert_ids, keep); }

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients routed_experts_backward_op(const Tensor& gradient_, c10::List<bool> needed, const Tensor& pre_, ARGUMENTS) {
  TORCH_CHECK_VALUE(quant.empty(), "moe_fn: weights of the backward pass are codes, ", quant, "; expected floats");
  Call c = call_of(PASSED);
  const Tensor gradient = gradient_.contiguous(), pre = pre_.contiguous();
  const bool kept = pre.dim() == 2;
  TORCH_CHECK_VALUE(!kept || (pre.size(0) == expert_ids.numel() && pre.size(1) == c.problem.gate_up.columns && pre.scalar_type() == x.scalar_type()), "moe_fn: pre is ",
                    pre.sizes(), "; expected ", expert_ids.numel(), " by ", c.problem.gate_up.columns, " or nothing");
  TORCH_CHECK_VALUE(!c.problem.gate_up.prepared && gradient.sizes() == x.sizes() && gradient.scalar_type() == x.scalar_type(), "moe_fn: gradient is ",
                    gradient.sizes(), " ", gradient.scalar_type(), "; expected that of x, and plain weights");
  auto make = [&](int i, const optional<Tensor>& like, bool f32) {
    if (!needed[i] || !like) return at::empty({0}, x.options());
    return empty(like->sizes(), f32 ? x.options().dtype(at::kFloat) : like->options());
  };
  Tensor d_x = make(0, x, false), d_w = make(1, expert_weights, true), d_gate_up = make(2, gate_up, false), d_down = make(3, down, false);
  Tensor d_gate_up_bias = make(4, gate_up_bias, true), d_down_bias = make(5, down_bias, true);
  Tensor d_gate_up_a = make(6, gate_up_a, false), d_gate_up_b = make(7, gate_up_b, false), d_down_a = make(8, down_a, false), d_down_b = make(9, down_b, false);
  auto wanted = [](const Tensor& t) { return t.dim() > 1 ? t.mutable_data_ptr() : nullptr; };
  auto floats = [&](const Tensor& t) { return static_cast<float*>(wanted(t)); };
  moe_fn::routed_experts_backward(
      pool(), c.problem, {gradient.const_data_ptr(), kept ? pre.const_data_ptr() : nullptr, wanted(d_x), wanted(d_gate_up), wanted(d_down), floats(d_w), floats(d_gate_up_bias), floats(d_down_bias),
                  wanted(d_gate_up_a), wanted(d_gate_up_b), wanted(d_down_a), wanted(d_down_b)});
  auto as = [](const Tensor& t, const optional<Tensor>& like) { return like && t.dim() > 1 ? t.to(like->scalar_type()) : t; };
  return {d_x, as(d_w, expert_weights), d_gate_up, d_down, as(d_gate_up_bias, gate_up_bias), as(d_down_bias, down_bias), d_gate_up_a, d_gate_up_b, d_down_a, d_down_b};
}

Groups groups_of(const Tensor& ends, int64_t rows, int64_t segments, int64_t weight_sets) {
  const int32_t* at = ends.const_data_ptr<int32_t>();
  const int64_t experts = ends.numel() / std::max<int64_t>(segments, 1);
  TORCH_CHECK_VALUE(segments > 0 && weight_sets > 0 && experts * segments == ends.numel() && rows % segments == 0, "moe_fn: ", ends.numel(), " ends and ", rows,
                    " rows do not split into ", segments, " segments of ", weight_sets, " sets of weights");
  for (int64_t g = 0; g < ends.numel(); g++) {  // memory safety: a wrong end would be a read past the rows
    const int64_t first = g / experts * (rows / segments), last = first + rows / segments;
    TORCH_CHECK_VALUE(at[g] >= (g % experts ? at[g - 1] : first) && at[g] <= last, "moe_fn: end ", g, " is ", at[g], "; expected ends that do not decrease, up to ", last);
  }
  return {at, ends.numel(), rows, segments, weight_sets};
}

Tensor grouped_matmul_op(const Tensor& rows_, const Tensor& weight_, const Tensor& ends_, bool transposed, int64_t segments, int64_t weight_sets,
                         bool invariant) {
  const Tensor rows = rows_.contiguous(), weight = weight_.contiguous(), ends = ends_.to(at::kInt).contiguous();
  const int64_t columns = weight.size(transposed ? 1 : 2);
  TORCH_CHECK_VALUE(rows.scalar_type() == weight.scalar_type(), "moe_fn: weight is ", weight.scalar_type(), "; expected the dtype of rows, ", rows.scalar_type());
  Tensor out = empty({rows.size(0), columns}, rows.options());
  Weight matrix = weight_of(weight, columns, rows.size(1), transposed, false, false);
  matrix.invariant = invariant;
  const Groups groups = groups_of(ends, rows.size(0), segments, weight_sets);
  const int64_t wanted = groups.count / segments * weight_sets;  // memory safety: a missing matrix would be a read past the weight
  TORCH_CHECK_VALUE(weight.size(0) == wanted, "moe_fn: weight is ", weight.sizes(), "; expected ", wanted, " matrices");
  if (rows.size(0)) moe_fn::grouped_matmul(pool(), type_of(rows), rows.const_data_ptr(), matrix, groups, out.mutable_data_ptr());
  return out;
}

Tensor grouped_outer_op(const Tensor& left_, const Tensor& right_, const Tensor& ends_, int64_t segments, int64_t weight_sets) {
  const Tensor left = left_.contiguous(), right = right_.contiguous(), ends = ends_.to(at::kInt).contiguous();
  TORCH_CHECK_VALUE(left.size(0) == right.size(0) && left.scalar_type() == right.scalar_type(), "moe_fn: left is ", left.sizes(), ", right ", right.sizes(), "; expected equal rows and dtypes");
  const Groups groups = groups_of(ends, left.size(0), segments, weight_sets);
  Tensor out = empty({weight_sets * (groups.count / segments), left.size(1), right.size(1)}, left.options());
  moe_fn::grouped_outer(pool(), type_of(left), left.const_data_ptr(), left.size(1), right.const_data_ptr(), right.size(1), groups, out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor> route_top_k_op(const Tensor& logits_, const optional<Tensor>& bias_, c10::string_view config) {
  TORCH_CHECK_VALUE(logits_.dim() == 2, "moe_fn: logits are ", logits_.sizes(), "; expected [tokens, experts]");
  const Tensor wide = logits_.scalar_type() == at::kHalf ? logits_.to(at::kFloat) : logits_, logits = wide.stride(1) == 1 ? wide : wide.contiguous();
  const optional<Tensor> bias = bias_ ? optional<Tensor>(bias_->to(at::kFloat).contiguous()) : optional<Tensor>();
  Router router = router_of(std::string_view(config.data(), config.size()));
  const int64_t tokens = logits.size(0), n = router.choices = logits.size(1), size = n / std::max<int64_t>(router.groups, 1);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == n), "moe_fn: correction_bias is ", bias->sizes(), "; expected ", n);
  // Memory safety: fewer choices than top_k would be a search without an end.
  TORCH_CHECK_VALUE(router.top_k > 0 && router.top_k <= router.kept * size && router.kept <= router.groups && size * router.groups == n, "moe_fn: logits are ", logits.sizes(),
                    "; expected at least ", router.top_k, " experts in ", router.kept, " of ", router.groups, " equal groups");
  Tensor ids = at::empty({tokens, router.top_k}, logits.options().dtype(at::kLong)), weights = at::empty({tokens, router.top_k}, logits.options().dtype(at::kFloat));
  const bool bf16 = type_of(logits) == Type::bf16;
  const char* from = static_cast<const char*>(logits.const_data_ptr());
  int64_t* to_ids = ids.mutable_data_ptr<int64_t>();
  float* to_weights = weights.mutable_data_ptr<float>();
  // Rows of 16384 logits take as long as it takes to wake a thread, several times.
  at::parallel_for(0, tokens, std::max<int64_t>(1, 16384 / n), [&](int64_t first, int64_t last) {
    route_rows(router, from + first * logits.stride(0) * logits.element_size(), bf16, logits.stride(0), last - first, bias ? bias->const_data_ptr<float>() : nullptr,
               to_ids + first * router.top_k, to_weights + first * router.top_k);
  });
  return {weights, ids};
}

Tensor empty_like_op(const Tensor& t) { return empty(t.sizes(), t.options()); }

int64_t read_op(const Tensor& t, int64_t first_byte, int64_t num_bytes) {
  TORCH_CHECK_VALUE(first_byte >= 0 && num_bytes >= 0 && first_byte + num_bytes <= int64_t(t.nbytes()), "moe_fn: bytes ", first_byte, " to ", first_byte + num_bytes, " of ", t.nbytes());
  return read_bytes(pool(), static_cast<const char*>(t.const_data_ptr()) + first_byte, num_bytes);
}
double gemm_op(const Tensor& like, int64_t repeats) { return tile_rate(pool(), type_of(like), repeats); }

void install() {  // once, whatever thread comes first
  static const bool done = [] {
    static torch::Library library(torch::Library::IMPL, "moe_fn", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library.impl("routed_experts_native", &routed_experts_op);
    library.impl("routed_experts_backward_native", &routed_experts_backward_op);
    library.impl("grouped_matmul_native", &grouped_matmul_op);
    library.impl("grouped_outer_native", &grouped_outer_op);
    library.impl("route_top_k_native", &route_top_k_op);
    return true;
  }();
  (void)done;
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(NAME, m) {  // schemas follow from the functions' types
  m.def("routed_experts", &routed_experts_op);
  m.def("routed_experts_backward", &routed_experts_backward_op);
  m.def("grouped_matmul", &grouped_matmul_op);
  m.def("grouped_outer", &grouped_outer_op);
  m.def("route_top_k", &route_top_k_op);
  m.def("elementwise", &elementwise_op);
  m.def("empty_like", &empty_like_op);
  m.def("read", &read_op);
  m.def("gemm", &gemm_op);
  m.def("install", &install);
}
