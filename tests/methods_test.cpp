// The table of methods: each row composes, keeps its budget, and stands in docs/methods.md.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <fstream>
#include <iterator>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layer_case.hpp"
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
          .window = 8};
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
  const score::Blend::Options blend;
  EXPECT_EQ(blend.window, info(Method::blend).window);
  EXPECT_EQ(blend.pool, info(Method::blend).pool);
  EXPECT_EQ(blend.pool_width, info(Method::blend).pool_width);
  const MethodSettings library;
  EXPECT_EQ(blend.shares.sinks, library.sinks);
  EXPECT_EQ(blend.shares.model_share, library.model_share);
}

/// Rows kept over all layers and KV heads of a model of equal layers.
std::size_t rows_kept(Method method, const MethodSettings& settings, std::size_t tokens) {
  const Layer<float> layer(
      {.group = 2, .kv_heads = 3, .head_dim = 16, .rows = tokens, .extra_queries = tokens - 8});
  std::vector<Layer<float>> model(layers, layer);
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
      if constexpr (std::remove_cvref_t<decltype(plan)>::reach == Reach::own_layer) {
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
    if (row.needs_statistics) {
      expect_error<ArgumentError>([&] { with_method(row.method, {}, nothing); },
                                  {"method " + std::string(row.name), "needs query statistics"});
    }
  }
}

TEST(Methods, StandInTheGuide) {
  std::ifstream file(COMPRESSKV_METHODS_PAGE);
  const std::string page{std::istreambuf_iterator<char>(file), {}};
  ASSERT_FALSE(page.empty());
  for (const MethodInfo& row : methods) {
    EXPECT_NE(page.find("| `" + std::string(row.name) + "` | " + std::string(row.summary) + " |"),
              std::string::npos)
        << row.name << ": give it a row in docs/methods.md";
    if (!row.paper.empty()) {
      EXPECT_NE(page.find("arxiv.org/abs/" + std::string(row.paper)), std::string::npos) << row.name;
    }
  }
}

}  // namespace
}  // namespace compresskv
