#pragma once

#include <algorithm>
#include <array>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <optional>
#include <span>
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

/// Budgets of a prompt that is compressed while it is being read: as long as it is not whole, every layer may
/// keep `working_rows`; then `A` shares out the user's budget, which must not exceed them.
template <compresskv::budget::Allocator A>
class WhileReading {
 public:
  static constexpr compresskv::Reach reach = A::reach;

  WhileReading(A whole, std::size_t working_rows, std::size_t prompt_tokens)
      : whole_(std::move(whole)), working_rows_(working_rows), prompt_tokens_(prompt_tokens) {}

  const compresskv::Budget& budget() const { return whole_.budget(); }
  void validate(const compresskv::ModelShape& shape) const { whole_.validate(shape); }
  void allocate(const compresskv::budget::Allowance& allowance, std::span<std::size_t> capacities) const {
    if (working_rows_ > 0 && allowance.tokens < prompt_tokens_) {
      std::fill(capacities.begin(), capacities.end(), std::min(working_rows_, allowance.tokens));
    } else {
      whole_.allocate(allowance, capacities);
    }
  }

 private:
  A whole_;
  std::size_t working_rows_;
  std::size_t prompt_tokens_;
};

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
  /// Where the prompt is read in chunks: rows that a layer may keep after each but the last, at least the
  /// window and the budget. 0: nothing is evicted before the last chunk.
  std::size_t working_rows = 0;
};

/// Calls `f` with the library's plan for this compression; each kind of plan is a type of its own. Not for
/// `Method::full`, which has none. `prompt_tokens` matters with `working_rows` alone. Throws
/// compresskv::ArgumentError where something does not fit the model.
template <class F>
decltype(auto) with_plan(const Compression& how, const compresskv::ModelShape& shape, F&& f,
                         std::size_t prompt_tokens = 0) {
  using namespace compresskv;
  const auto call = [&](const auto& scorer, const auto& allocator) -> decltype(auto) {
    return std::forward<F>(f)(
        Plan{shape, scorer, select::SharedTopK{}, WhileReading{allocator, how.working_rows, prompt_tokens}});
  };
  const budget::Uniform uniform{how.budget.value()};
  if (how.method == Method::streaming) {
    return call(score::StreamingLlm{{.window = how.window}}, uniform);
  }
  const score::SemanticRetrieval scorer{
      how.heads.value(), {.heads_per_layer = how.heads_per_layer, .window = how.window, .pool = how.pool}};
  if (how.errors) {
    // A layer that then kept more than while reading would take the whole cache above its bound.
    budget::ErrorAware::Options bounds;
    if (how.working_rows > 0) {
      const std::size_t mean = how.budget->resolve(prompt_tokens, how.window, shape);
      bounds.max_rows = std::min(3 * mean, how.working_rows);
    }
    return call(scorer, budget::ErrorAware{*how.errors, how.budget.value(), bounds});
  }
  return call(scorer, uniform);
}

}  // namespace ckv
