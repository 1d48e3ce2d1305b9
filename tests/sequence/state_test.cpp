// What a sequence remembers, beside the plainest memory there is: a list of positions for each KV head.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/sequence/compaction.hpp>
#include <compresskv/sequence/state.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv::sequence {
namespace {

using reference::expect_error;
using reference::Random;
using Rows = std::vector<std::uint32_t>;

constexpr std::size_t layers = 3;
constexpr std::size_t kv_heads = 2;
constexpr ModelShape shape{.layers = layers, .query_heads = 4, .kv_heads = kv_heads, .head_dim = 4};
constexpr std::size_t room = 400;

/// A state with caches that follow it, and the lists that it must agree with.
struct Followed {
  State state{layers, kv_heads};
  Compaction compaction{1};
  Workspace workspace;
  SerialExecutor executor;
  std::vector<float> keys = std::vector<float>(kv_heads * room * 4);
  std::vector<float> values = keys;
  std::vector<std::vector<Rows>> positions =
      std::vector<std::vector<Rows>>(layers, std::vector<Rows>(kv_heads));  // [layer][KV head]
  std::size_t tokens = 0;

  void begin(std::size_t count) {
    state.prepare_sequence(count, {});
    state.start_sequence(count, {});
    for (auto& heads : positions) {
      std::fill(heads.begin(), heads.end(), Rows{});
    }
    tokens = 0;
    append(count);
  }
  void append(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i, ++tokens) {
      for (auto& heads : positions) {
        for (Rows& rows : heads) {
          rows.push_back(static_cast<std::uint32_t>(tokens));
        }
      }
    }
  }
  void turn() {
    state.prepare_turn(tokens, {});
    state.start_turn(tokens, {});
  }
  void truncate(std::size_t position) {
    state.truncate(position);
    for (auto& heads : positions) {
      for (Rows& rows : heads) {
        rows.erase(std::lower_bound(rows.begin(), rows.end(), position), rows.end());
      }
    }
    tokens = (std::min)(tokens, position);
  }
  void keep(std::size_t layer, const Selection& selection) {
    std::vector<std::size_t> lengths;
    for (const Rows& rows : positions[layer]) {
      lengths.push_back(rows.size());
    }
    const StridedKv<float> kv{
        std::span(keys), std::span(values),
        KvShape{.kv_heads = kv_heads, .head_dim = 4, .allocated_rows = room, .head_rows = lengths},
        layout::head_token_dim};
    compaction.start();
    compaction.stage(state, shape, layer, kv, kv, selection, workspace);
    compaction.commit(state, layer, kv, kv, selection, workspace, executor);
    for (std::size_t head = 0; head < kv_heads; ++head) {
      Rows left;
      for (const std::uint32_t row : selection.rows(head)) {
        left.push_back(positions[layer][head][row]);
      }
      positions[layer][head] = left;
    }
  }

  void expect_agrees() const {
    for (std::size_t layer = 0; layer < layers; ++layer) {
      for (std::size_t head = 0; head < kv_heads; ++head) {
        const Rows& rows = positions[layer][head];
        ASSERT_EQ(state.held(tokens).rows(layer, head), rows.size()) << layer << ' ' << head;
        for (std::size_t row = 0; row < rows.size(); ++row) {
          ASSERT_EQ(state.layer(layer).position(row, head), rows[row]);
        }
      }
    }
  }
};

Rows some_rows(Random& random, std::size_t count) {
  Rows rows;
  for (std::uint32_t row = 0; row < count; ++row) {
    if (random.below(3) > 0) {
      rows.push_back(row);
    }
  }
  if (rows.empty()) {
    rows.push_back(0);
  }
  return rows;
}

TEST(State, KnowsWhatStandsInEachRowWhateverHappens) {
  Random random(71);
  for (int sequence = 0; sequence < 60; ++sequence) {
    Followed followed;
    followed.begin(random.between(1, 90));
    for (int step = 0; step < 30; ++step) {
      switch (random.below(5)) {
        case 0:
          followed.append((std::min)(random.below(9), room - 1 - followed.tokens));
          break;
        case 1:
          followed.turn();
          break;
        case 2:
          // The last tokens of the prompt are in every cache: a layer never loses all its rows.
          followed.truncate((std::max<std::size_t>)(followed.tokens - random.below(3), 1));
          break;
        default: {
          followed.turn();  // what was appended is announced
          const std::size_t layer = random.below(layers);
          const auto& heads = followed.positions[layer];
          if (heads[0].empty() || heads[1].empty()) {
            break;
          }
          if (random.coin() && heads[0].size() == heads[1].size()) {
            followed.keep(layer, Selection::shared_by_heads(some_rows(random, heads[0].size())));
          } else {
            followed.keep(layer, Selection::per_head(std::vector<Rows>{some_rows(random, heads[0].size()),
                                                                       some_rows(random, heads[1].size())}));
          }
        }
      }
      followed.expect_agrees();
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(State, RowsAboveThoseAnnouncedAndBelowThoseKeptAreNamed) {
  Followed followed;
  followed.begin(50);
  followed.keep(1, Selection::shared_by_heads(Rows{0, 7, 49}));
  const auto all = [](std::size_t rows) { return [=](std::size_t) { return rows; }; };
  followed.state.check_rows(1, all(3));
  expect_error<ArgumentError>(
      [&] { followed.state.check_rows(1, all(4)); },
      {"layer 1 KV head 0 has 4 rows", "at most 3", "0 of the 50 tokens", "begin_turn()"});
  expect_error<ArgumentError>([&] { followed.state.check_rows(1, all(2)); },
                              {"layer 1 KV head 0 has 2 rows", "at least 3"});
  expect_error<ArgumentError>(
      [&] { followed.state.check_rows(0, [](std::size_t head) { return 50 - head; }); },
      {"layer 0 KV head 1 has 49 rows", "at least 50"});
  followed.append(5);
  followed.turn();
  followed.state.check_rows(1, all(8));
  followed.state.check_rows(1, all(3));
  expect_error<ArgumentError>([&] { followed.state.check_rows(1, all(9)); }, {"has 9 rows", "at most 8"});
  expect_error<ArgumentError>(
      [&] { followed.state.check_rows(1, [](std::size_t head) { return 8 - head; }); },
      {"KV head 1 has 4 rows appended, KV head 0 has 5", "append every token"});
  expect_error<ArgumentError>([&] { followed.state.check_all_rows(1, all(7)); },
                              {"has 7 rows, expected the 8", "view all of them"});
}

TEST(State, ATurnThatWasPreparedAndNotStartedChangesNothing) {
  Followed followed;
  followed.begin(20);
  followed.append(10);
  const Rows listed{3, 8};
  followed.state.prepare_turn(30, {.keep_first = 2, .keep_last = 5, .positions = listed});
  followed.state.next_capacities()[0] = 1;
  EXPECT_EQ(followed.state.capacities()[0], 20U);
  expect_error<ArgumentError>([&] { followed.state.check_rows(0, [](std::size_t) { return 21U; }); },
                              {"has 21 rows", "at most 20"});
  followed.state.start_turn(30, {.keep_first = 2, .keep_last = 5, .positions = listed});
  EXPECT_EQ(followed.state.capacities()[0], 1U);
  followed.state.check_rows(0, [](std::size_t) { return 30U; });
}

TEST(State, RefusesBeforeTheFirstTurnAndPositionZero) {
  State state(layers, kv_heads);
  expect_error<ArgumentError>([&] { state.check_layer(0); }, {"begin() was not called"});
  expect_error<ArgumentError>([&] { state.prepare_turn(3, {}); }, {"begin() was not called", "begin_turn()"});
  expect_error<ArgumentError>([&] { state.truncate(3); }, {"begin() was not called"});
  expect_error<ArgumentError>([&] { static_cast<void>(state.held(3)); }, {"begin() was not called"});
  expect_error<ArgumentError>([&] { state.prepare_sequence(0, {}); }, {"prompt_tokens is 0"});
  state.prepare_sequence(9, {});
  state.start_sequence(9, {});
  expect_error<ArgumentError>([&] { state.check_layer(3); }, {"layer is 3", "0 to 2"});
  expect_error<ArgumentError>([&] { state.truncate(0); }, {"position is 0", "begin()"});
  expect_error<ArgumentError>([&] { state.prepare_turn(8, {}); }, {"total_tokens is 8", "has seen 9"});
}

}  // namespace
}  // namespace compresskv::sequence
