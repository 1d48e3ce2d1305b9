// Every method by the door: a sequence that was saved and loaded elsewhere goes on as if it had not been.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <compresskv/runtime/any_compressor.hpp>
#include <compresskv/view/query_window.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "message_of.hpp"
#include "reference/equal_memory.hpp"
#include "reference/output_norms.hpp"
#include "reference/queries.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using test::message_of;
using test::says;

constexpr ModelShape model_saved{.layers = 3, .query_heads = 4, .kv_heads = 2, .head_dim = 16};
constexpr std::size_t room = 400;

MethodSettings settings_saved(Budget budget) {
  reference::Random random(7);
  std::vector<std::vector<double>> scores(12);
  for (auto& runs : scores) {
    runs = {0.1 + random.uniform()};
  }
  const std::vector<double> errors = {0.2, 0.5, 0.3};
  return {
      .budget = budget,
      .heads = HeadRanking(std::vector<std::vector<std::uint32_t>>{{2, 0, 1, 3}, {1, 3, 0, 2}, {3, 2, 1, 0}}),
      .scores = HeadScores(3, 4, scores),
      .statistics = reference::query_statistics(model_saved),
      .output_weights = reference::output_weights(model_saved),
      .kv_scores = HeadScores(
          3, model_saved.kv_heads,
          {scores.begin(), scores.begin() + static_cast<std::ptrdiff_t>(3 * model_saved.kv_heads)}),
      .errors = LayerErrors(errors, {{.name = "set", .errors = errors}}),
      .min_rows = 20,
      .heads_per_layer = 2,
      .window = 4,
      .model_heads = 4};
}

/// A model's cache and queries; what is appended is drawn from its own numbers, so that copies go on alike.
struct Cache {
  reference::Random random;
  std::vector<float> keys = std::vector<float>(3 * 2 * room * 16);
  std::vector<float> values = keys;
  std::vector<float> queries = std::vector<float>(3 * 4 * room * 16);
  std::array<std::array<std::size_t, 2>, 3> rows = {};
  std::size_t tokens = 0;

  explicit Cache(std::uint64_t seed) : random(seed) {}

  void append(std::size_t count, bool count_them = true) {
    for (std::size_t layer = 0; layer < 3; ++layer) {
      for (std::size_t head = 0; head < 2; ++head) {
        const std::size_t first = ((layer * 2 + head) * room + rows[layer][head]) * 16;
        for (std::size_t i = first; i < first + count * 16; ++i) {
          keys[i] = random.gaussian();
          values[i] = random.gaussian();
        }
        rows[layer][head] += count;
      }
    }
    for (float& query : queries) {
      query = random.gaussian();
    }
    tokens += count_them ? count : 0;
  }
  StridedKv<float> view(std::size_t layer) {
    const std::size_t first = layer * 2 * room * 16;
    return {keys.data() + first, values.data() + first,
            KvShape{.kv_heads = 2, .head_dim = 16, .allocated_rows = room, .head_rows = rows[layer]},
            layout::head_token_dim};
  }
  QueryWindow<float> shown(std::size_t layer, std::size_t count) const {
    return {queries.data() + layer * 4 * room * 16,
            {.query_heads = 4, .queries = count, .head_dim = 16},
            {.head = room * 16, .query = 16}};
  }
  template <class Rows>
  void shorten(std::size_t layer, Rows&& of_head) {
    for (std::size_t head = 0; head < 2; ++head) {
      rows[layer][head] = of_head(head);
    }
  }

  /// The layers of a turn that show so many queries.
  void compress(AnyCompressor& compressor, std::size_t observed) {
    const auto views = [&](std::size_t layer) { return view(layer); };
    const auto note = [&](std::span<const std::size_t> changed) {
      for (const std::size_t layer : changed) {
        shorten(layer, [&](std::size_t head) { return compressor.retained(layer).rows(head); });
      }
    };
    if (compressor.plan().needs() == Needs::repeats) {
      for (std::size_t first = 0; first < tokens; first += 64) {
        const auto before = rows;
        append(20, false);
        for (std::size_t layer = 0; layer < 3; ++layer) {
          compressor.observe(layer, view(layer), {.first = first, .last = std::min(first + 64, tokens)},
                             shown(layer, 16), std::vector<float>(16, 2.0F));
        }
        rows = before;
      }
    } else {
      for (std::size_t layer = 0; layer < 3; ++layer) {
        note(compressor.arrive(layer, views, shown(layer, observed)));
      }
    }
    note(compressor.finish(views));
  }
};

std::string saved_by(const AnyCompressor& compressor, const MadeWith& made = {}) {
  std::ostringstream out;
  compressor.save(out, made);
  return out.str();
}

void load_from(AnyCompressor& compressor, const std::string& bytes, const MadeWith& made = {}) {
  std::istringstream in(bytes);
  compressor.load(in, made);
  EXPECT_EQ(in.get(), std::istringstream::traits_type::eof()) << "all of it was read";
}

/// All that can be asked.
void expect_same_memory(const AnyCompressor& a, const AnyCompressor& b, std::size_t tokens) {
  reference::expect_equal_memory(a, b, 3);
  for (std::size_t layer = 0; layer < 3; ++layer) {
    for (std::size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(a.held(tokens).rows(layer, head), b.held(tokens).rows(layer, head));
    }
  }
}

TEST(SavedByTheDoor, EveryMethodGoesOnAsIfItHadNotBeenSaved) {
  for (const MethodInfo& method : methods) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      SCOPED_TRACE(std::string(method.name) + " seed " + std::to_string(seed));
      const Budget budget = seed % 2 == 0 ? Budget::tokens_per_layer(30) : Budget::kept_ratio(0.3);
      const AnyPlan plan{model_saved, method.method, settings_saved(budget)};
      Cache cache(seed);
      const std::size_t prompt = 90 + 37 * seed;
      cache.append(prompt);
      AnyCompressor compressor{plan};
      const std::vector<std::uint32_t> listed = {5, 31};
      Protection protection{.keep_first = 2, .positions = listed};
      if (method.method == Method::pyramidkv) {
        protection = {};  // its last layer has little room
      }
      compressor.begin(prompt, protection);
      cache.compress(compressor, prompt);
      EXPECT_EQ(compressor.retained(2).bytes_freed() > 0, method.method != Method::full);
      if (seed >= 2) {  // rows that no compression has seen, some of them taken back
        cache.append(9);
        const Held left = compressor.truncate(prompt + 4);
        for (std::size_t layer = 0; layer < 3; ++layer) {
          cache.shorten(layer, [&](std::size_t head) { return left.rows(layer, head); });
        }
        cache.tokens = prompt + 4;
      }

      const std::string bytes = saved_by(compressor);
      // Another process has a plan of its own. One compressor is new, the other had another sequence.
      const AnyPlan other_plan{model_saved, method.method, settings_saved(budget)};
      AnyCompressor loaded{other_plan};
      AnyCompressor used{other_plan};
      Cache unrelated(99);
      unrelated.append(120);
      used.begin(120, {.keep_first = 1});
      unrelated.compress(used, 120);
      std::array<Cache, 2> copies = {cache, cache};
      const std::array<AnyCompressor*, 2> others = {&loaded, &used};
      for (std::size_t i = 0; i < 2; ++i) {
        load_from(*others[i], bytes);
        expect_same_memory(compressor, *others[i], cache.tokens + 3);
        EXPECT_EQ(saved_by(*others[i]), bytes) << "saved again it is the same";
      }
      for (std::size_t turn = 0; turn < 2; ++turn) {
        const auto go_on = [&](AnyCompressor& by, Cache& on) {
          const std::size_t before = on.tokens;
          on.append(33);
          by.begin_turn(on.tokens, {.keep_first = turn});
          on.compress(by, on.tokens - before + 20);
        };
        go_on(compressor, cache);
        for (std::size_t i = 0; i < 2; ++i) {
          go_on(*others[i], copies[i]);
          expect_same_memory(compressor, *others[i], cache.tokens);
          EXPECT_EQ(copies[i].rows, cache.rows);
          EXPECT_EQ(copies[i].keys, cache.keys);
          EXPECT_EQ(copies[i].values, cache.values);
          EXPECT_EQ(saved_by(*others[i]), saved_by(compressor));
        }
      }
    }
  }
}

TEST(SavedByTheDoor, TheMiddleOfATurnIsRefusedWhereLayersReachOverOthers) {
  for (const MethodInfo& method : methods) {
    SCOPED_TRACE(method.name);
    const AnyPlan plan{model_saved, method.method, settings_saved(Budget::tokens_per_layer(30))};
    AnyCompressor compressor{plan};
    EXPECT_TRUE(says(message_of<ArgumentError>([&] { saved_by(compressor); }), {"begin() was not called"}));
    Cache cache(3);
    cache.append(100);
    compressor.begin(100);
    const auto views = [&](std::size_t layer) { return cache.view(layer); };
    const auto refused = [&] {
      return says(message_of<ArgumentError>([&] { saved_by(compressor); }),
                  {"method " + std::string(method.name) + " is in the middle of a turn", "after finish()"});
    };
    if (plan.reach() == Reach::own_layer) {
      // Nothing travels: what one layer remembers is all there is, at any time.
      compressor.arrive(0, views, cache.shown(0, 100));
      AnyCompressor loaded{plan};
      load_from(loaded, saved_by(compressor));
      Cache copy = cache;
      cache.rows[0] = copy.rows[0] = {compressor.retained(0).rows(0), compressor.retained(0).rows(1)};
      compressor.arrive(1, views, cache.shown(1, 100));
      loaded.arrive(
          1, [&](std::size_t layer) { return copy.view(layer); }, copy.shown(1, 100));
      expect_same_memory(compressor, loaded, 100);
      EXPECT_EQ(copy.keys, cache.keys);
      continue;
    }
    EXPECT_TRUE(refused()) << "no layer has come";
    if (plan.needs() == Needs::repeats) {
      cache.append(5, false);
      compressor.observe(0, cache.view(0), {.first = 0, .last = 50}, cache.shown(0, 3),
                         std::vector<float>(3, 2.0F));
    } else {
      compressor.arrive(0, views, cache.shown(0, 100));
    }
    EXPECT_TRUE(refused());
    compressor.truncate(50);  // ends the turn
    EXPECT_FALSE(saved_by(compressor).empty());
  }
}

TEST(SavedByTheDoor, NamesAndSettingsTellSequencesApart) {
  const AnyPlan plan{model_saved, "snapkv", settings_saved(Budget::tokens_per_layer(30))};
  AnyCompressor compressor{plan};
  compressor.begin(100);
  const std::string bytes = saved_by(compressor, {.method = "pool 5", .calibration = "none"});
  const auto refused = [&](const char* name, Budget budget, const MadeWith& made) {
    AnyCompressor other{AnyPlan{model_saved, name, settings_saved(budget)}};
    return message_of<ArgumentError>([&] { load_from(other, bytes, made); });
  };
  const Budget same = Budget::tokens_per_layer(30);
  const MadeWith made{.method = "pool 5", .calibration = "none"};
  EXPECT_TRUE(
      says(refused("knorm", same, made),
           {"method is 'snapkv, pool 5', this plan's is 'knorm, pool 5'", "compress the context again"}));
  EXPECT_TRUE(
      says(refused("snapkv", same, {.method = "pool 7", .calibration = "none"}), {"'snapkv, pool 7'"}));
  EXPECT_TRUE(says(refused("snapkv", Budget::tokens_per_layer(31), made),
                   {"budget is '30 rows a layer', this plan's is '31 rows a layer'"}));
  EXPECT_TRUE(
      says(refused("snapkv", same, {.method = "pool 5"}), {"calibration is 'none', this plan's is ''"}));
  AnyCompressor fits{plan};
  load_from(fits, bytes, made);
  EXPECT_EQ(fits.retained(1).rows(), 100U);
}

}  // namespace
}  // namespace compresskv
