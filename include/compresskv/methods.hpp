#pragma once

#include "compresskv/budget/cake.hpp"
#include "compresskv/budget/error_aware.hpp"
#include "compresskv/budget/one_of.hpp"
#include "compresskv/budget/pyramid.hpp"
#include "compresskv/budget/uniform.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/method_settings.hpp"
#include "compresskv/score/cake.hpp"
#include "compresskv/score/carried.hpp"
#include "compresskv/score/grouped_retrieval.hpp"
#include "compresskv/score/h2o.hpp"
#include "compresskv/score/key_diff.hpp"
#include "compresskv/score/knorm.hpp"
#include "compresskv/score/model_wide.hpp"
#include "compresskv/score/random.hpp"
#include "compresskv/score/semantic_retrieval.hpp"
#include "compresskv/score/snap_kv.hpp"
#include "compresskv/score/streaming_llm.hpp"
#include "compresskv/score/tova.hpp"
#include "compresskv/select/adaptive.hpp"
#include "compresskv/select/grouped_top_k.hpp"
#include "compresskv/select/shared_top_k.hpp"

namespace compresskv {

/// Calls `f(scorer, selector, allocator)` with the policies of a method; each kind of method is another type.
/// `Method::full` has none and is an error, as are a method's missing head ranking and options that a policy
/// refuses: ArgumentError.
template <class F>
decltype(auto) with_method(Method method, const MethodSettings& settings, F&& f) {
  detail::require(method != Method::full, "method full keeps every row: there is nothing to compose");
  detail::require(!info(method).needs_heads || settings.heads.has_value(), "method ", info(method).name,
                  " needs a head ranking: give the one calibrated for this model");
  detail::require(!info(method).needs_scores || settings.scores.has_value(), "method ", info(method).name,
                  " needs raw head scores: give those that calibration wrote for this model");
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
  const auto retrieval = [&] {
    return score::SemanticRetrieval::Options{.heads_per_layer = settings.heads_per_layer,
                                             .window = settings.window,
                                             .pool = settings.pool,
                                             .pool_width = settings.pool_width};
  };
  const auto snap = [&] {
    return score::SnapKv{
        {.window = settings.window, .pool = settings.pool, .pool_width = settings.pool_width}};
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
      return f(score::Cake{{.window = settings.window, .pool_width = settings.pool_width}},
               select::GroupedTopK{}, budget::Cake{settings.budget});
    case Method::h2o:
      return f(score::H2O{{.window = settings.window}}, select::GroupedTopK{}, budgets);
    case Method::tova:
      return f(score::Tova{}, select::SharedTopK{}, budgets);
    case Method::knorm:
      return f(score::Knorm{{.window = settings.window}}, select::GroupedTopK{}, budgets);
    case Method::keydiff:
      return f(score::KeyDiff{{.window = settings.window}}, select::GroupedTopK{}, budgets);
    case Method::streaming:
      return f(score::StreamingLlm{{.window = settings.window}}, select::SharedTopK{}, budgets);
    case Method::random:
      return f(score::Random{{.seed = settings.seed, .window = settings.window}}, select::GroupedTopK{},
               budgets);
    case Method::carried:
      return f(score::Carried{*settings.scores,
                              {.heads_per_layer = settings.heads_per_layer,
                               .decay = settings.decay,
                               .hold_layers = settings.hold_layers,
                               .window = settings.window,
                               .pool = settings.pool,
                               .pool_width = settings.pool_width,
                               .equal_weights = settings.equal_weights}},
               select::SharedTopK{}, budgets);
    case Method::model_wide:
      return f(score::ModelWide{*settings.scores,
                                {.heads = settings.model_heads,
                                 .window = settings.window,
                                 .pool = settings.pool,
                                 .pool_width = settings.pool_width,
                                 .equal_weights = settings.equal_weights}},
               select::SharedTopK{}, budgets);
    case Method::compresskv:
    case Method::full:
      break;
  }
  return f(score::SemanticRetrieval{*settings.heads, retrieval()}, select::SharedTopK{}, budgets);
}

}  // namespace compresskv
