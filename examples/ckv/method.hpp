// The library's methods as the tool runs them.
#pragma once

#include <compresskv/core/budget.hpp>
#include <compresskv/core/head_ranking.hpp>
#include <compresskv/core/head_scores.hpp>
#include <compresskv/core/layer_errors.hpp>
#include <compresskv/core/output_weights.hpp>
#include <compresskv/core/query_statistics.hpp>
#include <compresskv/core/surrogate.hpp>
#include <compresskv/kernel/pool.hpp>
#include <compresskv/method_settings.hpp>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ckv {

using compresskv::info;
using compresskv::Method;
using compresskv::MethodInfo;

/// What is to be done to a cache at the end of prefill.
struct Compression {
  Method method = Method::full;
  std::optional<compresskv::Budget> budget = std::nullopt;               ///< for all methods but `full`
  std::optional<compresskv::HeadRanking> heads = std::nullopt;           ///< for methods that need it
  std::optional<compresskv::HeadScores> scores = std::nullopt;           ///< raw, for methods that need them
  std::optional<compresskv::QueryStatistics> statistics = std::nullopt;  ///< for methods that need them
  std::optional<compresskv::Surrogate> surrogate = std::nullopt;         ///< for methods that need one
  std::optional<compresskv::OutputWeights> output_weights = std::nullopt;  ///< likewise
  std::optional<compresskv::HeadScores> kv_scores = std::nullopt;          ///< of KV heads, likewise
  /// Budgets by these errors, but for methods with budgets of their own; absent: every layer the same.
  std::optional<compresskv::LayerErrors> errors = std::nullopt;
  std::optional<std::size_t> min_rows =
      std::nullopt;                                  ///< fewest rows of a layer then; absent: 32 or the mean
  std::optional<std::size_t> window = std::nullopt;  ///< absent: the method's own; so the next two
  std::optional<compresskv::kernel::Pool> pool = std::nullopt;
  std::optional<std::size_t> pool_width = std::nullopt;
  std::size_t heads_per_layer = 4;
  std::uint64_t seed = 0;        ///< of `random`
  float decay = 0.7F;            ///< of `carried` and `blend-carried`
  std::size_t hold_layers = 0;   ///< of `carried` and `blend-carried`
  std::size_t model_heads = 16;  ///< of `model-wide` and `blend`
  bool equal_weights = false;    ///< of `carried` and `model-wide`
  std::size_t sinks = 4;         ///< of both blends, `lagkv`, `cur`, `kvzip`, `kvzip-plus` and `kvzap`
  double model_share = 0.6;      ///< of both blends
  std::size_t lag = 128;         ///< of `lagkv`
  std::size_t block = 16;        ///< of `cur`
  std::size_t chunk = 20;        ///< of `chunkkv`
  std::size_t head_sinks = 128;  ///< of `duoattention` and `kvzip-heads`; so the next one
  std::size_t head_recent = 256;
  std::optional<float> score_threshold = std::nullopt;  ///< of `kvzap`
  float lambda = 0.07F;                                 ///< of `rkv`
  float threshold = 0.5F;                               ///< of `rkv`
  /// Where the prompt is read in chunks: rows that a layer may keep after each but the last, at least the
  /// window and the budget. 0: nothing is evicted before the last chunk. Not for `cake`.
  std::size_t working_rows = 0;
};

/// Queries of each layer that observe, and whose rows stay.
constexpr std::size_t window_of(const Compression& how) {
  return how.window.value_or(compresskv::own_window(how.method, how.score_threshold.has_value()));
}

/// Whether a method looks at what goes into each layer's attention, and at no query.
constexpr bool wants_hidden_states(Method method) { return info(method).needs_surrogate; }

/// Whether a method wants the queries of the whole prompt, not those of the window alone.
constexpr bool wants_all_queries(Method method) { return method == Method::h2o; }

/// Whether a layer shrinks again as later ones come.
constexpr bool reaches_back(Method method) {
  return method == Method::cake || method == Method::carried || method == Method::model_wide ||
         method == Method::blend || method == Method::blend_carried || info(method).repeats;
}

/// Why a method does not compress again while the answer grows; empty where it does.
constexpr std::string_view why_not_while_decoding(Method method) {
  if (method == Method::full) {
    return "keeps every row";
  }
  if (info(method).repeats) {
    return "feeds the whole context once more";
  }
  if (wants_hidden_states(method)) {
    return "wants hidden states, which are not kept of what is decoded";
  }
  if (wants_all_queries(method)) {
    return "wants the queries of all tokens";
  }
  return "";
}

/// Names of all methods, as the command line takes them.
std::vector<std::string> method_names();

/// A line a method: its name and what it keeps.
std::string method_help();

}  // namespace ckv
