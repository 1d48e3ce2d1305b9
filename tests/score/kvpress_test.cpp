// Our methods beside those of PyPI kvpress on the same tensors, as tools/compare_kvpress.py recorded them.
// Where they differ on purpose (docs/methods.md), the difference is undone here.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <compresskv/calibrate/query_statistics_accumulator.hpp>
#include <compresskv/compresskv.hpp>
#include <compresskv/core/executor.hpp>
#include <compresskv/core/workspace.hpp>
#include <compresskv/methods.hpp>
#include <cstdint>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reference/arriving_methods.hpp"
#include "reference/scores.hpp"

namespace compresskv {
namespace {

using Rows = std::vector<std::uint32_t>;

std::vector<float> floats_of(const std::string& hex) {
  std::vector<float> values;
  for (std::size_t at = 0; at < hex.size(); at += 8) {
    std::uint32_t bits = 0;
    for (std::size_t byte = 4; byte-- > 0;) {  // the lowest comes first
      bits = bits << 8U | static_cast<std::uint32_t>(std::stoul(hex.substr(at + 2 * byte, 2), nullptr, 16));
    }
    values.push_back(std::bit_cast<float>(bits));
  }
  return values;
}

/// What one of our methods makes of the recorded tensors.
struct Ours {
  std::vector<std::vector<float>> scores;
  std::vector<Rows> rows;  // of each KV head
};

class Kvpress : public testing::Test {
 protected:
  Kvpress() {
    std::ifstream file(std::string(COMPRESSKV_TEST_DATA_DIR) + "/kvpress_scores.json");
    recorded_ = nlohmann::json::parse(file);
    const auto number = [&](const char* name) { return recorded_.at(name).get<std::size_t>(); };
    shape_ = {.layers = 1,
              .query_heads = number("query_heads"),
              .kv_heads = number("kv_heads"),
              .head_dim = number("head_dim")};
    tokens_ = number("tokens");
    window_ = number("window");
    capacity_ = number("capacity");
    lag_ = number("lag");
    chunk_ = number("chunk");
    keys_ = floats_of(recorded_.at("keys").get<std::string>());
    values_ = floats_of(recorded_.at("values").get<std::string>());
    queries_ = floats_of(recorded_.at("queries").get<std::string>());
  }

  StridedKv<float> view() {
    return {keys_.data(),
            values_.data(),
            {.kv_heads = shape_.kv_heads, .rows = tokens_, .head_dim = shape_.head_dim},
            layout::head_token_dim};
  }

  /// The last queries.
  QueryWindow<float> shown(std::size_t count) const {
    return {queries_.data() + (tokens_ - count) * shape_.head_dim,
            {.query_heads = shape_.query_heads, .queries = count, .head_dim = shape_.head_dim},
            {.head = tokens_ * shape_.head_dim, .query = shape_.head_dim}};
  }

  /// Those that kvpress took of the queries before rotary embedding: the ones shown, but twice the last
  /// element, from token 4 on.
  QueryStatistics statistics() const {
    calibrate::QueryStatisticsAccumulator accumulator(1, shape_.query_heads, shape_.head_dim, {});
    for (std::size_t head = 0; head < shape_.query_heads; ++head) {
      for (std::size_t t = 4; t < tokens_; ++t) {
        const auto shown =
            std::span(queries_).subspan((head * tokens_ + t) * shape_.head_dim, shape_.head_dim);
        std::vector<float> query(shown.begin(), shown.end());
        query.back() *= 2.0F;
        accumulator.add_plain(0, head, query);
      }
    }
    return accumulator.statistics();
  }

  template <class Scorer, class Selector>
  Ours ours_of(const Scorer& scorer, const Selector& selector) {
    Ours out;
    const Plan plan{shape_, scorer, selector, budget::Uniform{Budget::tokens_per_layer(capacity_)}};
    Compressor compressor{plan};
    compressor.begin(tokens_);
    const auto scores = compressor.score(0, view(), shown(tokens_));
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      out.scores.emplace_back(scores.row(row).begin(), scores.row(row).end());
    }
    const Selection& selection = compressor.select(0, scores);
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      out.rows.emplace_back(selection.rows(head).begin(), selection.rows(head).end());
    }
    return out;
  }

  Ours ours(Method method) {
    Ours out;
    const MethodSettings settings{.budget = Budget::tokens_per_layer(capacity_),
                                  .statistics = statistics(),
                                  .window = window_,
                                  .pool_width = recorded_.at("pool_width").get<std::size_t>(),
                                  .lag = lag_,
                                  .chunk = chunk_};
    reference::with_arriving_method(
        method, settings, [&](const auto& scorer, const auto& selector, const auto& /*uniform*/) {
          if constexpr (std::remove_cvref_t<decltype(scorer)>::reach == Reach::own_layer) {
            out = ours_of(scorer, selector);
          }
        });
    return out;
  }

  std::vector<std::vector<double>> their_scores(std::string_view name) const {
    return recorded_.at("scores").at(std::string(name)).get<std::vector<std::vector<double>>>();
  }
  std::vector<Rows> their_rows(Method method) const {
    return recorded_.at("rows").at(std::string(info(method).name)).get<std::vector<Rows>>();
  }

  /// `undo(score, token)` makes of kvpress's score what ours should be. Both sides work in float32, kvpress
  /// in another order, so that some roundings of a relative 6e-8 add up: 1e-5 is far above those, and far
  /// below what another pooling, scale or mean would change.
  template <class Undo>
  void expect_scores(Method method, Undo&& undo, double absolute = 0.0) {
    expect_scores(ours(method).scores, info(method).name, undo, absolute);
  }
  template <class Undo>
  void expect_scores(const std::vector<std::vector<float>>& own, std::string_view name, Undo&& undo,
                     double absolute = 0.0) const {
    const auto theirs = their_scores(name);
    ASSERT_GT(own.size(), 0U);
    for (std::size_t row = 0; row < own.size(); ++row) {
      ASSERT_GT(own[row].size(), 0U);
      ASSERT_LE(own[row].size(), theirs[row].size());
      for (std::size_t t = 0; t < own[row].size(); ++t) {
        const double expected = undo(theirs[row][t], t);
        EXPECT_NEAR(static_cast<double>(own[row][t]), expected, 1e-5 * std::abs(expected) + absolute)
            << name << " row " << row << " token " << t;
      }
    }
  }

  /// The window and the best of the rest by kvpress's scores: what ours keeps where kvpress spares no window.
  void expect_window_and_best(Method method) {
    const Ours own = ours(method);
    const auto theirs = their_scores(info(method).name);
    for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
      std::vector<double> evictable(theirs[head].begin(),
                                    theirs[head].end() - static_cast<std::ptrdiff_t>(window_));
      EXPECT_EQ(own.rows[head], reference::rows_to_keep(evictable, window_, capacity_)) << head;
    }
  }

  nlohmann::json recorded_;
  ModelShape shape_;
  std::size_t tokens_ = 0;
  std::size_t window_ = 0;
  std::size_t capacity_ = 0;
  std::size_t lag_ = 0;
  std::size_t chunk_ = 0;
  std::vector<float> keys_;
  std::vector<float> values_;
  std::vector<float> queries_;
};

TEST_F(Kvpress, SnapKvSumsWhereItTakesTheMean) {
  expect_scores(Method::snapkv,
                [&](double score, std::size_t) { return score * static_cast<double>(window_); });
  EXPECT_EQ(ours(Method::snapkv).rows, their_rows(Method::snapkv));
}

TEST_F(Kvpress, TovaIsTheSame) {
  expect_scores(Method::tova, [](double score, std::size_t) { return score; });
  EXPECT_EQ(ours(Method::tova).rows, their_rows(Method::tova));
}

TEST_F(Kvpress, KnormAndKeyDiffKeepTheWindowBesides) {
  const auto same = [](double score, std::size_t) { return score; };
  expect_scores(Method::knorm, same);
  expect_window_and_best(Method::knorm);
  expect_scores(Method::keydiff, same, 1e-6);  // a cosine may be as near to 0 as it likes
  expect_window_and_best(Method::keydiff);
}

TEST_F(Kvpress, H2OIsNotDividedByTheQueriesThatSawAToken) {
  expect_scores(Method::h2o,
                [&](double mean, std::size_t token) { return mean * static_cast<double>(tokens_ - token); });
}

TEST_F(Kvpress, StreamingLlmKeepsTheSameRows) {
  EXPECT_EQ(ours(Method::streaming).rows, their_rows(Method::streaming));
}

TEST_F(Kvpress, AdaKvKeepsTheSameRowsWithTheSameSafeguard) {
  const auto rows = ours(Method::adakv).rows;
  EXPECT_EQ(rows, their_rows(Method::adakv));
  EXPECT_NE(rows[0].size(), rows[1].size()) << "a case in which heads differ";
}

TEST_F(Kvpress, LagKvRanksAlikeInEveryStretch) {
  const std::size_t sinks = 4;
  // The window reaches into the last stretch that has a next one, so that one is not ranked.
  const std::size_t tail = sinks + (tokens_ - window_ - sinks) / lag_ * lag_;
  ASSERT_EQ(tail, tokens_ - window_);
  const auto above = [&](double score, std::size_t t) {
    return t < sinks ? 2.0 : score;  // of no row of the tail that is evictable
  };
  expect_scores(Method::lagkv, above);
  // The same with stretches that compete.
  const auto own = ours_of(score::LagKv{{.sinks = sinks, .lag = lag_, .ranked = false, .window = window_}},
                           select::GroupedTopK{});
  expect_scores(own.scores, "lagkv-cross", above);
}

TEST_F(Kvpress, CurKeepsTheWindowBesides) {
  expect_scores(Method::cur, [](double score, std::size_t) { return score; });
  expect_window_and_best(Method::cur);
}

TEST_F(Kvpress, ChunkKvIsTheSameWithOneSetForAllHeads) {
  ASSERT_EQ(window_ % chunk_, 0U);  // kvpress then keeps the window as chunks
  const score::SnapKv snap{{.window = window_, .pool_width = 5}};
  EXPECT_EQ(ours_of(score::HeadMean{score::ChunkKv{snap, {.chunk = chunk_}}}, select::SharedTopK{}).rows,
            their_rows(Method::chunkkv));
}

TEST_F(Kvpress, ExpectedAttentionIsTheSameByTheSameStatistics) {
  expect_scores(Method::expected_attention, [](double score, std::size_t t) {
    return t < 4 ? static_cast<double>((std::numeric_limits<float>::max)() / 2) : score;
  });
  expect_window_and_best(Method::expected_attention);
  // Recorded with the window above all others.
  const auto rows = ours(Method::expected_attention_adaptive).rows;
  EXPECT_EQ(rows, their_rows(Method::expected_attention_adaptive));
  EXPECT_NE(rows[0].size(), rows[1].size()) << "a case in which heads differ";
}

TEST_F(Kvpress, QFilterIsTheSameByTheMainDirectionOfTheSameQueries) {
  expect_scores(
      Method::q_filter, [](double score, std::size_t) { return score; }, 1e-5);  // may be near to 0
  expect_window_and_best(Method::q_filter);
}

TEST_F(Kvpress, KvZipIsTheSameWhereTheLastQuarterRepeatsTheOthers) {
  const std::size_t fed = tokens_ / 4;
  const std::vector<std::size_t> rows(shape_.kv_heads, tokens_);
  const auto kv = view();
  const auto queries = shown(fed);
  const Retained all;
  const kernel::LayerInput<StridedKv<float>, QueryWindow<float>> in{.shape = shape_,
                                                                    .layer = 0,
                                                                    .rows = rows,
                                                                    .window = fed,
                                                                    .retained = all,
                                                                    .kv = kv,
                                                                    .observation = queries};
  const std::size_t context = tokens_ - fed;
  std::vector<float> memory(shape_.kv_heads * context);
  std::vector<std::size_t> ends;
  for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
    ends.push_back((head + 1) * context);
  }
  const std::vector<std::size_t> windows(shape_.kv_heads, fed);
  const Scores<Granularity::kv_head> scores(memory, ends, windows);
  Workspace workspace;
  SerialExecutor executor;
  score::KvZip{}.score(in, workspace, executor, scores);
  std::vector<std::vector<float>> own;
  for (std::size_t head = 0; head < shape_.kv_heads; ++head) {
    own.emplace_back(scores.row(head).begin(), scores.row(head).end());
  }
  expect_scores(own, "kvzip", [](double score, std::size_t) { return score; });
}

TEST_F(Kvpress, PyramidsAreTheirsWithTheWindowOnTop) {
  for (const auto& row : recorded_.at("pyramids")) {
    const auto number = [&](const char* name) { return row.at(name).get<std::size_t>(); };
    const auto theirs = row.at("budgets").get<std::vector<std::size_t>>();
    const std::size_t rows = number("rows");
    const std::size_t window = number("window");
    SCOPED_TRACE(testing::Message() << "L " << theirs.size() << " p " << rows << " w " << window);
    const auto ours_of = [&](std::size_t per_layer) {
      std::vector<std::size_t> capacities(theirs.size());
      budget::Pyramid{Budget::tokens_per_layer(per_layer)}.allocate(
          {.per_layer = per_layer, .window = window, .tokens = number("tokens")}, capacities);
      EXPECT_EQ(std::accumulate(capacities.begin(), capacities.end(), std::size_t{0}),
                per_layer * theirs.size());
      return capacities;
    };
    const auto plain = ours_of(rows);
    EXPECT_GT(plain.front(), plain.back());
    if (theirs.front() == theirs.back()) {
      EXPECT_LT(plain.back(), 2 * window) << "kvpress falls back to flat budgets where one would be below w";
      continue;
    }
    const auto with_window = ours_of(rows + window);
    for (std::size_t layer = 0; layer < theirs.size(); ++layer) {
      // Ours are moved to the total, by a row a layer.
      EXPECT_NEAR(static_cast<double>(with_window[layer] - window), static_cast<double>(theirs[layer]), 1.0);
    }
  }
}

}  // namespace
}  // namespace compresskv
