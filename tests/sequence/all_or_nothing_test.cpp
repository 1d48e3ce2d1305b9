// Whatever goes wrong in a call - an allocation, the executor, a block that is shared, protected tokens that
// do not fit, scores that are NaN - the caches of all layers and the compressor are as they were, and the
// call can be made again with the outcome that it would have had.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstdint>
#include <limits>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "reference/allocations.hpp"
#include "reference/arriving_methods.hpp"
#include "reference/errors.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t layers = 3;
constexpr std::size_t kv_heads = 2;
constexpr std::size_t query_heads = 4;
constexpr std::size_t head_dim = 8;
constexpr std::size_t window = 4;
constexpr std::size_t room = 640;
constexpr std::size_t block_rows = 8;
constexpr ModelShape shape{
    .layers = layers, .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim};

/// The caches of a model as blocks of a pool, whose contents follow from layer, head and position alone.
struct Caches {
  std::vector<std::vector<float>> keys;
  std::vector<std::vector<float>> values;
  std::vector<std::vector<std::size_t>> rows;
  std::vector<std::int32_t> table;
  std::vector<std::int32_t> alone;
  std::vector<std::int32_t> shared;
  std::size_t next = 0;

  Caches()
      : keys(layers, std::vector<float>(kv_heads * room * head_dim)),
        values(keys),
        rows(layers, std::vector<std::size_t>(kv_heads, 0)),
        alone(room / block_rows, 1),
        shared(room / block_rows, 2) {
    for (std::size_t i = 0; i < room / block_rows; ++i) {
      table.push_back(static_cast<std::int32_t>(i));
    }
  }

  void append(std::size_t count) {
    for (std::size_t layer = 0; layer < layers; ++layer) {
      for (std::size_t head = 0; head < kv_heads; ++head) {
        for (std::size_t t = 0; t < count; ++t) {
          Random random((layer * kv_heads + head) * 10000 + next + t);
          const std::size_t at = (rows[layer][head]++ * kv_heads + head) * head_dim;
          for (std::size_t e = 0; e < head_dim; ++e) {
            keys[layer][at + e] = 1.5F * random.gaussian();
            values[layer][at + e] = random.gaussian();
          }
        }
      }
    }
    next += count;
  }

  PagedKv<float> view(std::size_t layer, bool in_use_elsewhere = false) {
    return {keys[layer].data(),
            values[layer].data(),
            {.kv_heads = kv_heads,
             .head_dim = head_dim,
             .block_rows = block_rows,
             .pool_blocks = room / block_rows,
             .head_rows = rows[layer]},
            table,
            layout::token_head_dim,
            in_use_elsewhere ? shared : alone};
  }

  friend bool operator==(const Caches& a, const Caches& b) {
    return a.keys == b.keys && a.values == b.values && a.rows == b.rows;
  }
};

std::vector<float> some_queries() {
  Random random(3);
  std::vector<float> queries(query_heads * room * head_dim);
  for (float& x : queries) {
    x = random.gaussian();
  }
  return queries;
}

/// All that a compressor tells.
template <class C>
std::string state(const C& compressor) {
  std::string text;
  for (const std::size_t rows : compressor.capacities()) {
    text += std::to_string(rows) + ",";
  }
  for (std::size_t l = 0; l < (compressor.capacities().empty() ? 0 : layers); ++l) {
    const Retained& kept = compressor.retained(l);
    text += "|" + std::to_string(kept.next_position()) + "/" + std::to_string(kept.bytes_freed()) + ":" +
            std::to_string(compressor.held(2 * room).rows(l, 0));
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (const std::uint32_t position : kept.positions(head)) {
        text += " " + std::to_string(position);
      }
      text += ";";
    }
  }
  return text;
}

/// Fails in its `failing`-th loop, counted from 1, before, between or after the tasks.
struct FailingExecutor {
  enum class When { before, between, after };
  struct Plan {
    std::size_t loops = 0;
    std::size_t failing = 0;
    When when = When::before;
  };
  Plan* plan = nullptr;

  template <class Task>
  void parallel_for(std::size_t count, Task&& task) {
    const bool now = ++plan->loops == plan->failing;
    if (now && plan->when == When::before) {
      throw std::runtime_error("the pool has stopped");
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (now && plan->when == When::between && i == count / 2) {
        throw std::runtime_error("the pool has stopped");
      }
      task(i);
    }
    if (now && plan->when == When::after) {
      throw std::runtime_error("the pool has stopped");
    }
  }
};

/// One sequence of calls with a method: prompt, turn, tokens taken back, a turn with protected tokens, a
/// longer prompt. `P` is the plan, `X` the executor.
template <class P, class X>
struct Calls {
  Compressor<P, X> compressor;
  Caches caches;
  const std::vector<float>* queries = nullptr;
  bool in_use_elsewhere = false;  // the blocks of all layers

  static constexpr std::size_t steps = 19;

  QueryWindow<float> observation(std::size_t layer) const {
    return {queries->data() + layer * 16,
            {.query_heads = query_heads, .queries = caches.next, .head_dim = head_dim},
            {.head = room * head_dim - 32, .query = head_dim}};
  }
  void shorten(std::size_t layer) {
    for (std::size_t head = 0; head < kv_heads; ++head) {
      caches.rows[layer][head] = compressor.retained(layer).rows(head);
    }
  }
  void layer(std::size_t l) {
    if constexpr (P::reach == Reach::own_layer) {
      compressor.compress(l, caches.view(l, in_use_elsewhere), observation(l));
      shorten(l);
    } else {
      const auto views = [&](std::size_t i) { return caches.view(i, in_use_elsewhere); };
      for (const std::size_t changed : compressor.arrive(l, views, observation(l))) {
        shorten(changed);
      }
    }
  }
  void finish() {
    if constexpr (P::reach == Reach::all_layers) {
      for (const std::size_t changed :
           compressor.finish([&](std::size_t i) { return caches.view(i, in_use_elsewhere); })) {
        shorten(changed);
      }
    }
  }

  /// What the engine does between the calls.
  void before(std::size_t step) {
    if (step == 0) {
      caches.append(300);
    } else if (step == 5) {
      caches.append(150);
    } else if (step == 11) {
      caches.append(40);
    } else if (step == 18) {
      caches = Caches();
      caches.append(550);
    }
  }
  void call(std::size_t step) {
    static const std::vector<std::uint32_t> listed{10, 100, 320, 330, 335, 340};
    switch (step) {
      case 0:
        return compressor.begin(300);
      case 1:
      case 2:
      case 3:
        return layer(step - 1);
      case 4:
      case 9:
      case 16:
        return finish();
      case 5:
        return compressor.begin_turn(450);
      case 6:
      case 7:
      case 8:
        return layer(step - 6);
      case 10: {
        const Held held = compressor.truncate(350);
        for (std::size_t l = 0; l < layers; ++l) {
          for (std::size_t head = 0; head < kv_heads; ++head) {
            caches.rows[l][head] = held.rows(l, head);
          }
        }
        caches.next = held.next_position();
        return;
      }
      case 11:
        return compressor.begin_turn(390, {.keep_first = 2, .keep_last = 6, .positions = listed});
      case 12:
      case 13:
      case 14:
        return layer(step - 12);
      case 18:
        return compressor.begin(550);
      default:
        return;
    }
  }
  void go(std::size_t step) {
    before(step);
    call(step);
  }
};

MethodSettings settings() {
  std::vector<std::vector<std::uint32_t>> ranking(layers, std::vector<std::uint32_t>{2, 0, 3, 1});
  std::vector<std::vector<double>> runs;
  for (std::size_t i = 0; i < layers * query_heads; ++i) {
    runs.push_back({static_cast<double>(i * 37 % 100) / 100.0});
  }
  MethodSettings out{.budget = Budget::kept_ratio(0.2),
                     .heads = HeadRanking(ranking),
                     .scores = HeadScores(layers, query_heads, runs),
                     .statistics = reference::query_statistics(shape),
                     .output_weights = reference::output_weights(shape),
                     .kv_scores = HeadScores(
                         layers, shape.kv_heads,
                         {runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(layers * shape.kv_heads)}),
                     .window = window};
  out.heads_per_layer = 2;
  out.model_heads = 4;
  return out;
}

template <class F>
void for_each_method(F&& f) {
  for (const MethodInfo& method : methods) {
    if (method.method != Method::full && !method.repeats) {
      SCOPED_TRACE(std::string(method.name));
      reference::with_arriving_method(method.method, settings(),
                                      [&](auto scorer, auto selector, auto allocator) {
                                        f(Plan{shape, scorer, selector, allocator});
                                      });
    }
  }
}

/// Makes `failing` calls of one step until one gets through; each that fails must leave all as it was, and
/// the sequence must then end as one in which nothing failed.
template <class R, class Try>
void expect_nothing_lost(const R& clean, const R& reached, std::size_t step, Try&& try_call) {
  for (std::size_t n = 1;; ++n) {
    R run = reached;
    run.before(step);
    const Caches before = run.caches;
    const std::string told = state(run.compressor);
    if (!try_call(run, n)) {
      return;
    }
    ASSERT_LT(n, 1000U) << "it never gets through";
    ASSERT_TRUE(run.caches == before) << "step " << step << " failure " << n << ": the cache changed";
    ASSERT_EQ(state(run.compressor), told) << "step " << step << " failure " << n;
    run.call(step);
    for (std::size_t later = step + 1; later < R::steps; ++later) {
      run.go(later);
    }
    ASSERT_TRUE(run.caches == clean.caches) << "step " << step << " failure " << n << ": another outcome";
    ASSERT_EQ(state(run.compressor), state(clean.compressor)) << "step " << step << " failure " << n;
  }
}

TEST(AllOrNothing, EveryAllocationOfEveryCallMayFail) {
  const std::vector<float> queries = some_queries();
  for_each_method([&](const auto& plan) {
    using P = std::remove_cvref_t<decltype(plan)>;
    using R = Calls<P, SerialExecutor>;
    R clean{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
    for (std::size_t step = 0; step < R::steps; ++step) {
      clean.go(step);
    }
    R reached{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
    std::size_t failures = 0;
    for (std::size_t step = 0; step < R::steps; ++step) {
      expect_nothing_lost(clean, reached, step, [&](R& run, std::size_t n) {
        reference::failing_allocation = reference::allocations + n;
        bool failed = false;
        try {
          run.call(step);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
        reference::failing_allocation = 0;
        failures += failed ? 1 : 0;
        return failed;
      });
      reached.go(step);
    }
    EXPECT_GT(failures, 10U) << "nothing was tried";
  });
}

TEST(AllOrNothing, AnExecutorMayFailInEveryLoopOfEveryCall) {
  const std::vector<float> queries = some_queries();
  using When = FailingExecutor::When;
  for_each_method([&](const auto& plan) {
    using P = std::remove_cvref_t<decltype(plan)>;
    using R = Calls<P, FailingExecutor>;
    FailingExecutor::Plan none;
    R clean{.compressor = Compressor(plan, FailingExecutor{&none}), .caches = {}, .queries = &queries};
    for (std::size_t step = 0; step < R::steps; ++step) {
      clean.go(step);
    }
    std::size_t loops = 0;
    for (const When when : {When::before, When::between, When::after}) {
      FailingExecutor::Plan failing;
      R reached{.compressor = Compressor(plan, FailingExecutor{&failing}), .caches = {}, .queries = &queries};
      for (std::size_t step = 0; step < R::steps; ++step) {
        failing = {};
        R counted = reached;
        counted.go(step);
        const std::size_t all = failing.loops;
        for (const std::size_t n :
             std::set<std::size_t>{1, 2, all / 2, all - std::min<std::size_t>(all, 1), all}) {
          if (n == 0 || n > all) {
            continue;
          }
          R run = reached;
          run.before(step);
          const Caches before = run.caches;
          const std::string told = state(run.compressor);
          failing = {.loops = 0, .failing = n, .when = when};
          bool failed = false;
          try {
            run.call(step);
          } catch (const std::runtime_error&) {
            failed = true;
          }
          failing = {};
          ++loops;
          if (failed) {
            // While scores are computed: nothing has moved.
            ASSERT_TRUE(run.caches == before) << "step " << step << " loop " << n;
            ASSERT_EQ(state(run.compressor), told) << "step " << step << " loop " << n;
            run.call(step);
          }
          // While rows move: the call has ended as if nothing had failed.
          for (std::size_t later = step + 1; later < R::steps; ++later) {
            run.go(later);
          }
          ASSERT_TRUE(run.caches == clean.caches) << "step " << step << " loop " << n;
          ASSERT_EQ(state(run.compressor), state(clean.compressor)) << "step " << step << " loop " << n;
        }
        reached.go(step);
      }
    }
    EXPECT_GT(loops, 20U) << "nothing was tried";
  });
}

TEST(AllOrNothing, KeysAreTurnedOnceWhateverTheExecutorDoes) {
  const std::vector<float> queries = some_queries();
  const Plan plan{shape, score::Tova{}, select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(40)}};
  using R = Calls<std::remove_const_t<decltype(plan)>, FailingExecutor>;
  FailingExecutor::Plan failing;
  R begun{.compressor = Compressor(plan, FailingExecutor{&failing}), .caches = {}, .queries = &queries};
  begun.go(0);
  begun.go(1);
  R clean = begun;
  clean.compressor.rerotate(0, clean.caches.view(0), {});
  ASSERT_FALSE(clean.caches == begun.caches);
  for (const auto when :
       {FailingExecutor::When::before, FailingExecutor::When::between, FailingExecutor::When::after}) {
    R run = begun;
    failing = {.loops = 0, .failing = 1, .when = when};
    EXPECT_EQ(run.compressor.rerotate(0, run.caches.view(0), {}).next_position(), 40U);
    EXPECT_EQ(failing.loops, 1U);
    failing = {};
    EXPECT_TRUE(run.caches == clean.caches);
    run.compressor.rerotate(0, run.caches.view(0), {});
    EXPECT_TRUE(run.caches == clean.caches) << "turned already";
  }
}

TEST(AllOrNothing, ABatchSaysWhichSequencesAnExecutorLeftOut) {
  const std::vector<float> queries = some_queries();
  const Plan plan{shape, score::Tova{}, select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(40)}};
  using R = Calls<std::remove_const_t<decltype(plan)>, SerialExecutor>;
  std::vector<R> runs(4, R{.compressor = Compressor(plan), .caches = {}, .queries = &queries});
  std::vector<BatchItem<Compressor<std::remove_const_t<decltype(plan)>>, PagedKv<float>, QueryWindow<float>>>
      items;
  for (R& run : runs) {
    run.go(0);
    items.push_back(BatchItem{&run.compressor, run.caches.view(0), run.observation(0)});
  }
  const Caches before = runs[0].caches;
  FailingExecutor::Plan failing{.failing = 1, .when = FailingExecutor::When::between};
  FailingExecutor executor{&failing};
  EXPECT_THROW(compress_batch(0, std::span(items), executor), std::runtime_error);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(items[i].done, i < 2);
    EXPECT_EQ(items[i].error == nullptr, i < 2);
    EXPECT_EQ(runs[i].compressor.retained(0).rows(), i < 2 ? 40U : 300U);
    EXPECT_EQ(runs[i].caches == before, i >= 2);
  }
  compress_batch(0, std::span(items).subspan(2), executor);
  EXPECT_EQ(runs[3].compressor.retained(0).rows(), 40U);
}

TEST(AllOrNothing, BlocksInUseElsewhereRefuseEveryLayerBeforeAnyMoves) {
  const std::vector<float> queries = some_queries();
  for_each_method([&](const auto& plan) {
    using P = std::remove_cvref_t<decltype(plan)>;
    using R = Calls<P, SerialExecutor>;
    R clean{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
    R run = clean;
    std::size_t refused = 0;
    for (std::size_t step = 0; step < R::steps; ++step) {
      clean.go(step);
      run.before(step);
      run.in_use_elsewhere = true;
      for (int repeat = 0; repeat < 2; ++repeat) {
        // A call that only looks on succeeds; a copy is tried, so that it is made once.
        R tried = run;
        const Caches before = tried.caches;
        const std::string told = state(tried.compressor);
        try {
          tried.call(step);
        } catch (const ArgumentError& error) {
          ++refused;
          ASSERT_NE(std::string(error.what()).find("is shared by 2 sequences"), std::string::npos);
          ASSERT_TRUE(tried.caches == before) << "step " << step;
          ASSERT_EQ(state(tried.compressor), told) << "step " << step;
          run = tried;
        }
      }
      run.in_use_elsewhere = false;
      run.call(step);
      ASSERT_TRUE(run.caches == clean.caches) << "step " << step << ": other rows after a refused call";
      ASSERT_EQ(state(run.compressor), state(clean.compressor)) << "step " << step;
    }
    EXPECT_GE(refused, 4U);
  });
}

/// Tokens of `protection` that layer 0 to `arrived` - 1 no longer hold.
template <class C>
std::size_t lost(const C& compressor, std::size_t arrived, std::span<const std::uint32_t> listed) {
  std::size_t count = 0;
  for (std::size_t l = 0; l < arrived; ++l) {
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (const std::uint32_t position : listed) {
        count += compressor.retained(l).row(position, head).has_value() ? 0U : 1U;
      }
    }
  }
  return count;
}

TEST(AllOrNothing, ACascadeKeepsWhatIsProtectedInEveryLayerOrSaysThatItCannot) {
  const std::vector<float> queries = some_queries();
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Random random(seed);
    const std::size_t mean = random.between(window + 2, 60);
    std::vector<std::uint32_t> listed;
    for (std::uint32_t position = 0; position < 290; ++position) {
      if (random.below(290) < 2 * mean / 3) {
        listed.push_back(position);
      }
    }
    const Plan plan{shape, score::Cake{{.window = window}}, select::GroupedTopK{},
                    budget::Cake{Budget::tokens_per_layer(mean)}};
    using R = Calls<std::remove_const_t<decltype(plan)>, SerialExecutor>;
    R run{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
    run.caches.append(300);
    // The lower layer looks at nothing in particular: it would lose almost all.
    std::fill(run.caches.keys[0].begin(), run.caches.keys[0].end(), 0.25F);
    run.compressor.begin(300, {.positions = listed});
    const bool fits = window + listed.size() <= mean;
    for (std::size_t l = 0; l < layers; ++l) {
      const Caches before = run.caches;
      const std::string told = state(run.compressor);
      try {
        run.layer(l);
      } catch (const ArgumentError& error) {
        EXPECT_FALSE(fits);
        EXPECT_NE(std::string(error.what()).find("protect"), std::string::npos) << error.what();
        EXPECT_TRUE(run.caches == before);
        EXPECT_EQ(state(run.compressor), told);
        break;
      }
      EXPECT_EQ(lost(run.compressor, l + 1, listed), 0U) << "of " << listed.size() << ", seed " << seed;
    }
  }
}

TEST(AllOrNothing, LayersThatWaitAreCheckedBeforeAnyMoves) {
  const std::vector<float> queries = some_queries();
  const std::vector<std::uint32_t> listed{5, 10, 15, 20, 25, 30, 35, 40};
  const HeadScores scores(layers, query_heads, std::vector<std::vector<double>>(layers * query_heads, {1.0}));
  // The least layer has room for two tokens beside the window.
  const budget::ErrorAware falling{
      LayerErrors({1.0, 0.5, 0.001}, {}), Budget::tokens_per_layer(20), {.min_rows = 6}};
  const budget::ErrorAware rising{
      LayerErrors({0.001, 0.5, 1.0}, {}), Budget::tokens_per_layer(20), {.min_rows = 6}};
  const auto check = [&](const auto& plan, std::size_t refused_at) {
    using R = Calls<std::remove_cvref_t<decltype(plan)>, SerialExecutor>;
    R run{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
    run.caches.append(300);
    run.compressor.begin(300, {.positions = listed});
    for (std::size_t l = 0; l < refused_at; ++l) {
      run.layer(l);
    }
    const Caches before = run.caches;
    const std::string told = state(run.compressor);
    for (int repeat = 0; repeat < 2; ++repeat) {
      expect_error<ArgumentError>([&] { refused_at == layers ? run.finish() : run.layer(refused_at); },
                                  {"has room for 2 tokens beside the window", "8 are protected"});
      EXPECT_TRUE(run.caches == before);
      EXPECT_EQ(state(run.compressor), told);
    }
  };
  check(Plan{shape, score::Carried{scores, {.heads_per_layer = 1, .hold_layers = 2, .window = window}},
             select::SharedTopK{}, rising},
        2);
  check(Plan{shape, score::ModelWide{scores, {.heads = 2, .window = window}}, select::SharedTopK{}, falling},
        layers);
}

TEST(AllOrNothing, RowsOfALayerThatMayShrinkAgainAreLeftAlone) {
  const std::vector<float> queries = some_queries();
  const Plan plan{shape, score::Cake{{.window = window}}, select::GroupedTopK{},
                  budget::Cake{Budget::tokens_per_layer(40)}};
  using R = Calls<std::remove_const_t<decltype(plan)>, SerialExecutor>;
  R run{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
  run.go(0);
  run.go(1);
  const Selection some = Selection::shared_by_heads(Rows{0, 5, 9});
  expect_error<ArgumentError>([&] { run.compressor.compact(0, run.caches.view(0), some); },
                              {"layer 0 may shrink again", "after the last one"});
  Caches other = run.caches;
  expect_error<ArgumentError>([&] { run.compressor.gather(0, run.caches.view(0), some, other.view(0)); },
                              {"layer 0 may shrink again"});
  run.go(2);
  run.go(3);
  run.compressor.compact(0, run.caches.view(0), some);
  EXPECT_EQ(run.compressor.retained(0).rows(), 3U);
}

TEST(AllOrNothing, TruncatingEndsATurnThatIsUnderWay) {
  const std::vector<float> queries = some_queries();
  const auto plan = Plan{shape, score::Cake{{.window = window}}, select::GroupedTopK{},
                         budget::Cake{Budget::tokens_per_layer(40)}};
  using R = Calls<std::remove_const_t<decltype(plan)>, SerialExecutor>;
  R run{.compressor = Compressor(plan), .caches = {}, .queries = &queries};
  run.go(0);
  run.go(1);
  const Held held = run.compressor.truncate(200);
  for (std::size_t l = 0; l < layers; ++l) {
    for (std::size_t head = 0; head < kv_heads; ++head) {
      run.caches.rows[l][head] = held.rows(l, head);
    }
  }
  run.caches.next = 200;
  expect_error<ArgumentError>([&] { run.layer(1); }, {"begin_turn()"});
  run.compressor.begin_turn(200);
  for (std::size_t l = 0; l < layers; ++l) {
    run.layer(l);
  }
  EXPECT_EQ(run.compressor.capacities()[0] + run.compressor.capacities()[1] + run.compressor.capacities()[2],
            3 * 40U);
}

}  // namespace
}  // namespace compresskv
