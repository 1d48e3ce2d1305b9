#pragma once

#include <array>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <optional>
#include <string_view>
#include <utility>

namespace ckv {

enum class Method { compresskv, full, streaming };

struct MethodInfo {
  Method method;
  std::string_view name;
  std::string_view summary;
  bool needs_heads;
  bool needs_budget;
};

/// The methods that the tool knows: its choices, its help and its checks all come from here.
inline constexpr std::array<MethodInfo, 3> methods = {{
    {.method = Method::compresskv,
     .name = "compresskv",
     .summary = "each layer's semantic retrieval heads choose the tokens that all its heads keep",
     .needs_heads = true,
     .needs_budget = true},
    {.method = Method::full,
     .name = "full",
     .summary = "nothing is evicted",
     .needs_heads = false,
     .needs_budget = false},
    {.method = Method::streaming,
     .name = "streaming",
     .summary = "the first 4 tokens and the most recent ones, whatever they say",
     .needs_heads = false,
     .needs_budget = true},
}};

constexpr const MethodInfo& info(Method method) {
  for (const MethodInfo& row : methods) {
    if (row.method == method) {
      return row;
    }
  }
  return methods.front();
}

/// What is to be done to a cache at the end of prefill.
struct Compression {
  Method method = Method::full;
  std::optional<compresskv::Budget> budget = std::nullopt;      ///< for all methods but `full`
  std::optional<compresskv::HeadRanking> heads = std::nullopt;  ///< for `compresskv`
  /// For `compresskv`: budgets by these errors; absent: every layer the same.
  std::optional<compresskv::LayerErrors> errors = std::nullopt;
  std::size_t window = 8;
  std::size_t heads_per_layer = 4;
  compresskv::kernel::Pool pool = compresskv::kernel::Pool::average;
};

/// Calls `f` with the library's plan for this compression; each kind of plan is a type of its own. Not for
/// `Method::full`, which has none. Throws compresskv::ArgumentError where something does not fit the model.
template <class F>
decltype(auto) with_plan(const Compression& how, const compresskv::ModelShape& shape, F&& f) {
  using namespace compresskv;
  if (how.method == Method::streaming) {
    return std::forward<F>(f)(Plan{shape, score::StreamingLlm{{.window = how.window}}, select::SharedTopK{},
                                   budget::Uniform{how.budget.value()}});
  }
  const score::SemanticRetrieval scorer{
      how.heads.value(), {.heads_per_layer = how.heads_per_layer, .window = how.window, .pool = how.pool}};
  if (how.errors) {
    return std::forward<F>(f)(
        Plan{shape, scorer, select::SharedTopK{}, budget::ErrorAware{*how.errors, how.budget.value()}});
  }
  return std::forward<F>(f)(Plan{shape, scorer, select::SharedTopK{}, budget::Uniform{how.budget.value()}});
}

}  // namespace ckv
