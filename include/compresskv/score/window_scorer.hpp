#pragma once

#include <cstddef>

#include "compresskv/core/error.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/kernel/pooling.hpp"

// What scorers share. A scorer keeps its formula, its paper and its options.

namespace compresskv::score {

/// Options of a scorer that has no others.
struct WindowOptions {
  std::size_t window = 8;  ///< most recent tokens, kept whatever their scores
};

/// A window whose queries observe, and how neighbouring tokens share what they see. Also made from the
/// options of a scorer that has more of them.
struct PooledWindow {
  std::size_t window = 8;
  kernel::Pool pool = kernel::Pool::average;
  std::size_t pool_width = 5;  ///< odd

  static PooledWindow of(const auto& options) {
    return {.window = options.window, .pool = options.pool, .pool_width = options.pool_width};
  }
};

/// Throws ArgumentError for no window, or an even pooling width where `options` has one.
template <Needs N>
void check_window(const auto& options) {
  detail::require(
      options.window > 0, "window is 0: at least the last ",
      N == Needs::window_attention || N == Needs::window_queries ? "query must observe" : "token must stay");
  if constexpr (requires { options.pool_width; }) {
    kernel::check_pool_width(options.pool_width);
  }
}

/// The head of a scorer that looks at its own layer alone, fits any model, and has a window among its
/// options `O`: what remains to be written is `score`.
template <Granularity G, Needs N, class O = WindowOptions>
class WindowScorer {
 public:
  static constexpr Granularity granularity = G;
  static constexpr Needs needs = N;
  static constexpr Reach reach = Reach::own_layer;
  using Options = O;

  WindowScorer() = default;
  /// Throws as `check_window`.
  explicit WindowScorer(const Options& options) : options_(options) { check_window<N>(options); }

  std::size_t window() const { return options_.window; }
  const Options& options() const { return options_; }
  void validate(const ModelShape&) const {}

 private:
  Options options_;
};

}  // namespace compresskv::score
