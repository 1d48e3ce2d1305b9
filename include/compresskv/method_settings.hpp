#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "compresskv/core/budget.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/layer_errors.hpp"
#include "compresskv/core/output_weights.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/kernel/pool.hpp"

namespace compresskv {

/// The methods that the library knows by name: a scorer with its selector, and the budgets that belong to it.
enum class Method {
  full,
  compresskv,
  compresskv_grouped,
  compresskv_adaptive,
  snapkv,
  pyramidkv,
  adakv,
  cake,
  h2o,
  tova,
  knorm,
  keydiff,
  lagkv,
  cur,
  chunkkv,
  criticalkv,
  streaming,
  random,
  carried,
  model_wide,
  blend,
  blend_carried,
  kvzip,
  kvzip_plus,
  expected_attention,
  expected_attention_adaptive,
  q_filter,
  triattention,
  rkv,
  duoattention,
  kvzip_heads,
};

/// One row of the table of methods.
struct MethodInfo {
  Method method;
  std::string_view name;          ///< as tools spell it
  std::string_view summary;       ///< what stays, in a clause
  std::string_view paper;         ///< arXiv number, or empty
  bool needs_heads = false;       ///< a head ranking
  bool per_head = false;          ///< KV heads keep rows of their own
  bool needs_scores = false;      ///< raw head scores: a ranking is not enough
  bool needs_statistics = false;  ///< query statistics
  bool needs_outputs = false;     ///< output weights
  bool needs_kv_scores = false;   ///< scores of KV heads
  bool repeats = false;           ///< the engine feeds the context once more: `observe` in place of `arrive`
  std::size_t window = 8;         ///< where nothing else is said; so the two below
  kernel::Pool pool = kernel::Pool::average;
  std::size_t pool_width = 5;
};

/// The one table: tools, tests, benchmarks and documentation read it.
inline constexpr std::array<MethodInfo, 31> methods = {{
    {Method::full, "full", "nothing is evicted", ""},
    {Method::compresskv, "compresskv",
     "each layer's semantic retrieval heads choose the tokens that all its heads keep", "2606.24467", true,
     false},
    {Method::compresskv_grouped, "compresskv-grouped",
     "each KV head keeps what the retrieval heads of its group choose", "2606.24467", true, true},
    {Method::compresskv_adaptive, "compresskv-adaptive",
     "as compresskv-grouped, KV heads sharing the layer's rows by need", "2407.11550", true, true},
    {Method::snapkv, "snapkv", "each KV head keeps what its own query heads look at", "2404.14469", false,
     true},
    {Method::pyramidkv, "pyramidkv", "as snapkv, lower layers keeping more", "2406.02069", false, true},
    {Method::adakv, "adakv", "as snapkv, KV heads sharing the layer's rows by need", "2407.11550", false,
     true},
    {Method::cake, "cake", "what is looked at, or unevenly; layers share by how they look", "2503.12491",
     false, true},
    {Method::h2o, "h2o", "what has drawn the most attention of all queries", "2306.14048", false, true},
    {.method = Method::tova,
     .name = "tova",
     .summary = "what the last query looks at, all heads together",
     .paper = "2401.06104",
     .window = 1},
    {Method::knorm, "knorm", "keys of small length", "2406.11430", false, true},
    {Method::keydiff, "keydiff", "keys that differ from the others", "2504.15364", false, true},
    {Method::lagkv, "lagkv", "in each stretch of text, what the next stretch does not foretell", "2504.04704",
     false, true},
    {Method::cur, "cur", "long keys with long values, beside those around them", "2509.15038", false, true},
    {Method::chunkkv, "chunkkv", "as snapkv, whole chunks of neighbouring tokens", "2502.00299", false, true},
    {.method = Method::criticalkv,
     .name = "criticalkv",
     .summary = "as snapkv, half of the rows by what their values add to the layer's output too",
     .paper = "2502.03805",
     .per_head = true,
     .needs_outputs = true},
    {Method::streaming, "streaming", "the first 4 tokens and the most recent ones, whatever they say",
     "2309.17453"},
    {Method::random, "random", "rows drawn by a hash: the floor", "", false, true},
    {.method = Method::carried,
     .name = "carried",
     .summary = "retrieval heads of all layers so far choose, each layer as it arrives",
     .paper = "",
     .needs_scores = true,
     .window = 16},
    {.method = Method::model_wide,
     .name = "model-wide",
     .summary = "the best retrieval heads of the whole model choose one set for all layers",
     .paper = "",
     .needs_scores = true,
     .window = 16},
    {.method = Method::blend,
     .name = "blend",
     .summary = "most rows by the whole model's best retrieval heads, the others by the layer's own",
     .paper = "",
     .needs_scores = true,
     .window = 16,
     .pool = kernel::Pool::trailing,
     .pool_width = 9},
    {.method = Method::blend_carried,
     .name = "blend-carried",
     .summary = "as blend, by the layers so far, each layer as it arrives",
     .paper = "",
     .needs_scores = true,
     .window = 16,
     .pool = kernel::Pool::trailing,
     .pool_width = 9},
    {.method = Method::kvzip,
     .name = "kvzip",
     .summary =
         "what is looked at when the model repeats the context, all layers and KV heads sharing the rows",
     .paper = "2505.23416",
     .per_head = true,
     .repeats = true,
     .window = 1},
    {.method = Method::kvzip_plus,
     .name = "kvzip-plus",
     .summary = "as kvzip, by what a token then adds to the layer's output",
     .paper = "2601.07891",
     .per_head = true,
     .needs_outputs = true,
     .repeats = true,
     .window = 1},
    {.method = Method::expected_attention,
     .name = "expected-attention",
     .summary = "what queries to come look at, by how the model's queries are spread",
     .paper = "2510.00636",
     .per_head = true,
     .needs_statistics = true},
    {.method = Method::expected_attention_adaptive,
     .name = "expected-attention-adaptive",
     .summary = "as expected-attention, KV heads sharing the layer's rows by need",
     .paper = "2510.00636",
     .per_head = true,
     .needs_statistics = true},
    {.method = Method::q_filter,
     .name = "q-filter",
     .summary = "keys that point where the model's queries do",
     .paper = "2503.02812",
     .per_head = true,
     .needs_statistics = true},
    {.method = Method::triattention,
     .name = "triattention",
     .summary = "what the model's mean query looks at, at distances that double",
     .paper = "2604.04921",
     .per_head = true,
     .needs_statistics = true},
    {.method = Method::rkv,
     .name = "rkv",
     .summary = "what is looked at, less what the keys say more than once: for long generations",
     .paper = "2505.24133",
     .per_head = true,
     .pool = kernel::Pool::max,
     .pool_width = 7},
    {.method = Method::duoattention,
     .name = "duoattention",
     .summary = "all rows of the KV heads that retrieve best, of the others the first and the most recent",
     .paper = "2410.10819",
     .per_head = true,
     .needs_scores = true},
    {.method = Method::kvzip_heads,
     .name = "kvzip-heads",
     .summary = "as duoattention, the heads chosen by what they look at when the model repeats a text",
     .paper = "2505.23416",
     .per_head = true,
     .needs_kv_scores = true},
}};

constexpr const MethodInfo& info(Method method) {
  for (const MethodInfo& row : methods) {
    if (row.method == method) {
      return row;
    }
  }
  return methods.front();
}

/// The row of a method's name. Throws ArgumentError that lists the names.
inline const MethodInfo& method_named(std::string_view name) {
  const auto found =
      std::find_if(methods.begin(), methods.end(), [&](const MethodInfo& row) { return row.name == name; });
  if (found == methods.end()) {
    std::string names;
    for (const MethodInfo& row : methods) {
      names += names.empty() ? "" : ", ";
      names += row.name;
    }
    detail::fail<ArgumentError>("method is '", name, "', must be one of ", names);
  }
  return *found;
}

/// What a method is made from; options that a method does not have are ignored.
struct MethodSettings {
  Budget budget = Budget::kept_ratio(1.0);
  std::optional<HeadRanking> heads = std::nullopt;             ///< for methods with `needs_heads`
  std::optional<HeadScores> scores = std::nullopt;             ///< for methods with `needs_scores`
  std::optional<QueryStatistics> statistics = std::nullopt;    ///< for methods with `needs_statistics`
  std::optional<OutputWeights> output_weights = std::nullopt;  ///< for methods with `needs_outputs`
  std::optional<HeadScores> kv_scores = std::nullopt;  ///< of KV heads, for methods with `needs_kv_scores`
  std::optional<LayerErrors> errors =
      std::nullopt;  ///< error-aware budgets, for all whose layers do not share by rules of their own
  std::optional<std::size_t> min_rows = std::nullopt;  ///< of error-aware budgets, as ErrorAware has it
  std::size_t heads_per_layer = 4;
  std::optional<std::size_t> window = std::nullopt;      ///< absent: the method's own; so the two below
  std::optional<kernel::Pool> pool = std::nullopt;       ///< not of cake
  std::optional<std::size_t> pool_width = std::nullopt;  ///< odd
  std::uint64_t seed = 0;                                ///< of random
  float decay = 0.7F;                                    ///< of carried and blend-carried
  std::size_t hold_layers = 0;                           ///< of carried and blend-carried
  std::size_t model_heads = 16;                          ///< of model-wide and blend, in the whole model
  bool equal_weights = false;                            ///< of carried and model-wide
  std::size_t sinks = 4;                                 ///< of both blends, lagkv, cur, kvzip and kvzip-plus
  double model_share = 0.6;                              ///< of both blends
  std::size_t lag = 128;                                 ///< of lagkv, rows of a stretch
  std::size_t block = 16;                                ///< of cur, rows that lengths are shared out among
  std::size_t chunk = 20;                                ///< of chunkkv, positions of a chunk
  float lambda = 0.07F;                                  ///< of rkv: weight of attention
  float threshold = 0.5F;                                ///< of rkv: cosine above which keys are alike
  std::size_t head_sinks = 128;                          ///< of duoattention and kvzip-heads: what heads
  std::size_t head_recent = 256;                         ///< keep that do not keep all
};

}  // namespace compresskv
