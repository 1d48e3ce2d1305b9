#pragma once

#include <algorithm>

namespace compresskv {

/// What a row of the scores stands for.
enum class Granularity {
  layer,    ///< one row: all KV heads of the layer share it
  kv_head,  ///< one row a KV head
};

/// What a scorer must be shown.
enum class Needs {
  nothing,           ///< positions are enough
  keys,              ///< the keys in the cache
  keys_and_values,   ///< both as they stand in the cache, and no query
  window_attention,  ///< the window's queries with the keys, or the attention matrix itself
  window_queries,    ///< the window's queries with the keys: attention computed already does not do
  all_queries,       ///< the attention of every query of the prompt
  repeats,           ///< the queries of tokens that repeat the context: `Compressor::observe`
};

/// Whether a scorer must be shown queries or attention.
constexpr bool observes(Needs needs) {
  return needs == Needs::window_attention || needs == Needs::window_queries || needs == Needs::all_queries;
}
/// Whether attention alone cannot take the place of the layer's view.
constexpr bool reads_rows(Needs needs) { return needs == Needs::keys || needs == Needs::keys_and_values; }
/// Whether a scorer reads values: by its needs, or where these say how it observes by its `reads_values`.
template <class S>
constexpr bool reads_values = S::needs == Needs::keys_and_values || requires {
  requires S::reads_values;
};

/// What a composition must have seen before a layer can shrink.
enum class Reach {
  own_layer,       ///< that layer: `Compressor::compress`
  earlier_layers,  ///< layers before it as well
  all_layers,      ///< the whole model
};

/// A composition reaches as far as the policy in it that reaches furthest.
constexpr Reach furthest(Reach a, Reach b, Reach c) { return (std::max)({a, b, c}); }

}  // namespace compresskv
