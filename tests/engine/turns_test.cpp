// A sequence that goes on: prompts in chunks, further turns after evictions, tokens taken back.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "engine/model.hpp"
#include "engine/sequence.hpp"
#include "engine/sequence_checks.hpp"
#include "engine/tiny_model.hpp"
#include "message_of.hpp"

namespace engine {
namespace {

using compresskv::test::message_of;
using compresskv::test::says;
using test::copy;
using test::keep_rows;
using test::near;
using test::plain_frequencies;
using test::random_tokens;
using test::Reference;
using test::TinyModel;
using test::TinyShape;

using Logits = std::vector<std::vector<float>>;  // [position][vocabulary]

// Reads `tokens` at the end of the sequence and appends their logits.
void read(Sequence& sequence, std::span<const TokenId> tokens, Logits& logits, PrefillOptions options = {}) {
  options.on_logits = [&](std::size_t first, const Matrix& tile) {
    EXPECT_EQ(first, logits.size());
    for (Eigen::Index t = 0; t < tile.rows(); ++t) {
      logits.emplace_back(tile.row(t).data(), tile.row(t).data() + tile.cols());
    }
  };
  const std::vector<float> last = copy(sequence.prefill(tokens, options));
  EXPECT_EQ(last, logits.back());
  EXPECT_EQ(sequence.next_position(), logits.size());
}

// Same rows, same bytes, layer by layer and head by head.
testing::AssertionResult same_cache(const Sequence& a, const Sequence& b) {
  for (int l = 0; l < a.model().config().layers; ++l) {
    for (int h = 0; h < a.model().config().kv_heads; ++h) {
      if (a.rows(l, h) != b.rows(l, h)) {
        return testing::AssertionFailure()
               << "layer " << l << ", KV head " << h << ": " << a.rows(l, h) << " rows and " << b.rows(l, h);
      }
      const bool same = with_kv_type(a.kv_type(), [&]<typename T>(T*) {
        const std::size_t bytes =
            a.rows(l, h) * static_cast<std::size_t>(a.model().config().head_dim) * sizeof(T);
        return std::memcmp(a.cache(l).keys<T>(h), b.cache(l).keys<T>(h), bytes) == 0 &&
               std::memcmp(a.cache(l).values<T>(h), b.cache(l).values<T>(h), bytes) == 0;
      });
      if (!same) return testing::AssertionFailure() << "layer " << l << ", KV head " << h << " differs";
    }
  }
  return testing::AssertionSuccess();
}

struct Variant {
  std::string_view name;
  TinyShape shape;
  KvType type = KvType::f32;
};

class Chunks : public testing::TestWithParam<Variant> {};

TEST_P(Chunks, GiveTheBitsOfAPromptInOneGo) {
  const TinyModel tiny{GetParam().shape};
  const Model model = tiny.model(2);
  const std::vector<TokenId> tokens = random_tokens(303, GetParam().shape.vocabulary, 1);
  const std::span prompt = std::span{tokens}.first(300);
  Sequence whole{model, {.kv_type = GetParam().type}};
  Logits expected;
  read(whole, prompt, expected);
  const std::size_t bytes = whole.cache_bytes();
  for (std::size_t t = 300; t < 303; ++t) expected.push_back(copy(whole.decode(tokens[t], t)));

  // On both sides of the engine's tiles: 64 queries, 128 tokens, 256 keys.
  for (const std::vector<std::size_t>& sizes : {std::vector<std::size_t>{150, 150},
                                                {1, 1, 298},
                                                {299, 1},
                                                {63, 64, 65, 108},
                                                {7, 250, 3, 40},
                                                {257, 43}}) {
    SCOPED_TRACE(testing::PrintToString(sizes));
    Sequence sequence{model, {.kv_type = GetParam().type}};
    Logits logits;
    for (const std::size_t size : sizes) read(sequence, prompt.subspan(logits.size(), size), logits);
    EXPECT_EQ(sequence.cache_bytes(), bytes);
    EXPECT_EQ(sequence.prefill_peak_cache_bytes(), bytes);
    for (std::size_t t = 300; t < 303; ++t) logits.push_back(copy(sequence.decode(tokens[t], t)));
    EXPECT_TRUE(logits == expected);
    EXPECT_TRUE(same_cache(sequence, whole));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Chunks,
    testing::Values(Variant{"grouped", {}}, Variant{"bf16", {}, KvType::bf16},
                    Variant{"f16_group_of_nine", {.heads = 9, .kv_heads = 1}, KvType::f16},
                    Variant{"odd_sizes", {.embedding = 33, .feed_forward = 37, .head_dim = 10}}),
    [](const auto& tested) { return std::string{tested.param.name}; });

// The last queries of a chunk are those of the same tokens in a prompt read in one go.
TEST(SequenceTurns, ShowTheQueriesOfTheChunk) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(50, 41, 2);
  using Shown = std::vector<std::vector<float>>;  // [layer]
  const auto last_queries = [&](const std::vector<std::size_t>& sizes) {
    Sequence sequence{model};
    Shown shown;
    for (const std::size_t size : sizes) {
      shown.clear();
      sequence.prefill(std::span{tokens}.subspan(sequence.next_position(), size),
                       {.window = 6,
                        .on_layer =
                            [&](const LayerView& view) {
                              EXPECT_EQ(view.window, std::min<std::size_t>(6, size));
                              const std::size_t count =
                                  view.window * static_cast<std::size_t>(view.heads * view.head_dim);
                              shown.emplace_back(view.queries, view.queries + count);
                            },
                        .on_logits = {}});
    }
    return shown;
  };
  const Shown expected = last_queries({50});
  EXPECT_EQ(last_queries({4, 40, 6}), expected);
  EXPECT_EQ(last_queries({43, 7}), expected);
}

// What goes into each layer's attention, of the tokens just read: the same however the prompt is cut, and in
// the first layer by the token alone.
TEST(SequenceTurns, ShowTheHiddenStatesOfTheChunk) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const auto size = static_cast<std::size_t>(model.config().embedding);
  std::vector<TokenId> tokens = random_tokens(50, 41, 2);
  tokens[30] = tokens[7];
  using Shown = std::vector<std::vector<float>>;  // [layer]
  const auto states = [&](const std::vector<std::size_t>& chunks) {
    Sequence sequence{model};
    Shown shown(static_cast<std::size_t>(model.config().layers));
    for (const std::size_t chunk : chunks) {
      sequence.prefill(std::span{tokens}.subspan(sequence.next_position(), chunk),
                       {.hidden_states = true,
                        .on_layer =
                            [&](const LayerView& view) {
                              EXPECT_EQ(view.tokens, chunk);
                              EXPECT_EQ(static_cast<std::size_t>(view.hidden_size), size);
                              auto& layer = shown[static_cast<std::size_t>(view.layer)];
                              layer.insert(layer.end(), view.hidden_states,
                                           view.hidden_states + chunk * size);
                            },
                        .on_logits = {}});
    }
    return shown;
  };
  const Shown whole = states({50});
  for (std::size_t e = 0; e < size; ++e) {
    EXPECT_EQ(whole[0][30 * size + e], whole[0][7 * size + e]);
  }
  EXPECT_NE(whole[1][30 * size], whole[1][7 * size]);
  EXPECT_EQ(states({4, 40, 6}), whole);
  Sequence sequence{model};
  sequence.prefill(tokens, {.on_layer = [](const LayerView& view) { EXPECT_EQ(view.hidden_states, nullptr); },
                            .on_logits = {}});
}

// What a cache holds by the caller's own books, and when the rest went: every layer and KV head its own.
struct Books {
  struct Head {
    std::vector<std::size_t> positions;   // of its rows
    std::vector<std::size_t> evicted_at;  // [position] -> first position that did not see it
  };
  std::vector<std::vector<Head>> heads;  // [layer][kv_head]
  std::mt19937_64 bits{7};

  explicit Books(const TinyShape& s)
      : heads(static_cast<std::size_t>(s.layers), std::vector<Head>(static_cast<std::size_t>(s.kv_heads))) {}

  void append(Head& head, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      head.positions.push_back(head.evicted_at.size());
      head.evicted_at.push_back(std::numeric_limits<std::size_t>::max());
    }
  }
  void append(std::size_t count) {
    for (auto& layer : heads) {
      for (Head& head : layer) append(head, count);
    }
  }

  // Checks what the view says it holds, and evicts about a share of each head's rows, never the same.
  void evict(LayerView& view, std::size_t chunk, double share) {
    std::vector<std::vector<std::size_t>> kept;
    auto& layer = heads[static_cast<std::size_t>(view.layer)];
    for (std::size_t h = 0; h < layer.size(); ++h) {
      append(layer[h], chunk);
      ASSERT_EQ(view.head_rows[h], layer[h].positions.size());
      ASSERT_LE(view.head_rows[h], view.rows);
      const double own = share * (h == 0 ? 1.0 : 0.6);
      auto& rows = kept.emplace_back();
      std::vector<std::size_t> left;
      for (std::size_t r = 0; r < layer[h].positions.size(); ++r) {
        const std::size_t position = layer[h].positions[r];
        if (static_cast<double>(bits() % 1000) >= 1000.0 * own) {
          rows.push_back(r);
          left.push_back(position);
        } else {
          layer[h].evicted_at[position] = layer[h].evicted_at.size();
        }
      }
      layer[h].positions = left;
    }
    ASSERT_EQ(view.rows, std::ranges::max(view.head_rows));
    keep_rows(view, kept);
  }

  bool visible(int layer, int kv_head, std::size_t position, std::size_t key) const {
    const Head& head = heads[static_cast<std::size_t>(layer)][static_cast<std::size_t>(kv_head)];
    return position < head.evicted_at[key];
  }
};

TEST(SequenceTurns, SeeWhatEachHeadKeptAtItsTruePosition) {
  for (const KvType type : {KvType::f32, KvType::bf16}) {
    const TinyModel tiny{{.heads = 6, .kv_heads = 3}};
    const Model model = tiny.model(2);
    const std::vector<TokenId> tokens = random_tokens(395, tiny.shape.vocabulary, 3);
    Books books{tiny.shape};
    Sequence sequence{model, {.kv_type = type}};
    Logits logits;
    const auto next = [&](std::size_t count) { return std::span{tokens}.subspan(logits.size(), count); };
    const auto chunk = [&](std::size_t count, double share) {
      read(sequence, next(count), logits,
           {.on_layer = [&](LayerView& view) { books.evict(view, count, share); }, .on_logits = {}});
    };
    const auto decode = [&](std::size_t count) {
      for (std::size_t i = 0; i < count; ++i) {
        logits.push_back(copy(sequence.decode(tokens[logits.size()], logits.size())));
      }
      books.append(count);
    };
    chunk(90, 0.7);
    decode(5);
    chunk(20, 0.0);  // heads of unlike lengths, nothing evicted
    chunk(1, 0.5);
    decode(70);  // beyond the room that decoding makes at once
    chunk(130, 0.9);
    read(sequence, next(60), logits);  // nobody looks
    books.append(60);
    chunk(9, 0.3);
    decode(10);

    for (int l = 0; l < tiny.shape.layers; ++l) {
      for (int h = 0; h < tiny.shape.kv_heads; ++h) {
        const auto& head = books.heads[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)];
        EXPECT_EQ(sequence.rows(l, h), head.positions.size());
      }
    }
    const Reference reference{
        tiny, tokens, plain_frequencies(tiny.shape), 1.0,
        [&](int l, int h, std::size_t t, std::size_t k) { return books.visible(l, h, t, k); }};
    ASSERT_EQ(logits.size(), tokens.size());
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      ASSERT_TRUE(near(logits[t], reference.logits[t], type == KvType::f32 ? 2e-4 : 2e-1)) << t;
    }
  }
}

TEST(SequenceTurns, HoldOneLongLayerAtATime) {
  const TinyModel tiny{{.layers = 4}};
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(340, 41, 4);
  const std::size_t row_bytes = 2 * 2 * 8 * sizeof(float);  // K and V of both KV heads
  Sequence sequence{model};
  for (std::size_t first = 0; first < 340; first += 85) {
    sequence.prefill(std::span{tokens}.subspan(first, 85),
                     {.on_layer = [](LayerView& view) { view.shrink(20); }, .on_logits = {}});
    EXPECT_EQ(sequence.cache_bytes(), 4 * 20 * row_bytes);
  }
  EXPECT_EQ(sequence.prefill_peak_cache_bytes(), (4 * 20 + 85) * row_bytes);
}

TEST(SequenceTurns, LeaveNoRoomBehindTheRows) {
  const TinyModel tiny;
  const Model model = tiny.model();
  Sequence sequence{model};
  sequence.prefill(random_tokens(30, 41, 5), {.on_layer =
                                                  [](LayerView& view) {
                                                    view.shrink(std::vector<std::size_t>{3, 20});
                                                  },
                                              .on_logits = {}});
  for (std::size_t t = 30; t < 40; ++t) sequence.decode(1, t);
  std::size_t widest = 0;
  sequence.prefill(
      random_tokens(5, 41, 6),
      {.on_layer = [&](const LayerView& view) { widest = view.allocated_rows; }, .on_logits = {}});
  EXPECT_EQ(widest, 35U);
  EXPECT_EQ(sequence.rows(0, 0), 18U);
  EXPECT_EQ(sequence.rows(0, 1), 35U);
  EXPECT_EQ(sequence.cache_bytes(), 2 * (18 + 35) * 2 * 8 * sizeof(float));
}

TEST(SequenceTurns, StartAnewWhereACallbackThrows) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(40, 41, 7);
  Sequence sequence{model};
  sequence.prefill(tokens);
  EXPECT_THROW(sequence.prefill(tokens, {.on_layer =
                                             [](LayerView& view) {
                                               view.shrink(9);
                                               if (view.layer == 1) throw std::runtime_error("stop");
                                             },
                                         .on_logits = {}}),
               std::runtime_error);
  EXPECT_EQ(sequence.next_position(), 0U);
  EXPECT_EQ(sequence.cache_bytes(), 0U);
  Sequence fresh{model};
  EXPECT_EQ(copy(sequence.prefill(tokens)), copy(fresh.prefill(tokens)));
}

TEST(SequenceTurns, RefuseWhatDoesNotFitAndChangeNothing) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> tokens = random_tokens(40, 41, 8);
  Sequence sequence{model};
  sequence.prefill(tokens);
  const Sequence before = sequence.clone();
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill(random_tokens(361, 41, 1)); }),
                   {"401 tokens", "context holds 400"}));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill({}); }), {"no tokens"}));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.prefill(std::vector<TokenId>{1, 41}); }), {"41"}));
  EXPECT_TRUE(same_cache(sequence, before));
  EXPECT_EQ(copy(sequence.logits()), copy(before.logits()));
  EXPECT_EQ(sequence.next_position(), 40U);

  Sequence shadowed{model};
  shadowed.prefill(tokens, {.on_layer =
                                [](LayerView& view) {
                                  if (view.layer == 1) view.shadow();
                                },
                            .on_logits = {}});
  EXPECT_TRUE(
      says(message_of<Error>([&] { shadowed.prefill(tokens); }), {"prefill", "layer 1 has a shadow"}));
  EXPECT_TRUE(says(message_of<Error>([&] { shadowed.truncate(39); }), {"truncate", "layer 1 has a shadow"}));
}

// ---- truncate ----

// Keeps rows as a compression does, a different number in each layer and head.
void keep_some(LayerView& view) {
  std::vector<std::vector<std::size_t>> kept(view.head_rows.size());
  for (std::size_t h = 0; h < kept.size(); ++h) {
    const std::size_t step = 2 + h + static_cast<std::size_t>(view.layer);
    for (std::size_t r = 0; r < view.head_rows[h]; r += step) kept[h].push_back(r);
  }
  keep_rows(view, kept);
}

TEST(Truncate, TokensTakenBackLeaveNoTrace) {
  const TinyModel tiny;
  const Model model = tiny.model(2);
  const std::vector<TokenId> prompt = random_tokens(100, 41, 9);
  const std::vector<TokenId> right = random_tokens(30, 41, 10);
  const std::vector<TokenId> wrong = random_tokens(90, 41, 11);
  for (const KvType type : {KvType::f32, KvType::f16}) {
    for (const bool compressed : {false, true}) {
      for (const std::size_t drafted : {1UL, 5UL, 90UL}) {
        SCOPED_TRACE(testing::Message() << compressed << " " << drafted);
        PrefillOptions options;
        if (compressed) options.on_layer = keep_some;
        Sequence straight{model, {.kv_type = type}};
        straight.prefill(prompt, options);
        Sequence drafting = straight.clone();
        for (std::size_t i = 0; i < right.size(); ++i) {
          straight.decode(right[i], 100 + i);
          if (i % 10 == 0) {
            // Decoded or read as a chunk, the draft goes.
            if (i == 10) {
              drafting.prefill(std::span{wrong}.first(drafted));
            } else {
              for (std::size_t k = 0; k < drafted; ++k) drafting.decode(wrong[k], 100 + i + k);
            }
            EXPECT_EQ(drafting.next_position(), 100 + i + drafted);
            drafting.truncate(100 + i);
            EXPECT_EQ(drafting.next_position(), 100 + i);
          }
          drafting.decode(right[i], 100 + i);
          ASSERT_EQ(copy(drafting.logits()), copy(straight.logits())) << i;
        }
        EXPECT_TRUE(same_cache(drafting, straight));
      }
    }
  }
}

// Positions behind the last compression: the caller knows how many rows stand before them.
TEST(Truncate, ReachesIntoCompressedRows) {
  const TinyModel tiny;
  const Model model = tiny.model();
  const std::vector<TokenId> prompt = random_tokens(100, 41, 12);
  Sequence sequence{model};
  sequence.prefill(prompt, {.on_layer = keep_some, .on_logits = {}});
  for (std::size_t t = 100; t < 105; ++t) sequence.decode(1, t);
  const Sequence before = sequence.clone();
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.truncate(99); }), {"position 99", "before 100"}));
  const auto left_before_60 = [](int layer, int head) {
    const auto step = static_cast<std::size_t>(2 + head + layer);
    return (60 + step - 1) / step;
  };
  EXPECT_TRUE(says(message_of<Error>([&] {
                     sequence.truncate(
                         60, [&](int l, int h) { return l == 1 && h == 1 ? 31U : left_before_60(l, h); });
                   }),
                   {"layer 1, KV head 1", "31 rows", "of 30"}));
  EXPECT_TRUE(same_cache(sequence, before));
  sequence.truncate(60, left_before_60);
  EXPECT_EQ(sequence.next_position(), 60U);
  EXPECT_EQ(sequence.rows(0, 0), 30U);
  EXPECT_EQ(sequence.rows(1, 1), 15U);
  sequence.prefill(std::span{prompt}.subspan(60, 30));
  sequence.truncate(60);  // appended since, so the rows are known

  // The same rows in a sequence that never read further.
  Sequence other{model};
  other.prefill(std::span{prompt}.first(60), {.on_layer = keep_some, .on_logits = {}});
  EXPECT_TRUE(same_cache(sequence, other));
  EXPECT_EQ(copy(sequence.decode(7, 60)), copy(other.decode(7, 60)));
}

TEST(Truncate, RefusesPositionsThatAreNot) {
  const TinyModel tiny;
  const Model model = tiny.model();
  Sequence sequence{model};
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.truncate(1); }), {"position 1", "0 tokens"}));
  sequence.prefill(random_tokens(20, 41, 13));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.truncate(21); }), {"position 21", "20 tokens"}));
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.truncate(0); }), {"position is 0", "new sequence"}));
  EXPECT_NO_THROW(sequence.truncate(20));
  EXPECT_NO_THROW(sequence.truncate(3));
  EXPECT_EQ(sequence.rows(1, 1), 3U);
}

// Keys re-rotated to their rows: the sequence goes on at the row count, and rows before are not contiguous.
TEST(Truncate, KnowsWhereContiguousPositionsBegin) {
  const TinyModel tiny;
  const Model model = tiny.model();
  Sequence sequence{model};
  sequence.prefill(random_tokens(20, 41, 14));
  sequence.decode(1, 12);
  sequence.decode(2, 13);
  EXPECT_TRUE(says(message_of<Error>([&] { sequence.truncate(11); }), {"position 11", "before 12"}));
  sequence.truncate(13);
  EXPECT_EQ(sequence.rows(0, 0), 21U);
}

}  // namespace
}  // namespace engine
