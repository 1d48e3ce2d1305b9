#include "compress.hpp"

#include <algorithm>
#include <compresskv/compressor.hpp>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <utility>

#include "run.hpp"

namespace ckv {
namespace {

using compresskv::ModelShape;

/// Budgets of a prompt that is compressed while it is being read: as long as it is not whole, every layer may
/// keep `working_rows`; then `A` shares out the user's budget, which must not exceed them.
template <compresskv::budget::Allocator A>
class WhileReading {
 public:
  static constexpr compresskv::Reach reach = A::reach;

  WhileReading(A whole, std::size_t working_rows, std::size_t prompt_tokens)
      : whole_(std::move(whole)), working_rows_(working_rows), prompt_tokens_(prompt_tokens) {}

  const compresskv::Budget& budget() const { return whole_.budget(); }
  void validate(const ModelShape& shape) const { whole_.validate(shape); }
  void allocate(const compresskv::budget::Allowance& allowance, std::span<std::size_t> capacities) const {
    if (working_rows_ > 0 && allowance.tokens < prompt_tokens_) {
      std::fill(capacities.begin(), capacities.end(), std::min(working_rows_, allowance.tokens));
      return;
    }
    whole_.allocate(allowance, capacities);
    if (working_rows_ > 0) {
      level(capacities);
    }
  }

 private:
  /// A layer that in the end kept more than while reading would take the whole cache above its bound: what it
  /// has over goes to the others, a row each in turn.
  void level(std::span<std::size_t> capacities) const {
    const std::size_t total = std::accumulate(capacities.begin(), capacities.end(), std::size_t{0});
    for (std::size_t& rows : capacities) {
      rows = std::min(rows, working_rows_);
    }
    compresskv::budget::walk_to_total(
        capacities, total, [](std::size_t) { return std::size_t{0}; },
        [&](std::size_t) { return working_rows_; });
  }

  A whole_;
  std::size_t working_rows_;
  std::size_t prompt_tokens_;
};

template <class S, class T, class A>
class Compressing : public PromptCompressor {
 public:
  Compressing(const ModelShape& shape, S scorer, T selector, A allocator, engine::ThreadPool& pool)
      : plan_(shape, std::move(scorer), std::move(selector), std::move(allocator)),
        compressor_(plan_, engine::PoolExecutor{&pool}) {}

  void begin(std::size_t prompt_tokens) override { compressor_.begin(prompt_tokens); }
  void begin_turn(std::size_t total_tokens) override { compressor_.begin_turn(total_tokens); }

  void compress(engine::LayerView& layer, const Observed& observed) override {
    engine::with_kv_type(layer.type, [&]<typename E>(E*) {
      if constexpr (S::needs == compresskv::Needs::all_queries) {
        if (observed.sums != nullptr) {
          shrink<E>(layer, *observed.sums);
          return;
        }
      }
      shrink<E>(layer, observed.queries);
    });
  }

  const compresskv::Retained& retained(std::size_t layer) const override {
    return compressor_.retained(layer);
  }

 private:
  using P = compresskv::Plan<S, T, A>;

  template <typename E, class O>
  void shrink(engine::LayerView& layer, const O& observation) {
    const auto index = static_cast<std::size_t>(layer.layer);
    if constexpr (P::reach == compresskv::Reach::own_layer) {
      compressor_.compress(index, view_of<E>(layer), observation);
      give_back(layer, compressor_.retained(index));
    } else {
      const auto layer_at = [&](std::size_t l) -> engine::LayerView& {
        return l == index ? layer : layer.earlier(static_cast<int>(l));
      };
      const auto views = [&](std::size_t l) { return view_of<E>(layer_at(l)); };
      for (const std::size_t changed : compressor_.arrive(index, views, observation)) {
        give_back(layer_at(changed), compressor_.retained(changed));
      }
      if constexpr (P::reach == compresskv::Reach::all_layers) {
        if (index + 1 == plan_.shape().layers) {
          for (const std::size_t changed : compressor_.finish(views)) {
            give_back(layer_at(changed), compressor_.retained(changed));
          }
        }
      }
    }
  }

  P plan_;
  compresskv::Compressor<P, engine::PoolExecutor> compressor_;
};

}  // namespace

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

std::unique_ptr<PromptCompressor> make_compressor(const Compression& how, const ModelShape& shape,
                                                  engine::ThreadPool& pool, std::size_t prompt_tokens) {
  const compresskv::MethodSettings settings{.budget = how.budget.value(),
                                            .heads = how.heads,
                                            .scores = how.scores,
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
                                            .equal_weights = how.equal_weights};
  return compresskv::with_method(
      how.method, settings,
      [&]<class S, class T, class A>(const S& scorer, const T& selector,
                                     const A& allocator) -> std::unique_ptr<PromptCompressor> {
        if constexpr (A::reach == compresskv::Reach::own_layer) {
          using Budgets = WhileReading<A>;
          return std::make_unique<Compressing<S, T, Budgets>>(
              shape, scorer, selector, Budgets{allocator, how.working_rows, prompt_tokens}, pool);
        } else {
          return std::make_unique<Compressing<S, T, A>>(shape, scorer, selector, allocator, pool);
        }
      });
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
