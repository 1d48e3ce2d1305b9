// The table of methods: each row composes, keeps its budget, and stands in docs/methods.md.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/hidden_states.hpp"
#include "reference/layer_case.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;

constexpr std::size_t layers = 4;
const ModelShape shape{.layers = layers, .query_heads = 6, .kv_heads = 3, .head_dim = 16};

MethodSettings settings_of(std::size_t rows) {
  return {.budget = Budget::tokens_per_layer(rows),
          .heads = HeadRanking{std::vector<std::vector<std::uint32_t>>(layers, {5, 0, 2, 3})},
          .scores = HeadScores(layers, 6, std::vector<std::vector<double>>(layers * 6, {0.5})),
          .statistics = reference::query_statistics(shape),
          .output_weights = reference::output_weights(shape),
          .kv_scores = HeadScores(layers, 3, std::vector<std::vector<double>>(layers * 3, {0.5})),
          .surrogate = reference::surrogate(shape, 20),
          .window = 8,
          .lag = 16};
}

TEST(Methods, WindowAndPoolingAreTheMethodsOwnWhereNothingIsSaid) {
  MethodSettings settings = settings_of(40);
  for (const MethodInfo& row : methods) {
    if (row.method == Method::full) {
      continue;
    }
    settings.window.reset();
    with_method(row.method, settings, [&](const auto& scorer, const auto&, const auto&) {
      EXPECT_EQ(scorer.window(), row.window) << row.name;
    });
    settings.window = 12;
    with_method(row.method, settings, [&](const auto& scorer, const auto&, const auto&) {
      EXPECT_EQ(scorer.window(), row.method == Method::tova ? 1U : 12U) << row.name;
    });
  }
  settings.window.reset();
  settings.score_threshold = -4.0F;
  with_method(Method::kvzap, settings, [&](const auto& scorer, const auto&, const auto&) {
    EXPECT_EQ(scorer.window(), score::KvZapOptions{}.window);
  });
  const score::Blend::Options blend;
  EXPECT_EQ(blend.window, info(Method::blend).window);
  EXPECT_EQ(blend.pool, info(Method::blend).pool);
  EXPECT_EQ(blend.pool_width, info(Method::blend).pool_width);
  const MethodSettings library;
  EXPECT_EQ(blend.shares.sinks, library.sinks);
  EXPECT_EQ(blend.shares.model_share, library.model_share);
  EXPECT_EQ(score::LagKv::Options{}.sinks, library.sinks);
  EXPECT_EQ(score::LagKv::Options{}.lag, library.lag);
  EXPECT_EQ(score::Cur::Options{}.sinks, library.sinks);
  EXPECT_EQ(score::Cur::Options{}.block, library.block);
  EXPECT_EQ(score::ChunkKvOptions{}.chunk, library.chunk);
  EXPECT_EQ(score::RKvOptions{}.lambda, library.lambda);
  EXPECT_EQ(score::RKvOptions{}.threshold, library.threshold);
  EXPECT_EQ(score::DuoAttention::Options{}.sinks, library.head_sinks);
  EXPECT_EQ(score::DuoAttention::Options{}.recent, library.head_recent);
  EXPECT_EQ(budget::WholeHeads::default_least, library.head_sinks + library.head_recent);
}

/// Rows kept over all layers and KV heads of a model of equal layers.
std::size_t rows_kept(Method method, const MethodSettings& settings, std::size_t tokens) {
  const Layer<float> layer(
      {.group = 2, .kv_heads = 3, .head_dim = 16, .rows = tokens + 8, .extra_queries = tokens - 8});
  std::vector<Layer<float>> model(layers, layer);
  const reference::Hidden<float> hidden(tokens, 20, 0, 9);
  std::size_t kept = 0;
  with_method(method, settings, [&](const auto& scorer, const auto& selector, const auto& allocator) {
    const Plan plan{shape, scorer, selector, allocator};
    Compressor compressor{plan};
    compressor.begin(tokens);
    std::vector<std::vector<std::size_t>> rows(layers, std::vector<std::size_t>(3, tokens));
    const auto view = [&](std::size_t l) {
      KvShape now = model[l].cache.shape;
      now.head_rows = rows[l];
      return StridedKv<float>(model[l].cache.keys.data(), model[l].cache.values.data(), now,
                              model[l].cache.strides);
    };
    for (std::size_t l = 0; l < layers; ++l) {
      if constexpr (std::remove_cvref_t<decltype(scorer)>::needs == Needs::repeats) {
        // Eight tokens repeat all.
        const std::vector<std::size_t> more(3, tokens + 8);
        KvShape repeated = model[l].cache.shape;
        repeated.head_rows = more;
        compressor.observe(l,
                           StridedKv<float>(model[l].cache.keys.data(), model[l].cache.values.data(),
                                            repeated, model[l].cache.strides),
                           {.first = 0, .last = tokens},
                           QueryWindow<float>(model[l].queries.data(),
                                              QueryShape{.query_heads = 6, .queries = 8, .head_dim = 16}),
                           std::vector<float>(8, 2.0F));
      } else if constexpr (std::remove_cvref_t<decltype(scorer)>::needs == Needs::hidden_states) {
        compressor.compress(l, view(l), hidden.shown());
      } else if constexpr (std::remove_cvref_t<decltype(plan)>::reach == Reach::own_layer) {
        compressor.compress(l, view(l), model[l].observation());
      } else {
        for (const std::size_t changed : compressor.arrive(l, view, model[l].observation())) {
          for (std::size_t head = 0; head < 3; ++head) {
            rows[changed][head] = compressor.retained(changed).rows(head);
          }
        }
      }
    }
    if constexpr (std::remove_cvref_t<decltype(plan)>::reach == Reach::all_layers) {
      EXPECT_EQ(compressor.finish(view).size(), layers);
    }
    for (std::size_t l = 0; l < layers; ++l) {
      for (std::size_t head = 0; head < 3; ++head) {
        kept += compressor.retained(l).rows(head);
      }
    }
  });
  return kept;
}

TEST(Methods, HonourTheSameTotalExactly) {
  for (const MethodInfo& row : methods) {
    if (row.method == Method::full) {
      continue;
    }
    for (const std::size_t tokens : {9U, 40U, 200U}) {
      for (const std::size_t budget : {8U, 9U, 30U, 150U}) {
        SCOPED_TRACE(testing::Message() << row.name << " S " << tokens << " p " << budget);
        EXPECT_EQ(rows_kept(row.method, settings_of(budget), tokens),
                  std::min<std::size_t>(tokens, budget) * layers * 3);
      }
    }
  }
}

TEST(Methods, TakeErrorAwareBudgets) {
  MethodSettings settings = settings_of(40);
  settings.errors = LayerErrors({0.7, 0.1, 0.1, 0.1}, {});
  for (const MethodInfo& row : methods) {
    if (row.method != Method::full) {
      SCOPED_TRACE(row.name);
      EXPECT_EQ(rows_kept(row.method, settings, 200), 40U * layers * 3);
    }
  }
}

TEST(Methods, HaveNamesOfTheirOwn) {
  std::set<std::string_view> names;
  for (const MethodInfo& row : methods) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    EXPECT_EQ(&method_named(row.name), &row);
    EXPECT_EQ(&info(row.method), &row);
    EXPECT_FALSE(row.summary.empty());
  }
  expect_error<ArgumentError>([] { method_named("snap"); },
                              {"method is 'snap'", "must be one of full, compresskv, ", "snapkv", "random"});
}

TEST(Methods, SayWhatTheyMiss) {
  const auto nothing = [](const auto&...) {};
  expect_error<ArgumentError>([&] { with_method(Method::full, {}, nothing); }, {"full keeps every row"});
  for (const MethodInfo& row : methods) {
    if (row.needs_heads) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs a head ranking"});
    }
    if (row.needs_scores) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs raw head scores"});
    }
    if (row.needs_kv_scores) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs scores of KV heads"});
    }
    if (row.needs_statistics) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs query statistics"});
    }
    if (row.needs_outputs) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs output weights"});
    }
    if (row.needs_surrogate) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs a surrogate"});
    }
  }
}

/// What a method is made from reaches its scorer.
TEST(Methods, TakeOptionsOfTheirOwn) {
  MethodSettings settings = settings_of(40);
  settings.sinks = 7;
  settings.block = 3;
  settings.chunk = 11;
  settings.lag = 1;
  settings.lambda = 0.25F;
  settings.threshold = 0.75F;
  settings.head_sinks = 5;
  settings.head_recent = 9;
  const auto look = [](const auto& scorer, const auto&, const auto&) {
    if constexpr (requires { scorer.options().recent; }) {
      EXPECT_EQ(scorer.options().sinks, 5U);
      EXPECT_EQ(scorer.options().recent, 9U);
    } else if constexpr (requires { scorer.options().block; }) {
      EXPECT_EQ(scorer.options().block, 3U);
      EXPECT_EQ(scorer.options().sinks, 7U);
    } else if constexpr (requires { scorer.options().chunk; }) {
      EXPECT_EQ(scorer.options().chunk, 11U);
      EXPECT_EQ(scorer.scorer().options().window, 8U);
    } else if constexpr (requires { scorer.options().lag; }) {
      EXPECT_EQ(scorer.options().lag, 33U);
      EXPECT_EQ(scorer.options().sinks, 7U);
    } else if constexpr (requires { scorer.options().lambda; }) {
      EXPECT_EQ(scorer.options().lambda, 0.25F);
      EXPECT_EQ(scorer.options().threshold, 0.75F);
    } else {
      ADD_FAILURE() << "another scorer";
    }
  };
  expect_error<ArgumentError>([&] { with_method(Method::lagkv, settings, look); },
                              {"lag is 1", "at least 2"});
  settings.lag = 33;
  for (const Method method : {Method::lagkv, Method::cur, Method::chunkkv, Method::rkv, Method::duoattention,
                              Method::kvzip_heads}) {
    with_method(method, settings, look);
  }
  settings.block = 0;
  expect_error<ArgumentError>([&] { with_method(Method::cur, settings, look); }, {"block is 0"});
  settings.chunk = 0;
  expect_error<ArgumentError>([&] { with_method(Method::chunkkv, settings, look); }, {"chunk is 0"});
}

TEST(Methods, AThresholdLeavesTheBudgetAsTheMost) {
  MethodSettings settings = settings_of(40);
  settings.score_threshold = -1e6F;
  EXPECT_EQ(rows_kept(Method::kvzap, settings, 200), 40U * layers * 3);
  settings.score_threshold = 1e6F;
  EXPECT_EQ(rows_kept(Method::kvzap, settings, 200), (8U + 4U) * layers * 3) << "the window and the sinks";
  settings.budget = Budget::kept_ratio(1.0);
  settings.score_threshold = -4.0F;
  const std::size_t kept = rows_kept(Method::kvzap, settings, 200);
  EXPECT_GT(kept, 40U * layers * 3);
  EXPECT_LT(kept, 160U * layers * 3);
  settings.score_threshold = std::numeric_limits<float>::infinity();
  expect_error<ArgumentError>([&] { with_method(Method::kvzap, settings, [](const auto&...) {}); },
                              {"threshold is inf"});
}

/// As the guide's table says it.
template <class S>
std::string shown_to() {
  std::string more;
  if constexpr (reads_values<S>) {
    more += ", values";
  }
  if constexpr (requires { requires S::needs_hidden_norms; }) {
    more += ", lengths of hidden states";
  }
  switch (S::needs) {
    case Needs::nothing:
      return "| no | nothing" + more + " |";
    case Needs::keys:
      return "| no | keys" + more + " |";
    case Needs::keys_and_values:
      return "| no | keys, values |";
    case Needs::window_attention:
    case Needs::window_queries:
      return "| yes | the window's queries and keys" + more + " |";
    case Needs::all_queries:
      return "| yes | all queries and keys" + more + " |";
    case Needs::repeats:
      return "| no | queries of the context fed once more, keys" + more + " |";
    case Needs::hidden_states:
      return "| no | hidden states |";
  }
  return "";
}

TEST(Methods, StandInTheGuide) {
  std::ifstream file(COMPRESSKV_METHODS_PAGE);
  const std::string page{std::istreambuf_iterator<char>(file), {}};
  ASSERT_FALSE(page.empty());
  for (const MethodInfo& row : methods) {
    EXPECT_NE(page.find("| `" + std::string(row.name) + "` | " + std::string(row.summary) + " |"),
              std::string::npos)
        << row.name << ": give it a row in docs/methods.md";
    if (row.method != Method::full) {
      const std::size_t begin = page.find("| `" + std::string(row.name) + "` | ");
      const std::string line = page.substr(begin, page.find('\n', begin) - begin);
      with_method(row.method, settings_of(40), [&](const auto& scorer, const auto&, const auto&) {
        const std::string shown = shown_to<std::remove_cvref_t<decltype(scorer)>>();
        EXPECT_NE(line.find(shown), std::string::npos) << row.name << " has no " << shown;
      });
    }
    if (!row.paper.empty()) {
      EXPECT_NE(page.find("arxiv.org/abs/" + std::string(row.paper)), std::string::npos) << row.name;
    }
  }
}

}  // namespace
}  // namespace compresskv
