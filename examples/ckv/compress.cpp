#include "compress.hpp"

#include <algorithm>
#include <compresskv/kernel/window_attention.hpp>
#include <cstdint>
#include <numeric>
#include <span>
#include <type_traits>

#include "run.hpp"

namespace ckv {
namespace {

using compresskv::ModelShape;

/// Budgets of a prompt that is compressed while it is being read: as long as it is not whole, every layer may
/// keep `working_rows`; then the method shares out the user's budget, which must not exceed them.
compresskv::AnyPlanOptions while_reading(std::size_t working_rows, std::size_t prompt_tokens,
                                         std::size_t layers) {
  return {.share_rows = [=](compresskv::ShareRows own, compresskv::budget::Allowance allowance,
                            std::span<std::size_t> capacities) {
    // Heads that keep all in the end keep all from the start: they share the working rows as the budget.
    if (capacities.size() > layers) {
      if (allowance.tokens < prompt_tokens) {
        allowance.per_layer = std::min(working_rows, allowance.tokens);
      }
      own(allowance, capacities);
      return;
    }
    if (allowance.tokens < prompt_tokens) {
      std::fill(capacities.begin(), capacities.end(), std::min(working_rows, allowance.tokens));
      return;
    }
    own(allowance, capacities);
    // A layer that in the end kept more than while reading would take the whole cache above its bound: what
    // it has over goes to the others, a row each in turn.
    const std::size_t total = std::accumulate(capacities.begin(), capacities.end(), std::size_t{0});
    for (std::size_t& rows : capacities) {
      rows = std::min(rows, working_rows);
    }
    compresskv::budget::walk_to_total(
        capacities, total, [](std::size_t) { return std::size_t{0}; },
        [&](std::size_t) { return working_rows; });
  }};
}

}  // namespace

PromptCompressor::PromptCompressor(const compresskv::AnyPlan& plan, engine::ThreadPool& pool)
    : executor_{&pool}, compressor_(plan, executor_) {}

/// Gives back the memory of the layers that `change(views)` has shrunk.
template <class Change>
void PromptCompressor::shrink(engine::LayerView& layer, Change&& change) {
  const auto layer_at = [&](std::size_t l) -> engine::LayerView& {
    return l == static_cast<std::size_t>(layer.layer) ? layer : layer.earlier(static_cast<int>(l));
  };
  for (const std::size_t l : change([&](std::size_t index) { return any_view_of(layer_at(index)); })) {
    give_back(layer_at(l), compressor_.retained(l));
  }
}

void PromptCompressor::compress(engine::LayerView& layer, const Observed& observed) {
  const compresskv::AnyObservation observation =
      observed.hidden_states != nullptr ? compresskv::AnyObservation(*observed.hidden_states)
      : observed.sums != nullptr        ? compresskv::AnyObservation(*observed.sums)
                                        : compresskv::AnyObservation(observed.queries);
  shrink(layer, [&](const auto& views) {
    return compressor_.arrive(static_cast<std::size_t>(layer.layer), views, observation);
  });
  finish(layer);
}

void PromptCompressor::observe(engine::LayerView& layer, const compresskv::Stretch& stretch) {
  compressor_.observe(static_cast<std::size_t>(layer.layer), any_view_of(layer), stretch, queries_of(layer),
                      {layer.hidden_norms, layer.window});
}

void PromptCompressor::finish(engine::LayerView& layer) {
  if (static_cast<std::size_t>(layer.layer) + 1 == compressor_.plan().shape().layers) {
    shrink(layer, [&](const auto& views) { return compressor_.finish(views); });
  }
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  names.reserve(compresskv::methods.size());
  for (const MethodInfo& row : compresskv::methods) {
    names.emplace_back(row.name);
  }
  return names;
}

std::string method_help() {
  std::string help;
  for (const MethodInfo& row : compresskv::methods) {
    help += help.empty() ? "" : "\n";
    help.append(row.name).append(": ").append(row.summary);
  }
  return help;
}

compresskv::MethodSettings settings_of(const Compression& how) {
  return {.budget = how.budget.value(),
          .heads = how.heads,
          .scores = how.scores,
          .statistics = how.statistics,
          .output_weights = how.output_weights,
          .kv_scores = how.kv_scores,
          .surrogate = how.surrogate,
          .errors = how.errors,
          .min_rows = how.min_rows,
          .heads_per_layer = how.heads_per_layer,
          .window = how.window,
          .pool = how.pool,
          .pool_width = how.pool_width,
          .seed = how.seed,
          .decay = how.decay,
          .hold_layers = how.hold_layers,
          .model_heads = how.model_heads,
          .equal_weights = how.equal_weights,
          .sinks = how.sinks,
          .model_share = how.model_share,
          .lag = how.lag,
          .block = how.block,
          .chunk = how.chunk,
          .lambda = how.lambda,
          .threshold = how.threshold,
          .head_sinks = how.head_sinks,
          .head_recent = how.head_recent,
          .score_threshold = how.score_threshold};
}

std::unique_ptr<PromptCompressor> make_compressor(const Compression& how, const ModelShape& shape,
                                                  engine::ThreadPool& pool, std::size_t prompt_tokens) {
  const compresskv::AnyPlanOptions options =
      how.working_rows > 0 ? while_reading(how.working_rows, prompt_tokens, shape.layers)
                           : compresskv::AnyPlanOptions{};
  return std::make_unique<PromptCompressor>(compresskv::AnyPlan(shape, how.method, settings_of(how), options),
                                            pool);
}

std::vector<float> sum_attention(const engine::LayerCache& layer,
                                 const compresskv::QueryWindow<float>& queries, std::size_t window,
                                 const ModelShape& shape, engine::ThreadPool& pool) {
  const std::size_t tokens = layer.rows(0);
  std::vector<float> sums(shape.query_heads * tokens);
  engine::with_kv_type(layer.type(), [&]<typename E>(E*) {
    const compresskv::StridedKv<const E> kv{layer.keys<E>(0), layer.values<E>(0),
                                            compresskv::KvShape{.kv_heads = shape.kv_heads,
                                                                .rows = tokens,
                                                                .head_dim = shape.head_dim,
                                                                .allocated_rows = layer.allocated_rows(0)},
                                            compresskv::layout::head_token_dim};
    const compresskv::Retained whole;  // row == position
    // clang 14 deduces no arguments of an aggregate.
    const compresskv::kernel::LayerInput<std::remove_const_t<decltype(kv)>, compresskv::QueryWindow<float>>
        in{.shape = shape,
           .layer = 0,
           .rows = layer.rows(),
           .window = std::min(window, tokens),
           .retained = whole,
           .kv = kv,
           .observation = queries};
    compresskv::Workspace workspace;
    engine::PoolExecutor executor{&pool};
    compresskv::kernel::attention_sums_of_all_heads(
        in, tokens, workspace, executor, [&](std::uint32_t head, std::span<const float> row) {
          std::copy(row.begin(), row.end(), sums.begin() + static_cast<std::ptrdiff_t>(head * tokens));
        });
  });
  return sums;
}

}  // namespace ckv
