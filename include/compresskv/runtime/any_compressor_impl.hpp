#pragma once

#include <cstddef>
#include <functional>
#include <istream>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/budget/uniform.hpp"
#include "compresskv/compressor.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/made_with.hpp"
#include "compresskv/methods.hpp"
#include "compresskv/plan.hpp"
#include "compresskv/runtime/any_compressor.hpp"
#include "compresskv/score/cake.hpp"
#include "compresskv/score/random.hpp"
#include "compresskv/select/grouped_top_k.hpp"

// Compiles every method: `compresskv::runtime` includes this. A program without that library includes it in
// one source file, and in one only.

namespace compresskv {
namespace detail {

/// Budgets that an engine may share out in its own way.
template <budget::Allocator A>
class SharedByEngine {
 public:
  static constexpr Reach reach = Reach::own_layer;
  static constexpr Granularity granularity = budget::granularity_of<A>;

  SharedByEngine(A own, const AnyPlanOptions& options)
      : own_(std::move(own)), share_rows_(options.share_rows) {}

  const Budget& budget() const { return own_.budget(); }
  void validate(const ModelShape& shape) const { own_.validate(shape); }
  void allocate(const budget::Allowance& allowance, std::span<std::size_t> capacities) const {
    if (!share_rows_) {
      own_.allocate(allowance, capacities);
      return;
    }
    const auto own = [&](const budget::Allowance& of, std::span<std::size_t> rows) {
      own_.allocate(of, rows);
    };
    share_rows_(own, allowance, capacities);
  }

 private:
  A own_;
  decltype(AnyPlanOptions::share_rows) share_rows_;
};

template <class P>
class SequenceOf final : public AnySequence {
  using S = typename P::scorer_type;
  static constexpr bool repeats = S::needs == Needs::repeats;
  static constexpr bool by_queries = S::needs == Needs::window_queries;

 public:
  SequenceOf(const MethodInfo& info, const P& plan, AnyExecutor executor)
      : info_(&info), compressor_(plan, executor) {}

  std::unique_ptr<AnySequence> clone() const override { return std::make_unique<SequenceOf>(*this); }
  void begin(std::size_t prompt_tokens, const Protection& protection) override {
    compressor_.begin(prompt_tokens, protection);
  }
  void begin_turn(std::size_t total_tokens, const Protection& protection) override {
    compressor_.begin_turn(total_tokens, protection);
  }
  Held truncate(std::size_t position) override { return compressor_.truncate(position); }
  Held held(std::size_t tokens) const override { return compressor_.held(tokens); }
  std::span<const std::size_t> capacities() const override { return compressor_.capacities(); }
  const Retained& retained(std::size_t layer) const override { return compressor_.retained(layer); }

  std::span<const std::size_t> arrive(std::size_t layer, AnyViews views, const AnyObservation& observation,
                                      AnyReduce reduce) override {
    const auto reduced = [&](std::span<float> scores) {
      if (reduce) {
        reduce(scores);
      }
    };
    return with_observation<std::span<const std::size_t>>(
        observation, [&](const auto& shown) -> std::span<const std::size_t> {
          if constexpr (repeats) {
            fail_of_repeats();
          } else if constexpr (P::reach == Reach::own_layer) {
            compressor_.retained(layer);  // no view is asked for of a layer that is not there
            compressor_.compress(layer, views(layer), shown, reduced);
            own_layer_ = layer;
            return {&own_layer_, 1};
          } else {
            return compressor_.arrive(layer, views, shown, reduced);
          }
        });
  }

  void observe(std::size_t layer, const AnyKv& kv, const Stretch& stretch, const AnyObservation& queries,
               [[maybe_unused]] std::span<const float> hidden_norms) override {
    if constexpr (repeats) {
      const auto* shown = std::get_if<AnyQueries>(&queries.held());
      require(shown != nullptr, "method ", info_->name,
              " is shown what repeats the context by its queries: give a QueryWindow");
      compressor_.observe(layer, kv, stretch, *shown, hidden_norms);
    } else {
      fail<ArgumentError>("method ", info_->name,
                          " does not ask for the context to be repeated: call arrive() for each layer");
    }
  }

  std::span<const std::size_t> finish(AnyViews views) override {
    if constexpr (P::reach == Reach::all_layers) {
      return compressor_.finish(views);
    } else {
      return {};
    }
  }

  AnyScores score(std::size_t layer, const AnyKv* kv, const AnyObservation& observation) override {
    require(info_->method != Method::full, "method full keeps every row: it has no scores");
    if (kv != nullptr) {
      return with_observation<AnyScores>(observation, [&](const auto& shown) -> AnyScores {
        if constexpr (repeats) {
          fail_of_repeats();
        } else {
          return AnyScores(compressor_.score(layer, *kv, shown));
        }
      });
    }
    return from_attention<AnyScores>(
        observation, [&](const auto& shown) { return AnyScores(compressor_.score(layer, shown)); });
  }

  const Selection& select(std::size_t layer, const AnyScores& scores) override {
    require(scores.granularity() == S::granularity, "scores are those of ",
            scores.granularity() == Granularity::layer ? "a layer" : "KV heads", ", method ", info_->name,
            " selects by others: give the scores that score() filled");
    if constexpr (repeats) {
      fail_of_repeats();
    } else {
      return compressor_.select(layer, scores.as<S::granularity>());
    }
  }
  const Selection& select(std::size_t layer, const AnyObservation& attention) override {
    return from_attention<const Selection&>(
        attention, [&](const auto& shown) -> const Selection& { return compressor_.select(layer, shown); });
  }

  const Retained& compact(std::size_t layer, const AnyKv& kv, const Selection& selection) override {
    return compressor_.compact(layer, kv, selection);
  }
  const Retained& gather(std::size_t layer, const AnyKv& source, const Selection& selection,
                         const AnyKv& target) override {
    return compressor_.gather(layer, source, selection, target);
  }
  const Retained& rerotate(std::size_t layer, const AnyKv& kv, const kernel::Rotary& rotary) override {
    return compressor_.rerotate(layer, kv, rotary);
  }
  void save(std::ostream& out, const MadeWith& made) const override {
    const std::string method = named(made);
    compressor_.save(out, {.method = method, .calibration = made.calibration});
  }
  void load(std::istream& in, const MadeWith& made) override {
    const std::string method = named(made);
    compressor_.load(in, {.method = method, .calibration = made.calibration});
  }
  std::size_t memory_bytes() const override { return compressor_.memory_bytes(); }

 private:
  std::string named(const MadeWith& made) const {
    std::string method(info_->name);
    if (!made.method.empty()) {
      method.append(", ").append(made.method);
    }
    return method;
  }

  static constexpr bool takes_sums = !std::same_as<S, score::Cake>;

  /// Calls `f` with what the scorer is to be shown, by its type. What it does not look at is left out, so
  /// that its method is compiled once.
  template <class R, class F>
  R with_observation(const AnyObservation& observation, F&& f) const {
    if constexpr (!observes(S::needs)) {
      return f(NotGiven{});
    } else {
      if (const auto* queries = std::get_if<AnyQueries>(&observation.held())) {
        return f(*queries);
      }
      if constexpr (by_queries) {
        fail<ArgumentError>("method ", info_->name,
                            " compares logits, which attention no longer shows: give the window's queries, a "
                            "QueryWindow");
      } else {
        require(
            !std::holds_alternative<std::monostate>(observation.held()), "method ", info_->name,
            " needs the window's attention: give a QueryWindow, an AttentionMatrix or another Observation");
        return with_attention<R>(observation, f);
      }
    }
  }

  [[noreturn]] void fail_of_repeats() const {
    fail<ArgumentError>("method ", info_->name,
                        " is shown tokens that repeat the context: call observe() for each stretch and "
                        "layer, then finish()");
  }

  /// The same where no view is given.
  template <class R, class F>
  R from_attention(const AnyObservation& observation, F&& f) const {
    if constexpr (repeats) {
      fail_of_repeats();
    } else if constexpr (by_queries) {
      fail<ArgumentError>("method ", info_->name, " reads the keys: give the layer's view as well");
    } else if constexpr (reads_rows(S::needs) || reads_values<S>) {
      fail<ArgumentError>("method ", info_->name,
                          S::needs == Needs::keys ? " reads the keys" : " reads keys and values",
                          ": give the layer's view as well");
    } else {
      return with_attention<R>(observation, f);
    }
  }

  /// The same for attention alone.
  template <class R, class F>
  R with_attention(const AnyObservation& observation, F&& f) const {
    if (const auto* sums = std::get_if<AnySums>(&observation.held())) {
      require(takes_sums, "method ", info_->name,
              " needs the window's rows apart: give queries or an attention matrix, not sums");
      if constexpr (takes_sums) {
        return f(*sums);
      }
    }
    const auto* attention = std::get_if<AnyAttention>(&observation.held());
    require(attention != nullptr,
            "neither attention nor its sums are given, nor the keys that complete queries: give the layer's "
            "view as well");
    return f(*attention);
  }

  const MethodInfo* info_;
  Compressor<P, AnyExecutor> compressor_;
  std::size_t own_layer_ = 0;
};

template <class P>
class MethodOf final : public AnyMethod {
 public:
  template <class S, class T, class A>
  MethodOf(const MethodInfo& info_of, const ModelShape& model_shape, S scorer, T selector, A allocator)
      : AnyMethod(info_of, model_shape),
        plan_(model_shape, std::move(scorer), std::move(selector), std::move(allocator)) {
    reach = P::reach;
    needs = P::scorer_type::needs;
    window = plan_.scorer().window();
  }

  std::unique_ptr<AnySequence> make(AnyExecutor executor) const override {
    return std::make_unique<SequenceOf<P>>(*info, plan_, executor);
  }

 private:
  P plan_;
};

std::shared_ptr<const AnyMethod> make_any_method(const ModelShape& shape, Method method,
                                                 const MethodSettings& settings,
                                                 const AnyPlanOptions& options) {
  const auto made = [&]<class S, class T, class A>(S scorer, T selector,
                                                   A allocator) -> std::shared_ptr<const AnyMethod> {
    if constexpr (A::reach == Reach::own_layer) {
      using Budgets = SharedByEngine<A>;
      return std::make_shared<MethodOf<Plan<S, T, Budgets>>>(info(method), shape, std::move(scorer),
                                                             std::move(selector),
                                                             Budgets(std::move(allocator), options));
    } else {
      require(!options.share_rows, "method ", info(method).name,
              " shares rows out as layers arrive: it takes no share_rows");
      return std::make_shared<MethodOf<Plan<S, T, A>>>(info(method), shape, std::move(scorer),
                                                       std::move(selector), std::move(allocator));
    }
  };
  if (method == Method::full) {
    // Any method whose layers stay whole: where nothing goes nothing is scored.
    return made(score::Random{{.window = 1}}, select::GroupedTopK{},
                budget::OneOf<budget::Uniform, budget::ErrorAware, budget::Pyramid>(
                    budget::Uniform{Budget::kept_ratio(1.0)}));
  }
  return with_method(method, settings, made);
}

}  // namespace detail
}  // namespace compresskv
