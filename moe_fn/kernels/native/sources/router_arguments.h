// Converts the ops' argument `config`, the JSON of moe_fn.config's MoEConfig with sorted keys, to a Router.
#pragma once
#include <c10/util/Exception.h>

#include <string>
#include <string_view>

#include "router.h"

namespace moe_fn {

// The place of a word among those of an enum (WORDS).
inline int64_t place_of(std::string_view word, const char* words, const char* parameter) {
  std::string_view left(words);
  for (int64_t place = 0;; place++) {
    const size_t end = left.find(", ");
    if (left.substr(0, end) == word) return place;
    TORCH_CHECK_VALUE(end != left.npos, "moe_fn: ", parameter, " is ", std::string(word), "; expected one of ", words);
    left.remove_prefix(end + 2);
  }
}

// The value of a key of a JSON object, as text; keys of objects inside it are not found.
inline std::string_view value_in_object(std::string_view json, std::string_view key) {
  auto depth = [](char c) { return (c == '{' || c == '[') - (c == '}' || c == ']'); };
  int inside = 0;
  for (size_t at = 0; at < json.size(); at++) {
    inside += depth(json[at]);
    if (json[at] != '"') continue;
    size_t end = at + 1;
    while (end < json.size() && json[end] != '"') end += json[end] == '\\' ? 2 : 1;
    if (inside == 1 && end + 3 < json.size() && json.substr(at + 1, end - at - 1) == key && json.substr(end + 1, 2) == ": ") {
      size_t last = end + 3;
      for (int within = 0; last < json.size() && (within || (json[last] != ',' && json[last] != '}')); last++) within += depth(json[last]);
      return json.substr(end + 3, last - end - 3);
    }
    at = end;
  }
  TORCH_CHECK_VALUE(false, "moe_fn: the config is ", std::string(json), "; expected one with ", std::string(key));
}
inline int64_t integer_in(std::string_view json, std::string_view key) { return std::stoll(std::string(value_in_object(json, key))); }
inline float float_in(std::string_view json, std::string_view key) {
  const std::string_view value = value_in_object(json, key);
  return value == "null" ? std::numeric_limits<float>::infinity() : float(std::stod(std::string(value)));
}
inline std::string_view word_in(std::string_view json, std::string_view key) {
  const std::string_view value = value_in_object(json, key);
  return value.size() < 2 ? value : value.substr(1, value.size() - 2);
}

inline Router router_of_json(std::string_view config) {
  const std::string_view router = value_in_object(config, "router"), groups = value_in_object(router, "groups");
  const bool grouped = groups != "null";
  Router r{};
  r.top_k = integer_in(config, "top_k");
  r.scoring = Scoring(place_of(word_in(router, "scoring"), Scoring_words, "scoring"));
  r.order = ScoringOrder(place_of(word_in(router, "scoring_order"), ScoringOrder_words, "scoring_order"));
  r.bias = CorrectionBias(place_of(word_in(router, "correction_bias"), CorrectionBias_words, "correction_bias"));
  r.multiplier = float_in(router, "logit_multiplier");
  r.softcap = float_in(router, "logit_softcap");
  r.groups = grouped ? integer_in(groups, "count") : 1;
  r.kept = grouped ? integer_in(groups, "top_k") : 1;
  r.top2 = grouped && word_in(groups, "score") == "top2_sum";
  r.fill = grouped && word_in(groups, "fill") == "zero" ? 0 : -std::numeric_limits<float>::infinity();
  r.renormalize = value_in_object(router, "renormalize") == "true";
  r.norm_order = float_in(router, "renormalize_order");
  r.epsilon = float_in(router, "renormalize_epsilon");
  r.minimum = float_in(router, "renormalize_minimum");
  r.scale = word_in(router, "scale_on") == "weights" ? float_in(router, "routed_scaling_factor") : 1;
  return r;
}

// The same, from the last call's result where the text is the same: a decoding step calls with one config in every layer, and parsing takes longer
// than routing a token.
inline const Router& router_of(std::string_view config) {
  thread_local std::string text;
  thread_local Router router;
  if (text != config) {
    router = router_of_json(config);
    text = config;
  }
  return router;
}

}  // namespace moe_fn
