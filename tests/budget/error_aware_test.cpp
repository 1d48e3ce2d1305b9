#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/budget/error_aware.hpp>
#include <compresskv/budget/uniform.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <filesystem>
#include <limits>
#include <memory>
#include <vector>

#include "reference/budgets.hpp"
#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv::budget {
namespace {

using reference::expect_error;
using Rows = std::vector<std::size_t>;

constexpr Walk both_walks[] = {Walk::rounds, Walk::extreme};

Rows allocated(const LayerErrors& errors, const Allowance& allowance, const ErrorAware::Options& options) {
  Rows capacities(errors.layers(), 12345);
  ErrorAware(errors, Budget::tokens_per_layer(allowance.per_layer), options).allocate(allowance, capacities);
  return capacities;
}

LayerErrors errors_of(const std::vector<double>& errors) { return LayerErrors(errors, {}); }

/// The same by the reference, bounds as ARCHITECTURE.md's Budgets has them.
Rows expected(const LayerErrors& layer_errors, const Allowance& a, const ErrorAware::Options& options) {
  const std::vector<double> errors(layer_errors.average().begin(), layer_errors.average().end());
  const std::size_t window = std::min(a.window, a.tokens);
  const reference::Bounds bounds{
      .min = std::max(options.min_rows.value_or(std::min<std::size_t>(32, a.per_layer)), window),
      .max = std::min(options.max_rows.value_or(3 * a.per_layer), a.tokens)};
  const std::size_t total = a.per_layer * errors.size();
  return options.walk == Walk::rounds ? reference::budgets_by_rounds(errors, total, bounds)
                                      : reference::budgets_by_extremes(errors, total, bounds);
}

TEST(ErrorAware, SharesOutWhatTheFormulaSays) {
  // 270 rows to share beyond the minimum of 10 each, none left to walk.
  EXPECT_EQ(allocated(errors_of({0.5, 0.3, 0.2}), {.per_layer = 100, .window = 8, .tokens = 1000},
                      {.min_rows = 10, .max_rows = 300}),
            (Rows{10 + 135, 10 + 81, 10 + 54}));
}

TEST(ErrorAware, RoundsHalvesToEven) {
  // Four rows to share beyond the minimum of 2 each: 0.5 goes to 0, 1.5 to 2.
  EXPECT_EQ(allocated(errors_of({0.125, 0.125, 0.375, 0.375}), {.per_layer = 3, .window = 1, .tokens = 100},
                      {.min_rows = 2}),
            (Rows{2, 2, 4, 4}));
}

TEST(ErrorAware, WalksDifferAsThePaperAndItsCodeDo) {
  // The first layer is clipped to 20, so 50 of 60 rows are given: ten are left.
  const LayerErrors errors = errors_of({1.0, 0.0, 0.0, 0.0});
  const Allowance allowance{.per_layer = 15, .window = 1, .tokens = 100};
  EXPECT_EQ(allocated(errors, allowance, {.min_rows = 10, .max_rows = 20, .walk = Walk::rounds}),
            (Rows{20, 14, 13, 13}))
      << "one row each, round after round";
  EXPECT_EQ(allocated(errors, allowance, {.min_rows = 10, .max_rows = 20, .walk = Walk::extreme}),
            (Rows{20, 20, 10, 10}))
      << "always the largest error below its bound, ties to the lower layer";
}

TEST(ErrorAware, ASurplusIsTakenFromTheSmallestErrorTiesFromTheLowerLayer) {
  // Six rows to share: 1.5, 1.5 and 3 round to 2, 2 and 3, one too many.
  for (const Walk walk : both_walks) {
    EXPECT_EQ(allocated(errors_of({0.25, 0.25, 0.5}), {.per_layer = 3, .window = 1, .tokens = 100},
                        {.min_rows = 1, .walk = walk}),
              (Rows{2, 3, 4}));
  }
}

class ReferenceData : public testing::TestWithParam<const char*> {};

TEST_P(ReferenceData, RealErrorsSumExactlyAndAreTheReferences) {
  const std::filesystem::path file = std::filesystem::path(COMPRESSKV_SHARED_DIR) / GetParam();
  if (!std::filesystem::exists(file)) {
    GTEST_SKIP() << "the published figures are not here: no " << file.filename();
  }
  const LayerErrors errors = io::load_layer_errors(file);
  ASSERT_EQ(errors.layers(), 32U);
  for (const std::size_t mean : {30U, 64U, 128U, 256U, 512U, 1024U, 2048U}) {
    for (const std::size_t tokens : {std::size_t{4096}, mean + 1, mean + mean / 4, std::size_t{131072}}) {
      for (const Walk walk : both_walks) {
        const Allowance allowance{.per_layer = mean, .window = 8, .tokens = tokens};
        const Rows rows = allocated(errors, allowance, {.walk = walk});
        EXPECT_EQ(rows, expected(errors, allowance, {.walk = walk})) << mean << " of " << tokens;
        EXPECT_EQ(reference::sum(rows), 32 * mean) << mean << " of " << tokens;
        EXPECT_GE(*std::min_element(rows.begin(), rows.end()), std::min<std::size_t>(32, mean));
        EXPECT_LE(*std::max_element(rows.begin(), rows.end()), std::min(3 * mean, tokens));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Published, ReferenceData,
                         testing::Values("Llama-3.1-8B-Instruct_layer_score.jsonl",
                                         "Mistral-7B-Instruct-v0.3_layer_score.jsonl"),
                         [](const auto& test) { return std::string(test.param).substr(0, 5); });

TEST(ErrorAware, SyntheticErrorsReachBothBounds) {
  std::vector<double> errors(32, 1e-9);
  errors[3] = 0.9;
  errors[7] = 0.1;
  for (const Walk walk : both_walks) {
    const Rows rows =
        allocated(errors_of(errors), {.per_layer = 256, .window = 8, .tokens = 4096}, {.walk = walk});
    EXPECT_EQ(reference::sum(rows), 32U * 256U);
    EXPECT_EQ(rows[3], 768U) << "M = 3 p";
    if (walk == Walk::extreme) {
      EXPECT_EQ(*std::min_element(rows.begin(), rows.end()), 32U) << "m";
    }
  }
}

TEST(ErrorAware, WhatAShortPromptCannotUseGoesToTheOthers) {
  std::vector<double> errors(8, 0.02);
  errors[5] = 0.86;
  for (const Walk walk : both_walks) {
    // Layer 5 would keep 300 of 120 tokens.
    const Rows rows =
        allocated(errors_of(errors), {.per_layer = 100, .window = 8, .tokens = 120}, {.walk = walk});
    EXPECT_EQ(rows[5], 120U);
    EXPECT_EQ(reference::sum(rows), 800U) << "nothing is lost";
  }
}

TEST(ErrorAware, GeneratedErrorsSumExactlyWithinBounds) {
  reference::Random random(91);
  for (int round = 0; round < 400; ++round) {
    std::vector<double> errors(random.between(1, 40));
    const bool ties = random.coin();
    for (double& error : errors) {
      error = ties ? static_cast<double>(random.below(3)) : random.uniform() * random.uniform();
    }
    errors[random.below(errors.size())] += random.coin() ? 5.0 : 1.0;
    const std::size_t window = random.between(1, 16);
    const std::size_t mean = random.between(window, 200);
    const Allowance allowance{
        .per_layer = mean, .window = window, .tokens = mean + 1 + random.below(random.coin() ? 3 : 1000)};
    ErrorAware::Options options{.walk = random.coin() ? Walk::rounds : Walk::extreme};
    if (random.coin()) {
      options.min_rows = random.between(0, mean);
    }
    if (random.coin()) {
      options.max_rows = random.between(mean, 4 * mean);
    }
    const Rows rows = allocated(errors_of(errors), allowance, options);
    ASSERT_EQ(rows, expected(errors_of(errors), allowance, options)) << round;
    ASSERT_EQ(reference::sum(rows), mean * errors.size()) << round;
    for (const std::size_t capacity : rows) {
      ASSERT_GE(capacity, window);
      ASSERT_LE(capacity, allowance.tokens);
    }
  }
}

TEST(ErrorAware, DefaultsAdaptToSmallBudgets) {
  const LayerErrors errors = errors_of({0.9, 0.1});
  EXPECT_EQ(allocated(errors, {.per_layer = 8, .window = 8, .tokens = 100}, {}), (Rows{8, 8}));
  EXPECT_EQ(allocated(errors, {.per_layer = 30, .window = 8, .tokens = 100}, {}), (Rows{30, 30}))
      << "m = min(32, p)";
  EXPECT_EQ(allocated(errors, {.per_layer = 40, .window = 40, .tokens = 100}, {}), (Rows{40, 40}))
      << "every layer keeps the window";
}

TEST(ErrorAware, RejectsBoundsThatExcludeTheMean) {
  const LayerErrors errors = errors_of({0.5, 0.5});
  const Allowance allowance{.per_layer = 20, .window = 8, .tokens = 100};
  expect_error<ArgumentError>([&] { allocated(errors, allowance, {.min_rows = 21}); },
                              {"min_rows is 21", "budget is 20 rows a layer", "exceeds the total"});
  expect_error<ArgumentError>([&] { allocated(errors, allowance, {.max_rows = 19}); },
                              {"max_rows is 19", "budget is 20 rows a layer", "cannot hold the total"});
  EXPECT_EQ(allocated(errors, allowance, {.min_rows = 20, .max_rows = 20}), (Rows{20, 20}));
}

TEST(ErrorAware, RejectsAnotherModel) {
  const ErrorAware allocator{errors_of({0.5, 0.5}), Budget::tokens_per_layer(20)};
  expect_error<ArgumentError>(
      [&] { allocator.validate({.layers = 3, .query_heads = 1, .kv_heads = 1, .head_dim = 1}); },
      {"layer errors have 2 layers", "the model has 3", "calibrated for this model"});
}

TEST(Uniform, GivesEveryLayerTheMean) {
  Rows rows(5);
  Uniform(Budget::tokens_per_layer(17)).allocate({.per_layer = 17, .window = 8, .tokens = 100}, rows);
  EXPECT_EQ(rows, Rows(5, 17));
}

// | Allocator | reach, budget(), validate(shape), allocate(allowance, capacities), copyable |
static_assert(Allocator<ErrorAware> && Allocator<Uniform>);
struct Own {
  static constexpr Reach reach = Reach::own_layer;
  Budget budget() const { return Budget::tokens_per_layer(1); }
  void validate(const ModelShape&) const {}
  void allocate(const Allowance&, std::span<std::size_t>) const {}
};
static_assert(Allocator<Own>);
struct NoReach : Own {
  void reach() const;
};
struct NoBudget : Own {
  void budget() const = delete;
};
struct NoValidate : Own {
  void validate() const;
};
struct NoAllocate : Own {
  void allocate() const;
};
struct NotCopyable : Own {
  std::unique_ptr<int> owner;
};
static_assert(!Allocator<NoReach> && !Allocator<NoBudget> && !Allocator<NoValidate>);
static_assert(!Allocator<NoAllocate> && !Allocator<NotCopyable>);

TEST(ErrorAware, NumbersAtTheEndOfTheirRange) {
  constexpr std::size_t half = std::size_t{1} << 63U;
  const LayerErrors errors = errors_of({0.9, 0.1});
  const Budget budget = Budget::tokens_per_layer(half);
  Rows capacities(2);
  expect_error<ArgumentError>(
      [&] {
        ErrorAware(errors, budget).allocate({.per_layer = half, .window = 8, .tokens = half + 1}, capacities);
      },
      {"budget is 9223372036854775808 rows a layer, of 2 layers", "beyond 64 bits"});
  expect_error<ArgumentError>(
      [&] { ErrorAware(errors, budget).allocate({.per_layer = 5, .window = 8, .tokens = 100}, capacities); },
      {"budget is 5 rows a layer", "window alone is 8"});
  // Three times this is beyond 64 bits.
  const std::size_t large = half - 1;
  for (const Walk walk : {Walk::extreme}) {
    ErrorAware(errors, budget, {.min_rows = large - 4, .walk = walk})
        .allocate({.per_layer = large, .window = 8, .tokens = half + 100}, capacities);
    EXPECT_EQ(capacities[0] + capacities[1], 2 * large);
    EXPECT_EQ(capacities[0], large + 3);
  }
}

}  // namespace
}  // namespace compresskv::budget
