// Blend and BlendCarried: rows shared between scores of the whole model and the layer's own.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include "reference/errors.hpp"
#include "reference/layered_model.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::LayerCase;
using reference::LayeredModel;
using reference::Scores64;
using Rows = std::vector<std::uint32_t>;
using Sets = std::vector<Rows>;  // [layer]

constexpr std::size_t layer_count = 5;

Rows rows_of(const PositionSet& set) { return {set.begin(), set.end()}; }

/// What each layer keeps of `model`, whose cache is cut.
template <class S>
Sets kept_by(const S& scorer, LayeredModel& model, std::size_t capacity, const Protection& protection = {}) {
  const Plan plan{model.shape, scorer, select::SharedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(capacity)}};
  Compressor compressor{plan};
  compressor.begin(model.sizes.rows, protection);
  for (std::size_t l = 0; l < layer_count; ++l) {
    if constexpr (S::reach == Reach::own_layer) {
      compressor.compress(l, model.view(l), model.layers[l].observation());
      const std::size_t changed[] = {l};
      model.shrunk(compressor, changed);
    } else {
      model.shrunk(compressor, compressor.arrive(l, model.views(), model.layers[l].observation()));
    }
  }
  if constexpr (S::reach == Reach::all_layers) {
    model.shrunk(compressor, compressor.finish(model.views()));
  }
  Sets kept;
  for (std::size_t l = 0; l < layer_count; ++l) {
    kept.push_back(rows_of(compressor.retained(l).positions()));
  }
  return kept;
}

template <class S>
Sets kept_by(const S& scorer, const LayeredModel& model, std::size_t capacity,
             const Protection& protection = {}) {
  LayeredModel copy = model;
  return kept_by(scorer, copy, capacity, protection);
}

std::vector<LayerCase> blend_cases() { return reference::model_cases(12, 77); }

score::Blend blend(const LayeredModel& model, const LayerCase& c, const score::BlendShares& shares) {
  return {model.scores(),
          {.heads = std::min<std::size_t>(5, c.query_heads() * layer_count),
           .heads_per_layer = 1,
           .shares = shares,
           .window = c.window,
           .pool = c.pool,
           .pool_width = c.pool_width}};
}
score::BlendCarried blend_carried(const LayeredModel& model, const LayerCase& c, std::size_t hold,
                                  const score::BlendShares& shares) {
  return {model.scores(),
          {.heads_per_layer = 1,
           .hold_layers = hold,
           .shares = shares,
           .window = c.window,
           .pool = c.pool,
           .pool_width = c.pool_width}};
}

TEST(Blend, AllOrNothingOfTheShareIsTheMethodsThemselves) {
  for (const LayerCase& c : blend_cases()) {
    SCOPED_TRACE(c);
    const LayeredModel model(c, layer_count);
    const score::SemanticRetrieval own{
        model.scores(),
        {.heads_per_layer = 1, .window = c.window, .pool = c.pool, .pool_width = c.pool_width}};
    const score::ModelWide wide{model.scores(),
                                {.heads = std::min<std::size_t>(5, c.query_heads() * layer_count),
                                 .window = c.window,
                                 .pool = c.pool,
                                 .pool_width = c.pool_width}};
    EXPECT_EQ(kept_by(blend(model, c, {.sinks = 0, .model_share = 0.0}), model, c.capacity),
              kept_by(own, model, c.capacity));
    EXPECT_EQ(kept_by(blend(model, c, {.sinks = 0, .model_share = 1.0}), model, c.capacity),
              kept_by(wide, model, c.capacity));
    for (const std::size_t hold : {0U, 2U}) {
      const score::Carried carried{model.scores(),
                                   {.heads_per_layer = 1,
                                    .hold_layers = hold,
                                    .window = c.window,
                                    .pool = c.pool,
                                    .pool_width = c.pool_width}};
      EXPECT_EQ(kept_by(blend_carried(model, c, hold, {.sinks = 0, .model_share = 0.0}), model, c.capacity),
                kept_by(own, model, c.capacity));
      EXPECT_EQ(kept_by(blend_carried(model, c, hold, {.sinks = 0, .model_share = 1.0}), model, c.capacity),
                kept_by(carried, model, c.capacity));
    }
  }
}

TEST(Blend, RowsBeyondSixteenBitsAreHeldAsWell) {
  for (const std::size_t rows : {65'536U, 65'537U, 70'000U}) {
    const LayerCase c{.head_dim = 4, .rows = rows, .window = 2, .capacity = 3000, .seed = 5};
    const LayeredModel model(c, layer_count);
    const score::SemanticRetrieval own{model.scores(), {.heads_per_layer = 1, .window = 2}};
    const Sets kept = kept_by(blend(model, c, {.sinks = 0, .model_share = 0.0}), model, c.capacity);
    EXPECT_EQ(kept, kept_by(own, model, c.capacity));
    EXPECT_GT(kept[0][2990], 65'000U) << "some lie that far behind";
  }
}

/// Positions by falling score, the lower first among equals.
Rows by_falling(const Scores64& scores) {
  Rows order(scores.size());
  for (std::size_t t = 0; t < order.size(); ++t) {
    order[t] = static_cast<std::uint32_t>(t);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return scores[a] > scores[b]; });
  return order;
}

/// Whether rounding cannot change which `count` come first of those that are not in `taken`.
bool clear_cut(const Scores64& scores, const std::set<std::uint32_t>& taken, std::size_t count) {
  std::vector<double> left;
  for (const std::uint32_t t : by_falling(scores)) {
    if (!taken.contains(t)) {
      left.push_back(scores[t]);
    }
  }
  return count == 0 || count >= left.size() || left[count - 1] - left[count] > 1e-5 * left[count - 1];
}

void take(const Scores64& scores, std::size_t count, std::set<std::uint32_t>& taken) {
  for (const std::uint32_t t : by_falling(scores)) {
    if (count > 0 && taken.insert(t).second) {
      --count;
    }
  }
}

/// The kept rows of a layer as the doc comment of Blend tells them, by exact scores; empty where rounding
/// decides.
Rows expected_rows(const LayerCase& c, const Scores64& shared, const Scores64& own,
                   const score::BlendShares& shares, const Rows& protected_positions) {
  const std::size_t evictable = shared.size();
  const std::size_t room = std::min(c.capacity - c.observed(), evictable);
  std::set<std::uint32_t> taken;
  for (const std::uint32_t position : protected_positions) {
    if (position < evictable) {
      taken.insert(position);
    }
  }
  for (std::uint32_t t = 0; t < std::min(shares.sinks, evictable) && taken.size() < room; ++t) {
    taken.insert(t);
  }
  const auto first =
      static_cast<std::size_t>(std::lround(shares.model_share * static_cast<double>(room - taken.size())));
  if (!clear_cut(shared, taken, first)) {
    return {};
  }
  take(shared, first, taken);
  const std::size_t rest = room - taken.size();
  if (!clear_cut(own, taken, rest)) {
    return {};
  }
  take(own, rest, taken);
  Rows rows(taken.begin(), taken.end());
  for (std::size_t t = evictable; t < evictable + c.observed(); ++t) {
    rows.push_back(static_cast<std::uint32_t>(t));
  }
  return rows;
}

TEST(Blend, SharesRowsBetweenTheWholeModelAndTheLayersOwn) {
  std::size_t compared = 0;
  std::size_t all = 0;
  for (const LayerCase& c : blend_cases()) {
    const LayeredModel model(c, layer_count);
    const std::size_t heads = std::min<std::size_t>(5, c.query_heads() * layer_count);
    const Scores64 wide = model.model_wide(heads);
    for (const score::BlendShares& shares :
         {score::BlendShares{}, score::BlendShares{.sinks = 0, .model_share = 0.5},
          score::BlendShares{.sinks = 1000, .model_share = 0.3}}) {
      for (const Rows& positions : {Rows{}, Rows{2, 9}}) {
        const std::size_t room = c.capacity - c.observed();
        if (!positions.empty() && (positions.back() >= c.rows || room < positions.size())) {
          continue;
        }
        SCOPED_TRACE(testing::Message() << c << " share " << shares.model_share << " sinks " << shares.sinks
                                        << " protected " << positions.size());
        const Sets kept = kept_by(blend(model, c, shares), model, c.capacity, {.positions = positions});
        Scores64 carried(wide.size(), 0.0);
        const Sets kept_carried =
            kept_by(blend_carried(model, c, 0, shares), model, c.capacity, {.positions = positions});
        for (std::size_t l = 0; l < layer_count; ++l) {
          const std::size_t best = model.best_heads(l, 1)[0];
          Scores64 own = model.weighted(l, best);
          for (std::size_t t = 0; t < own.size(); ++t) {
            carried[t] = 0.7 * carried[t] + own[t];
            own[t] /= model.head_scores[l][best];
          }
          const Rows expected = expected_rows(c, wide, own, shares, positions);
          const Rows expected_carried = expected_rows(c, carried, own, shares, positions);
          all += 2;
          if (!expected.empty()) {
            ++compared;
            ASSERT_EQ(kept[l], expected) << "layer " << l;
          }
          if (!expected_carried.empty()) {
            ++compared;
            ASSERT_EQ(kept_carried[l], expected_carried) << "carried, layer " << l;
          }
          ASSERT_EQ(kept[l].size(), std::min(c.capacity, c.rows));
        }
      }
    }
  }
  EXPECT_GT(compared, all / 2) << "of " << all << " layers: rounding decides in too many";
}

TEST(Blend, LayersMayHaveDifferentBudgets) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 120, .window = 8, .capacity = 40};
  LayeredModel model(c, 3);
  const Plan plan{model.shape, score::Blend{model.scores(), {.heads = 3, .heads_per_layer = 1, .window = 8}},
                  select::SharedTopK{},
                  budget::ErrorAware{LayerErrors({0.7, 0.2, 0.1}, {}), Budget::tokens_per_layer(40)}};
  Compressor compressor{plan};
  compressor.begin(c.rows);
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_TRUE(compressor.arrive(l, model.views(), model.layers[l].observation()).empty());
  }
  compressor.finish(model.views());
  std::size_t rows = 0;
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_EQ(compressor.retained(l).rows(), compressor.capacities()[l]);
    rows += compressor.retained(l).rows();
  }
  EXPECT_EQ(rows, 120U);
}

TEST(Blend, RanksAddBothParts) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 120, .window = 8, .capacity = 40};
  LayeredModel whole(c, 3);
  LayeredModel doubled = whole;
  const Plan plan{whole.shape, score::Blend{whole.scores(), {.heads = 3, .heads_per_layer = 1, .window = 8}},
                  select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(40)}};
  Compressor one{plan};
  Compressor two{plan};
  one.begin(c.rows);
  two.begin(c.rows);
  std::size_t calls = 0;
  for (std::size_t l = 0; l < 3; ++l) {
    one.arrive(l, whole.views(), whole.layers[l].observation());
    two.arrive(l, doubled.views(), doubled.layers[l].observation(), [&](std::span<float> scores) {
      ++calls;
      ASSERT_EQ(scores.size(), 112U);
      for (float& score : scores) {
        score *= 2.0F;
      }
    });
  }
  EXPECT_EQ(calls, 6U);
  one.finish(whole.views());
  two.finish(doubled.views());
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_EQ(rows_of(one.retained(l).positions()), rows_of(two.retained(l).positions()));
    EXPECT_EQ(whole.layers[l].cache, doubled.layers[l].cache);
  }
  // Scores that ranks have spoilt are named, those of the whole model too.
  Compressor three{plan};
  three.begin(c.rows);
  LayeredModel spoilt(c, 3);
  std::size_t call = 0;
  expect_error<ScoreError>(
      [&] {
        three.arrive(0, spoilt.views(), spoilt.layers[0].observation(), [&](std::span<float> scores) {
          if (++call == 2) {
            scores[5] = std::numeric_limits<float>::infinity();
          }
        });
      },
      {"score of layer 0 row 0 token 5 is inf"});
  three.arrive(0, spoilt.views(), spoilt.layers[0].observation());
  three.arrive(1, spoilt.views(), spoilt.layers[1].observation());
  three.arrive(2, spoilt.views(), spoilt.layers[2].observation());
  three.finish(spoilt.views());
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_EQ(rows_of(three.retained(l).positions()), rows_of(one.retained(l).positions()));
  }
}

TEST(Blend, GoesOnInALaterTurn) {
  const LayerCase c{.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 100, .window = 8, .capacity = 30};
  for (const bool carried : {false, true}) {
    LayeredModel model(c, layer_count);
    const auto run = [&](const auto& scorer) {
      const Plan plan{model.shape, scorer, select::SharedTopK{},
                      budget::Uniform{Budget::tokens_per_layer(30)}};
      Compressor compressor{plan};
      for (const std::size_t tokens : {100U, 140U}) {
        if (tokens == 100) {
          compressor.begin(tokens);
        } else {
          compressor.begin_turn(tokens);
          for (auto& heads : model.rows) {
            std::fill(heads.begin(), heads.end(), 70U);  // 30 kept, 40 appended
          }
        }
        for (std::size_t l = 0; l < layer_count; ++l) {
          model.shrunk(compressor, compressor.arrive(l, model.views(), model.layers[l].observation()));
        }
        if constexpr (std::decay_t<decltype(scorer)>::reach == Reach::all_layers) {
          model.shrunk(compressor, compressor.finish(model.views()));
        }
        for (std::size_t l = 0; l < layer_count; ++l) {
          const Rows kept = rows_of(compressor.retained(l).positions());
          ASSERT_EQ(kept.size(), 30U);
          ASSERT_TRUE(std::is_sorted(kept.begin(), kept.end()));
          ASSERT_EQ(Rows(kept.begin(), kept.begin() + 4), (Rows{0, 1, 2, 3})) << "sinks, by position";
          ASSERT_EQ(kept[22], tokens - 8) << "the window";
        }
      }
    };
    if (carried) {
      run(score::BlendCarried{model.scores(), {.heads_per_layer = 1, .window = 8}});
    } else {
      run(score::Blend{model.scores(), {.heads = 3, .heads_per_layer = 1, .window = 8}});
    }
  }
}

TEST(Blend, RejectsOptionsByName) {
  const LayeredModel model({.group = 2, .kv_heads = 2, .head_dim = 16, .rows = 20}, 3);
  const HeadScores scores = model.scores();
  for (const double share : {-0.1, 1.5, std::nan("")}) {
    expect_error<ArgumentError>([&] { score::Blend(scores, {.heads = 3, .shares = {.model_share = share}}); },
                                {"model_share is", "between 0 and 1"});
  }
  expect_error<ArgumentError>([&] { score::BlendCarried(scores, {.shares = {.model_share = 2.0}}); },
                              {"model_share is 2"});
  expect_error<ArgumentError>([&] { score::Blend(scores, {.heads = 13}); }, {"heads is 13", "1 to the 12"});
  expect_error<ArgumentError>([&] { score::Blend(scores, {.heads = 3, .heads_per_layer = 5}); },
                              {"heads_per_layer is 5"});
  expect_error<ArgumentError>([&] { score::BlendCarried(scores, {.decay = 1.5F}); }, {"decay is 1.5"});
  expect_error<ArgumentError>([&] { score::Blend(scores, {.heads = 3, .pool_width = 2}); },
                              {"pooling width is 2"});
  ModelShape shape = model.shape;
  shape.layers = 4;
  expect_error<ArgumentError>([&] { score::Blend(scores, {.heads = 3}).validate(shape); },
                              {"head ranking has 3 layers, the model has 4"});
}

}  // namespace
}  // namespace compresskv
