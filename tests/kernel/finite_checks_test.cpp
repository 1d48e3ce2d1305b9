#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <compresskv/kernel/finite_checks.hpp>
#include <compresskv/view/attention_matrix.hpp>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "kernel/window_inputs.hpp"
#include "reference/errors.hpp"

namespace compresskv::kernel {
namespace {

using reference::expect_error;

TEST(FiniteChecks, NamesLayerHeadAndTokenOfWhatIsNotFinite) {
  const std::vector<float> poisons{std::numeric_limits<float>::quiet_NaN(),
                                   std::numeric_limits<float>::infinity(), std::bit_cast<float>(0xFFFFFFFFU)};
  for (const float poison : poisons) {
    for (const std::size_t token : {0U, 7U, 16U, 19U}) {
      WindowInputs inputs(1, 2, 20, 4);
      for (float& x : inputs.queries) {
        x = std::abs(x) + 0.1F;  // so that an infinite key gives +inf, not -inf, which is legal
      }
      inputs.cache.keys[inputs.cache.at(1, token, 2)] = poison;
      Workspace workspace;
      EXPECT_NO_THROW(inputs.sums({0, 1}, workspace));
      expect_error<ScoreError>(
          [&] {
            inputs.sums({0, 3}, workspace);
          },
          {"score of layer 3 query head 3 token " + std::to_string(token) + " ", "is not finite",
           "NaN or infinite"});
    }
  }
  WindowInputs inputs(1, 2, 20, 4);
  inputs.queries[(2 * 4 + 1) * head_dim] = std::numeric_limits<float>::quiet_NaN();
  Workspace workspace;
  expect_error<ScoreError>([&] { inputs.sums({1, 2, 3}, workspace); }, {"layer 3 query head 2 token 0 "});
}

TEST(FiniteChecks, NaNsThatAreAllOfATileAreNamedToo) {
  for (const std::size_t rows : {1025U, 2100U}) {
    WindowInputs inputs(1, 2, rows, 4);
    for (std::size_t row = 1024; row < std::min(rows, std::size_t{2048}); ++row) {
      inputs.cache.keys[inputs.cache.at(1, row, 2)] = std::numeric_limits<float>::quiet_NaN();
    }
    Workspace workspace;
    EXPECT_NO_THROW(inputs.sums({0, 1}, workspace));
    expect_error<ScoreError>([&] { inputs.sums({2}, workspace); },
                             {"layer 3 query head 2 token 1024 ", "is not finite"});
  }
}

TEST(FiniteChecks, AttentionThatIsNotFiniteIsNamedToo) {
  const ModelShape shape{.layers = 9, .query_heads = 2, .kv_heads = 1, .head_dim = 4};
  std::vector<float> weights(2 * 3 * 10, 0.1F);
  weights[(1 * 3 + 2) * 10 + 6] = std::numeric_limits<float>::quiet_NaN();
  weights[(0 * 3 + 2) * 10 + 9] = std::numeric_limits<float>::quiet_NaN();  // a window column: dropped
  const AttentionMatrix<float> matrix(weights.data(), {.query_heads = 2, .queries = 3, .tokens = 10});
  const int no_keys = 0;
  const std::vector<std::size_t> rows{10};
  const Retained retained;
  const LayerInput<int, AttentionMatrix<float>> input{.shape = shape,
                                                      .layer = 8,
                                                      .rows = rows,
                                                      .window = 3,
                                                      .retained = retained,
                                                      .kv = no_keys,
                                                      .observation = matrix};
  Workspace workspace;
  SerialExecutor executor;
  const auto sums_of = [&](std::uint32_t head) {
    const std::vector<std::uint32_t> heads{head};
    window_attention(input, heads, workspace, executor, [](std::uint32_t, std::span<const float>) {});
  };
  EXPECT_NO_THROW(sums_of(0));
  expect_error<ScoreError>([&] { sums_of(1); }, {"score of layer 8 query head 1 token 6 ", "is not finite"});
}

/// Numbers, but too large ones: what is said must not send the user to look for NaN.
TEST(FiniteChecks, SaysThatProductsOfFiniteNumbersAreTooLarge) {
  WindowInputs inputs(1, 2, 20, 4);
  for (float& x : inputs.queries) {
    x = 1e20F;
  }
  for (std::size_t dim = 0; dim < head_dim; ++dim) {
    inputs.cache.keys[inputs.cache.at(1, 7, dim)] = 1e20F;
  }
  Workspace workspace;
  expect_error<ScoreError>([&] { inputs.sums({2}, workspace); },
                           {"score of layer 3 query head 2 token 7 is not finite",
                            "keys and queries are finite", "beyond float32", "check the scale"});
}

}  // namespace
}  // namespace compresskv::kernel
