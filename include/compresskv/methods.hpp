#pragma once

#include "compresskv/budget/cake.hpp"
#include "compresskv/budget/error_aware.hpp"
#include "compresskv/budget/one_of.hpp"
#include "compresskv/budget/pyramid.hpp"
#include "compresskv/budget/uniform.hpp"
#include "compresskv/budget/whole_heads.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/method_settings.hpp"
#include "compresskv/score/blend.hpp"
#include "compresskv/score/blend_carried.hpp"
#include "compresskv/score/cake.hpp"
#include "compresskv/score/carried.hpp"
#include "compresskv/score/chunk_kv.hpp"
#include "compresskv/score/critical_kv.hpp"
#include "compresskv/score/cur.hpp"
#include "compresskv/score/duo_attention.hpp"
#include "compresskv/score/expected_attention.hpp"
#include "compresskv/score/grouped_retrieval.hpp"
#include "compresskv/score/h2o.hpp"
#include "compresskv/score/key_diff.hpp"
#include "compresskv/score/knorm.hpp"
#include "compresskv/score/kv_zip.hpp"
#include "compresskv/score/kv_zip_plus.hpp"
#include "compresskv/score/lag_kv.hpp"
#include "compresskv/score/model_wide.hpp"
#include "compresskv/score/q_filter.hpp"
#include "compresskv/score/r_kv.hpp"
#include "compresskv/score/random.hpp"
#include "compresskv/score/semantic_retrieval.hpp"
#include "compresskv/score/snap_kv.hpp"
#include "compresskv/score/streaming_llm.hpp"
#include "compresskv/score/tova.hpp"
#include "compresskv/score/tri_attention.hpp"
#include "compresskv/select/adaptive.hpp"
#include "compresskv/select/grouped_top_k.hpp"
#include "compresskv/select/shared_top_k.hpp"
#include "compresskv/select/whole_model.hpp"

namespace compresskv {

/// Calls `f(scorer, selector, allocator)` with the policies of a method; each kind of method is another type.
/// `Method::full` has none and is an error, as is what a method needs and is not given (a head ranking,
/// scores of query or KV heads, query statistics, output weights), and options that a policy refuses:
/// ArgumentError.
template <class F>
decltype(auto) with_method(Method method, const MethodSettings& settings, F&& f) {
  detail::require(method != Method::full, "method full keeps every row: there is nothing to compose");
  detail::require(!info(method).needs_heads || settings.heads.has_value(), "method ", info(method).name,
                  " needs a head ranking: give the one calibrated for this model");
  detail::require(!info(method).needs_scores || settings.scores.has_value(), "method ", info(method).name,
                  " needs raw head scores: give those that calibration wrote for this model");
  detail::require(!info(method).needs_statistics || settings.statistics.has_value(), "method ",
                  info(method).name,
                  " needs query statistics: give those that calibration wrote for this model");
  detail::require(!info(method).needs_outputs || settings.output_weights.has_value(), "method ",
                  info(method).name, " needs output weights: give the model's own, OutputWeights");
  detail::require(!info(method).needs_kv_scores || settings.kv_scores.has_value(), "method ",
                  info(method).name,
                  " needs scores of KV heads: give those that calibration wrote for this model");
  using Budgets = budget::OneOf<budget::Uniform, budget::ErrorAware, budget::Pyramid>;
  const auto budgets = [&]() -> Budgets {
    if (method == Method::pyramidkv) {
      return budget::Pyramid{settings.budget};
    }
    if (settings.errors) {
      return budget::ErrorAware{*settings.errors, settings.budget, {.min_rows = settings.min_rows}};
    }
    return budget::Uniform{settings.budget};
  }();
  const std::size_t window = settings.window.value_or(info(method).window);
  const kernel::Pool pool = settings.pool.value_or(info(method).pool);
  const std::size_t pool_width = settings.pool_width.value_or(info(method).pool_width);
  const score::BlendShares shares{.sinks = settings.sinks, .model_share = settings.model_share};
  const auto retrieval = [&] {
    return score::SemanticRetrieval::Options{.heads_per_layer = settings.heads_per_layer,
                                             .window = window,
                                             .pool = pool,
                                             .pool_width = pool_width};
  };
  const auto snap = [&] { return score::SnapKv{{.window = window, .pool = pool, .pool_width = pool_width}}; };
  const auto whole_heads = [&](const HeadScores& scores) -> decltype(auto) {
    return f(
        score::DuoAttention{{.sinks = settings.head_sinks, .recent = settings.head_recent, .window = window}},
        select::GroupedTopK{},
        budget::WholeHeads{scores, settings.budget, settings.head_sinks + settings.head_recent});
  };
  switch (method) {
    case Method::compresskv_grouped:
      return f(score::GroupedRetrieval{*settings.heads, retrieval()}, select::GroupedTopK{}, budgets);
    case Method::compresskv_adaptive:
      return f(score::GroupedRetrieval{*settings.heads, retrieval()}, select::Adaptive{}, budgets);
    case Method::snapkv:
    case Method::pyramidkv:
      return f(snap(), select::GroupedTopK{}, budgets);
    case Method::adakv:
      return f(snap(), select::Adaptive{}, budgets);
    case Method::cake:
      return f(score::Cake{{.window = window, .pool_width = pool_width}}, select::GroupedTopK{},
               budget::Cake{settings.budget});
    case Method::h2o:
      return f(score::H2O{{.window = window}}, select::GroupedTopK{}, budgets);
    case Method::tova:
      return f(score::Tova{}, select::SharedTopK{}, budgets);
    case Method::knorm:
      return f(score::Knorm{{.window = window}}, select::GroupedTopK{}, budgets);
    case Method::keydiff:
      return f(score::KeyDiff{{.window = window}}, select::GroupedTopK{}, budgets);
    case Method::lagkv:
      return f(score::LagKv{{.sinks = settings.sinks, .lag = settings.lag, .window = window}},
               select::GroupedTopK{}, budgets);
    case Method::cur:
      return f(score::Cur{{.sinks = settings.sinks, .block = settings.block, .window = window}},
               select::GroupedTopK{}, budgets);
    case Method::chunkkv:
      return f(score::ChunkKv{snap(), {.chunk = settings.chunk}}, select::GroupedTopK{}, budgets);
    case Method::criticalkv:
      // kvpress's 1e-4 is of means over the window, ours are sums.
      return f(
          score::CriticalKv{
              snap(), *settings.output_weights, {.epsilon = 1e-4F * static_cast<float>(window)}},
          select::GroupedTopK{}, budgets);
    case Method::streaming:
      return f(score::StreamingLlm{{.window = window}}, select::SharedTopK{}, budgets);
    case Method::random:
      return f(score::Random{{.seed = settings.seed, .window = window}}, select::GroupedTopK{}, budgets);
    case Method::carried:
      return f(score::Carried{*settings.scores,
                              {.heads_per_layer = settings.heads_per_layer,
                               .decay = settings.decay,
                               .hold_layers = settings.hold_layers,
                               .window = window,
                               .pool = pool,
                               .pool_width = pool_width,
                               .equal_weights = settings.equal_weights}},
               select::SharedTopK{}, budgets);
    case Method::model_wide:
      return f(score::ModelWide{*settings.scores,
                                {.heads = settings.model_heads,
                                 .window = window,
                                 .pool = pool,
                                 .pool_width = pool_width,
                                 .equal_weights = settings.equal_weights}},
               select::SharedTopK{}, budgets);
    case Method::blend:
      return f(score::Blend{*settings.scores,
                            {.heads = settings.model_heads,
                             .heads_per_layer = settings.heads_per_layer,
                             .shares = shares,
                             .window = window,
                             .pool = pool,
                             .pool_width = pool_width}},
               select::SharedTopK{}, budgets);
    case Method::blend_carried:
      return f(score::BlendCarried{*settings.scores,
                                   {.heads_per_layer = settings.heads_per_layer,
                                    .decay = settings.decay,
                                    .hold_layers = settings.hold_layers,
                                    .shares = shares,
                                    .window = window,
                                    .pool = pool,
                                    .pool_width = pool_width}},
               select::SharedTopK{}, budgets);
    case Method::kvzip:
      return f(score::KvZip{{.sinks = settings.sinks, .window = window}}, select::WholeModel{}, budgets);
    case Method::kvzip_plus:
      return f(score::KvZipPlus{*settings.output_weights, {.sinks = settings.sinks, .window = window}},
               select::WholeModel{}, budgets);
    case Method::expected_attention:
      return f(score::ExpectedAttention{*settings.statistics, {.window = window}}, select::GroupedTopK{},
               budgets);
    case Method::expected_attention_adaptive:
      return f(score::ExpectedAttention{*settings.statistics, {.window = window, .epsilon = 0.01}},
               select::Adaptive{}, budgets);
    case Method::q_filter:
      return f(score::QFilter{*settings.statistics, {.window = window}}, select::GroupedTopK{}, budgets);
    case Method::triattention:
      return f(score::TriAttention{*settings.statistics, {.window = window}}, select::GroupedTopK{}, budgets);
    case Method::rkv:
      return f(score::RKv{{.lambda = settings.lambda,
                           .threshold = settings.threshold,
                           .window = window,
                           .pool = pool,
                           .pool_width = pool_width}},
               select::GroupedTopK{}, budgets);
    case Method::duoattention:
      return whole_heads(*settings.scores);
    case Method::kvzip_heads:
      return whole_heads(*settings.kv_scores);
    case Method::compresskv:
    case Method::full:
      break;
  }
  return f(score::SemanticRetrieval{*settings.heads, retrieval()}, select::SharedTopK{}, budgets);
}

}  // namespace compresskv
