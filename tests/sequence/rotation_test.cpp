#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/sequence/compaction.hpp>
#include <compresskv/sequence/rotation.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstdint>
#include <vector>

#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv::sequence {
namespace {

using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

/// Turns pairs (e, e + dim / 2) of an unturned key to `position`, in double.
std::vector<double> turned(const std::vector<double>& key, double position, double base) {
  std::vector<double> out(key);
  const std::size_t pairs = key.size() / 2;
  for (std::size_t j = 0; j < pairs; ++j) {
    const double angle =
        position * std::pow(base, -2.0 * static_cast<double>(j) / static_cast<double>(key.size()));
    out[j] = key[j] * std::cos(angle) - key[j + pairs] * std::sin(angle);
    out[j + pairs] = key[j] * std::sin(angle) + key[j + pairs] * std::cos(angle);
  }
  return out;
}

TEST(Rotation, KeysThatWereTurnedToTheirPositionsStandAtTheirRows) {
  Random random(75);
  for (int round = 0; round < 40; ++round) {
    const std::size_t kv_heads = random.between(1, 3);
    const std::size_t head_dim = 2 * random.between(1, 6);
    const std::size_t tokens = random.between(2, 120);
    constexpr double base = 500.0;
    State state(1, kv_heads);
    state.prepare_sequence(tokens, {});
    state.start_sequence(tokens, {});
    std::vector<std::vector<double>> raw;
    std::vector<float> keys;
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (std::size_t t = 0; t < tokens; ++t) {
        std::vector<double> key(head_dim);
        for (double& x : key) {
          x = static_cast<double>(random.gaussian());
        }
        raw.push_back(key);
        for (const double x : turned(key, static_cast<double>(t), base)) {
          keys.push_back(static_cast<float>(x));
        }
      }
    }
    std::vector<float> values = keys;
    Rows kept;
    for (std::uint32_t t = 0; t + 1 < tokens; ++t) {
      if (random.below(3) == 0) {
        kept.push_back(t);
      }
    }
    kept.push_back(static_cast<std::uint32_t>(tokens - 1));
    const auto view = [&](std::size_t rows) {
      return StridedKv<float>{
          std::span(keys), std::span(values),
          KvShape{.kv_heads = kv_heads, .rows = rows, .head_dim = head_dim, .allocated_rows = tokens},
          layout::head_token_dim};
    };
    Workspace workspace;
    SerialExecutor executor;
    Compaction compaction{1};
    const auto selection = Selection::shared_by_heads(kept);
    const ModelShape shape{.layers = 1, .query_heads = kv_heads, .kv_heads = kv_heads, .head_dim = head_dim};
    const auto all = view(tokens);
    compaction.start();
    compaction.stage(state, shape, 0, all, all, selection, workspace);
    compaction.commit(state, 0, all, all, selection, workspace, executor);
    turn_to_rows(state, 0, view(kept.size()), {.base = base}, workspace, executor);

    EXPECT_TRUE(state.turned());
    EXPECT_EQ(state.layer(0).next_position(), kept.size());
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (std::size_t row = 0; row < kept.size(); ++row) {
        const auto expected = turned(raw[head * tokens + kept[row]], static_cast<double>(row), base);
        for (std::size_t e = 0; e < head_dim; ++e) {
          ASSERT_NEAR(static_cast<double>(keys[(head * tokens + row) * head_dim + e]), expected[e], 1e-5)
              << head << ' ' << row << ' ' << e;
        }
      }
    }
  }
}

TEST(Rotation, HeadsOfUnequalRowsAreRefused) {
  State state(1, 2);
  state.prepare_sequence(4, {});
  state.start_sequence(4, {});
  std::vector<float> keys(16);
  std::vector<float> values(16);
  const std::vector<std::size_t> lengths{4, 3};
  const StridedKv<float> kv{std::span(keys), std::span(values),
                            KvShape{.kv_heads = 2, .head_dim = 2, .allocated_rows = 4, .head_rows = lengths},
                            layout::head_token_dim};
  Workspace workspace;
  SerialExecutor executor;
  expect_error<ArgumentError>([&] { turn_to_rows(state, 0, kv, {}, workspace, executor); },
                              {"KV head 1 has 3 rows, KV head 0 4", "equal lengths"});
  EXPECT_FALSE(state.turned());
}

}  // namespace
}  // namespace compresskv::sequence
