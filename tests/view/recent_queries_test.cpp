#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/view/recent_queries.hpp>
#include <vector>

#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

constexpr std::size_t heads = 3;
constexpr std::size_t head_dim = 5;

/// What a view shows, as [head][query][dim].
template <class T>
std::vector<T> shown(const QueryWindow<T>& window) {
  std::vector<T> out;
  for (std::size_t head = 0; head < window.query_heads(); ++head) {
    const auto run = window.query_run(head);
    for (std::size_t i = 0; i < run.rows; ++i) {
      out.insert(out.end(), run.row(i), run.row(i) + window.head_dim());
    }
  }
  return out;
}

TEST(RecentQueries, ChunksOfAnySizeEndAsOneShotDoes) {
  reference::Random random(5);
  for (int trial = 0; trial < 300; ++trial) {
    const std::size_t window = random.between(1, 9);
    const std::size_t total = random.between(1, 40);
    // The projection's own order, [query][head][dim].
    std::vector<float> prompt(total * heads * head_dim);
    for (float& x : prompt) {
      x = random.gaussian();
    }
    RecentQueries<float> recent({.query_heads = heads, .queries = window, .head_dim = head_dim});
    for (std::size_t done = 0; done < total;) {
      const std::size_t count = random.between(0, std::min<std::size_t>(total - done, 12));
      recent.append(prompt.data() + done * heads * head_dim, count,
                    {.head = head_dim, .query = heads * head_dim});
      done += count;
      ASSERT_EQ(recent.size(), std::min(done, window));
      if (done == 0) {
        continue;
      }
      const std::size_t held = std::min(done, window);
      const QueryWindow<float> one_shot(prompt.data() + (done - held) * heads * head_dim,
                                        {.query_heads = heads, .queries = held, .head_dim = head_dim},
                                        {.head = head_dim, .query = heads * head_dim});
      ASSERT_EQ(shown(recent.view()), shown(one_shot)) << "window " << window << " after " << done;
    }
  }
}

TEST(RecentQueries, HandsOnWhatTheLayerIs) {
  const std::vector<float> sinks{1.0F, 2.0F, 3.0F};
  RecentQueries<float> recent({.query_heads = heads,
                               .queries = 2,
                               .head_dim = head_dim,
                               .scale = 0.5F,
                               .soft_cap = 30.0F,
                               .sliding_window = 7,
                               .sinks = sinks});
  const std::vector<float> queries(heads * head_dim);
  recent.append(queries.data(), 1, {.head = head_dim, .query = heads * head_dim});
  const auto view = recent.view();
  EXPECT_EQ(recent.shape().queries, 2U);
  EXPECT_EQ(view.queries(), 1U);
  EXPECT_EQ(view.scale(), 0.5F);
  EXPECT_EQ(view.soft_cap(), 30.0F);
  EXPECT_EQ(view.sliding_window(), 7U);
  EXPECT_EQ(view.sink_logit(2), 3.0F);
}

TEST(RecentQueries, ForgetsAndRefuses) {
  RecentQueries<float> recent({.query_heads = heads, .queries = 2, .head_dim = head_dim});
  expect_error<ArgumentError>([&] { recent.view(); }, {"RecentQueries: no queries were appended"});
  const std::vector<float> queries(heads * head_dim);
  recent.append(queries.data(), 1, {.head = head_dim, .query = heads * head_dim});
  EXPECT_EQ(recent.size(), 1U);
  recent.clear();
  EXPECT_EQ(recent.size(), 0U);
  expect_error<ArgumentError>([&] { recent.view(); }, {"no queries were appended"});
  const float* null = nullptr;
  expect_error<ArgumentError>([&] { recent.append(null, 1, {}); }, {"RecentQueries: queries is null"});
  EXPECT_NO_THROW(recent.append(null, 0, {}));
  expect_error<ArgumentError>(
      [] { RecentQueries<float>({.query_heads = heads, .queries = 0, .head_dim = head_dim}); },
      {"RecentQueries: shape has 3 heads, 0 queries, head_dim 5", "at least 1"});
}

}  // namespace
}  // namespace compresskv
