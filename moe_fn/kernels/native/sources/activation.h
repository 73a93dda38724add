// The activations of moe_fn.stages._activation on vectors of float32, within 3e-7 of float64.
#pragma once
#include <limits>

#include "simd.h"

namespace moe_fn {

// An enum of the values of a parameter of ActivationConfig that the kernels compute (ACTIVATION in native/support.py), and their names.
#define WORDS(Type, ...)           \
  enum class Type { __VA_ARGS__ }; \
  constexpr const char* Type##_words = #__VA_ARGS__;
WORDS(Function, silu, gelu, gelu_tanh, relu, relu2, situ)
WORDS(LimitAt, input, output)
}  // namespace moe_fn

#include "arguments.h"  // generated: struct Activation, the parameters of ActivationConfig

namespace moe_fn {

static inline vec exp(vec x) {  // about 1 ulp on [-87, 88]; NaN stays NaN
  x = select(x > 88.f, splat(88.f), x);
  x = select(x < -87.f, splat(-87.f), x);
  vec shifted = x * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23: the integer nearest to x / log 2 is in the low bits
  vec n = shifted - 12582912.f;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  return (vec)((veci)p + ((veci)shifted << 23));
}
static inline vec sigmoid(vec x) { return 1.f / (1.f + exp(-x)); }
static inline vec magnitude(vec x) { return (vec)((veci)x & 0x7fffffff); }
static inline vec tanh(vec x) {
  vec far = 1.f - 2.f / (exp(2.f * x) + 1.f), s = x * x;
  vec p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  return select(magnitude(x) < 0.625f, x + x * s * p, far);
}
static inline vec erf(vec x) {  // Abramowitz and Stegun 7.1.26: 1.5e-7
  vec a = magnitude(x), t = 1.f / (1.f + 0.3275911f * a);
  vec p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vec y = 1.f - p * t * exp(-a * a);
  return select(x < 0.f, -y, y);
}
static inline vec soft_cap(vec x, float cap) { return cap * tanh(x / cap); }

static inline vec gate_function(const Activation& a, vec g) {
  switch (a.function) {
    case Function::silu: return g * sigmoid(a.alpha * g);
    case Function::gelu: return 0.5f * g * (1.f + erf(g * 0.70710678118654752f));
    case Function::gelu_tanh: return 0.5f * g * (1.f + tanh(0.79788456080286536f * (g + 0.044715f * g * g * g)));
    case Function::relu: return select(g < 0.f, vec{}, g);
    case Function::relu2: { vec r = select(g < 0.f, vec{}, g); return r * r; }
    case Function::situ: return soft_cap(g, a.gate_cap) * sigmoid(g);
  }
  return g;
}
static inline vec activate(const Activation& a, vec g, vec u) {
  constexpr float none = std::numeric_limits<float>::infinity();
  if (a.limit != none) {
    if (a.limit_at == LimitAt::input) g = select(g > a.limit, splat(a.limit), g);
    u = select(u > a.limit, splat(a.limit), select(u < -a.limit, splat(-a.limit), u));
  }
  vec f = gate_function(a, g);
  if (a.limit_at == LimitAt::output) f = select(f > a.limit, splat(a.limit), f);
  if (a.up_cap != none) u = soft_cap(u, a.up_cap);
  return f * (u + a.up_offset);
}

// Whether `activate` is silu(g) * u, and that alone: 2 % of a prompt's time less than with every parameter looked at in each row.
static inline bool is_swiglu(const Activation& a) {
  constexpr float none = std::numeric_limits<float>::infinity();
  return a.function == Function::silu && a.gated && a.alpha == 1 && a.up_offset == 0 && a.limit == none && a.up_cap == none && a.limit_at == LimitAt::input;
}
static inline vec swiglu(vec g, vec u) { return g * sigmoid(g) * (u + 0.f); }

// f(g) and its derivative.
struct Slope { vec value, slope; };
static inline Slope gate_slope(const Activation& a, vec g) {
  switch (a.function) {
    case Function::silu: {
      const vec s = sigmoid(a.alpha * g);
      return {g * s, s + a.alpha * g * s * (1.f - s)};
    }
    case Function::gelu: {
      const vec half = 0.5f * (1.f + erf(g * 0.70710678118654752f));
      return {g * half, half + g * 0.39894228040143268f * exp(-0.5f * g * g)};
    }
    case Function::gelu_tanh: {
      const vec t = tanh(0.79788456080286536f * (g + 0.044715f * g * g * g));
      const vec inner = 0.79788456080286536f * (1.f + 3.f * 0.044715f * g * g);
      return {0.5f * g * (1.f + t), 0.5f * (1.f + t) + 0.5f * g * (1.f - t * t) * inner};
    }
    case Function::relu: return {select(g < 0.f, vec{}, g), select(g > 0.f, splat(1.f), vec{})};
    case Function::relu2: { const vec r = select(g < 0.f, vec{}, g); return {r * r, 2.f * r}; }
    case Function::situ: {
      const vec s = sigmoid(g), t = tanh(g / a.gate_cap);
      return {a.gate_cap * t * s, (1.f - t * t) * s + a.gate_cap * t * s * (1.f - s)};
    }
  }
  return {g, splat(1.f)};
}
// The activation, and its derivatives to g and u.
struct Slopes { vec value, to_gate, to_up; };
static inline Slopes activation_slopes(const Activation& a, vec g, vec u) {
  constexpr float none = std::numeric_limits<float>::infinity();
  const vec zero{}, one = splat(1.f);
  vec pass_g = one, pass_u = one;
  if (a.limit != none) {
    if (a.limit_at == LimitAt::input) pass_g = select(g > a.limit, zero, one), g = select(g > a.limit, splat(a.limit), g);
    pass_u = select(u > a.limit, zero, select(u < -a.limit, zero, one));
    u = select(u > a.limit, splat(a.limit), select(u < -a.limit, splat(-a.limit), u));
  }
  Slope f = gate_slope(a, g);
  if (a.limit_at == LimitAt::output) f = {select(f.value > a.limit, splat(a.limit), f.value), select(f.value > a.limit, zero, f.slope)};
  if (a.up_cap != none) {
    const vec t = tanh(u / a.up_cap);
    pass_u = pass_u * (1.f - t * t);
    u = a.up_cap * t;
  }
  u = u + a.up_offset;
  return {f.value * u, f.slope * pass_g * u, f.value * pass_u};
}

}  // namespace moe_fn
