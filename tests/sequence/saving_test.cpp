// A compressed sequence in a stream: what is written, that it comes back, and that nothing else does.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <ostream>
#include <sstream>
#include <streambuf>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "reference/allocations.hpp"
#include "reference/equal_memory.hpp"
#include "reference/errors.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Random;
using SavedRows = std::vector<std::uint32_t>;

constexpr ModelShape saved_shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 4};
constexpr MadeWith saved_made{.method = "streaming, 4 sinks", .calibration = "none"};
using SavedPlan = Plan<score::StreamingLlm, select::SharedTopK, budget::Uniform>;

SavedPlan saved_plan(Budget budget = Budget::tokens_per_layer(20), const ModelShape& shape = saved_shape,
                     std::size_t window = 8) {
  return {shape, score::StreamingLlm{{.window = window}}, select::SharedTopK{}, budget::Uniform{budget}};
}

/// A cache of any contents: rows are chosen by the test, and only their numbers matter.
struct SavedCache {
  std::vector<float> keys = std::vector<float>(2 * 1000 * 4);
  std::vector<std::size_t> rows = {0, 0};

  StridedKv<float> view() {
    return {keys.data(), keys.data(),
            KvShape{.kv_heads = 2, .head_dim = 4, .allocated_rows = 1000, .head_rows = rows},
            layout::head_token_dim};
  }
};

SavedRows drawn_rows(Random& random, std::size_t of) {
  SavedRows rows;
  const std::size_t one_in = random.between(1, 9);
  for (std::uint32_t row = 0; row < of; ++row) {
    if (random.below(one_in) == 0) {
      rows.push_back(row);
    }
  }
  if (rows.empty() && of > 0) {
    rows.push_back(0);  // a selection keeps one row at least
  }
  return rows;
}

template <class C>
std::string saved_of(const C& compressor, const MadeWith& made = saved_made) {
  std::ostringstream out;
  compressor.save(out, made);
  return out.str();
}
template <class C>
void load_of(C& compressor, const std::string& bytes, const MadeWith& made = saved_made) {
  std::istringstream in(bytes);
  compressor.load(in, made);
}

/// Sequences of any history: turns, selections of any rows, shared or a KV head, tokens taken back.
template <class Plan>
void live(Random& random, Compressor<Plan>& compressor, std::size_t steps) {
  std::size_t tokens = random.between(1, 200);
  SavedRows listed = drawn_rows(random, tokens);
  compressor.begin(tokens,
                   {.keep_first = random.below(3), .keep_last = random.below(4), .positions = listed});
  for (std::size_t step = 0; step < steps; ++step) {
    switch (random.below(4)) {
      case 0:
        tokens += random.between(1, 90);
        listed = drawn_rows(random, tokens);
        compressor.begin_turn(tokens, {.positions = listed});
        break;
      case 1:
        tokens = random.between(1, tokens);
        compressor.truncate(tokens);
        break;
      default: {
        const std::size_t layer = random.below(2);
        SavedCache cache;
        const Held held = compressor.held(tokens);
        cache.rows = {held.rows(layer, 0), held.rows(layer, 1)};
        if (cache.rows[0] == 0 || cache.rows[1] == 0) {
          break;  // all was taken back that a head held
        }
        if (random.coin() && compressor.retained(layer).shared()) {
          compressor.compact(layer, cache.view(),
                             Selection::shared_by_heads(drawn_rows(random, cache.rows[0])));
        } else {
          compressor.compact(layer, cache.view(),
                             Selection::per_head(std::vector<SavedRows>{drawn_rows(random, cache.rows[0]),
                                                                        drawn_rows(random, cache.rows[1])}));
        }
      }
    }
  }
}

/// All that can be asked of the two layers.
template <class C>
void expect_equal_memory(const C& a, const C& b) {
  reference::expect_equal_memory(a, b, 2);
}

TEST(Saving, SequencesOfAnyHistoryComeBackAndGoOn) {
  std::size_t unshared = 0;
  std::size_t compressed = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    const SavedPlan plan = saved_plan();
    Compressor compressor{plan};
    live(random, compressor, seed % 12);
    const std::string bytes = saved_of(compressor);
    const SavedPlan other_plan = saved_plan();
    Compressor loaded{other_plan};
    if (seed % 3 == 0) {
      Random other(seed + 1000);
      live(other, loaded, 6);
    }
    std::istringstream in("before" + bytes + "behind");
    in.seekg(6);
    loaded.load(in, saved_made);
    EXPECT_EQ(static_cast<std::size_t>(in.tellg()), 6 + bytes.size()) << "no byte more was read";
    expect_equal_memory(compressor, loaded);
    EXPECT_EQ(saved_of(loaded), bytes);
    unshared += compressor.retained(0).shared() ? 0U : 1U;

    // What comes next sees tokens announced, protected tokens and capacities, too.
    SavedCache cache;
    for (std::size_t layer = 0; layer < 2; ++layer) {
      std::size_t known = 0;
      for (std::size_t l = 0; l < 2; ++l) {
        known = std::max(known, compressor.retained(l).next_position());
      }
      cache.rows = {compressor.held(known).rows(layer, 0), compressor.held(known).rows(layer, 1)};
      const auto message = [&](auto& by) -> std::string {
        SavedCache own = cache;
        try {
          by.compress(layer, own.view());
          ++compressed;
        } catch (const Error& error) {
          return error.what();
        }
        return "";
      };
      EXPECT_EQ(message(compressor), message(loaded));
    }
    expect_equal_memory(compressor, loaded);
    EXPECT_EQ(saved_of(loaded), saved_of(compressor));
  }
  EXPECT_GT(unshared, 20U);
  EXPECT_GT(compressed, 100U);
}

TEST(Saving, KeysThatWereTurnedGoOnAtTheirRows) {
  const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  compressor.begin(100);
  SavedCache cache;
  for (std::size_t layer = 0; layer < 2; ++layer) {
    cache.rows = {100, 100};
    compressor.compress(layer, cache.view());
    cache.rows = {20, 20};
    compressor.rerotate(layer, cache.view(), kernel::Rotary{});
  }
  Compressor loaded{plan};
  load_of(loaded, saved_of(compressor));
  expect_equal_memory(compressor, loaded);
  EXPECT_EQ(loaded.retained(1).next_position(), 20U);
  loaded.begin_turn(25);
  compressor.begin_turn(25);
  EXPECT_EQ(saved_of(loaded), saved_of(compressor));
}

TEST(Saving, ALayerTurnedAloneIsStillOne) {
  const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  compressor.begin(100);
  SavedCache cache;
  cache.rows = {100, 100};
  compressor.compress(0, cache.view());
  cache.rows = {20, 20};
  compressor.rerotate(0, cache.view(), kernel::Rotary{});
  Compressor loaded{plan};
  load_of(loaded, saved_of(compressor));
  expect_error<ArgumentError>([&] { loaded.begin_turn(120); }, {"since rerotate()"});
}

TEST(Saving, TheBytesAreTheseOnEveryMachine) {
  const Plan plan{ModelShape{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 2},
                  score::StreamingLlm{{.window = 1}}, select::SharedTopK{},
                  budget::Uniform{Budget::tokens_per_layer(3)}};
  Compressor compressor{plan};
  compressor.begin(10, {.keep_first = 258});
  std::vector<float> keys(20);
  const StridedKv kv{keys.data(), keys.data(), KvShape{.kv_heads = 1, .rows = 10, .head_dim = 2},
                     layout::head_token_dim};
  compressor.compact(0, kv, Selection::shared_by_heads(SavedRows{1, 9}));
  const auto number = [](std::uint64_t value, std::size_t width) {
    std::string bytes;
    for (std::size_t i = 0; i < width; ++i, value /= 256) {
      bytes += static_cast<char>(value % 256);
    }
    return bytes;
  };
  std::string body;
  for (const std::uint64_t count : {1U, 1U, 1U, 2U, 0U, 1U}) {  // shape, window
    body += number(count, 8);
  }
  body += number(1, 8) + "m" + number(14, 8) + "3 rows a layer" + number(0, 8);
  body += number(0, 1);                                                                          // not turned
  body += number(258, 8) + number(std::numeric_limits<std::uint64_t>::max(), 8) + number(0, 8);  // protected
  body += number(3, 8) + number(10, 4) + number(10, 4) + number(8 * 2 * 2 * 4, 8) + number(1, 1);
  body += number(1, 8) + number(0x202, 8);
  std::string bytes = "CKVSEQ\r\n" + number(1, 4) + number(body.size(), 8) + body;
  std::uint64_t sum = 0xCBF29CE484222325U;
  for (const char byte : bytes) {
    sum = (sum ^ static_cast<unsigned char>(byte)) * 0x100000001B3U;
  }
  bytes += number(sum, 8);
  EXPECT_EQ(saved_of(compressor, {.method = "m"}), bytes);
}

// ---- what is refused ----

TEST(Saving, WhatDiffersIsSaid) {
  const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  compressor.begin(50);
  const std::string bytes = saved_of(compressor);
  const auto refuse = [&](const SavedPlan& other, const MadeWith& made,
                          std::initializer_list<std::string_view> parts) {
    Compressor by{other};
    by.begin(7);
    const std::string before = saved_of(by);
    expect_error<ArgumentError>([&] { load_of(by, bytes, made); }, parts);
    EXPECT_EQ(saved_of(by), before) << "it is as it was";
  };
  const auto shape_with = [](auto member, std::size_t value) {
    ModelShape shape = saved_shape;
    shape.*member = value;
    return saved_plan(Budget::tokens_per_layer(20), shape);
  };
  refuse(shape_with(&ModelShape::layers, 3), saved_made, {"ModelShape::layers is 2, this plan's is 3"});
  refuse(shape_with(&ModelShape::query_heads, 8), saved_made,
         {"ModelShape::query_heads is 4, this plan's is 8"});
  refuse(shape_with(&ModelShape::kv_heads, 1), saved_made, {"ModelShape::kv_heads is 2, this plan's is 1"});
  refuse(shape_with(&ModelShape::head_dim, 5), saved_made, {"ModelShape::head_dim is 4, this plan's is 5"});
  refuse(shape_with(&ModelShape::kv_row_bytes, 32), saved_made,
         {"ModelShape::kv_row_bytes is 0, this plan's is 32"});
  refuse(saved_plan(Budget::tokens_per_layer(20), saved_shape, 9), saved_made,
         {"window is 8, this plan's is 9"});
  refuse(saved_plan(Budget::kept_ratio(0.1)), saved_made,
         {"budget is '20 rows a layer', this plan's is '0.1 of the prompt'", "compress the context again"});
  refuse(plan, {.method = "another", .calibration = "none"},
         {"method is 'streaming, 4 sinks', this plan's is 'another'"});
  refuse(plan, {.method = saved_made.method, .calibration = std::string_view("\x01\xFFx", 3)},
         {"calibration is 'none', this plan's is '??x'"});
  const std::string long_text(1000, 'y');
  refuse(plan, {.method = saved_made.method, .calibration = long_text},
         {"this plan's is '" + std::string(200, 'y') + "...'"});
  expect_error<ArgumentError>([&] { saved_of(compressor, {}); }, {"MadeWith::method is empty"});
  Compressor loaded{plan};
  expect_error<ArgumentError>([&] { load_of(loaded, bytes, {}); }, {"MadeWith::method is empty"});
  expect_error<ArgumentError>([&] { saved_of(loaded); }, {"begin() was not called"});
}

TEST(Saving, BudgetsOfAnyKindAreToldApart) {
  EXPECT_EQ(Budget::tokens_per_layer(256).text(), "256 rows a layer");
  EXPECT_EQ(Budget::bytes(1 << 20).text(), "1048576 bytes");
  EXPECT_EQ(Budget::kept_ratio(0.12).text(), "0.12 of the prompt");
  EXPECT_NE(Budget::kept_ratio(std::nextafter(0.1, 1.0)).text(), Budget::kept_ratio(0.1).text());
}

/// A saved sequence of some hundred bytes with everything in it.
std::string small_saved() {
  static const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  const SavedRows listed = {3, 40};
  compressor.begin(70, {.keep_first = 1, .keep_last = 2, .positions = listed});
  SavedCache cache;
  cache.rows = {70, 70};
  compressor.compact(0, cache.view(), Selection::per_head(std::vector<SavedRows>{{1, 5, 69}, {2, 40}}));
  return saved_of(compressor);
}

TEST(Saving, EveryDamageIsRefusedAndChangesNothing) {
  const std::string bytes = small_saved();
  ASSERT_LT(bytes.size(), 500U);
  const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  compressor.begin(7);
  const std::string before = saved_of(compressor);
  const auto refuse = [&](const std::string& damaged) {
    expect_error<FileError>([&] { load_of(compressor, damaged); }, {"saved sequence: "});
    ASSERT_EQ(saved_of(compressor), before);
  };
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    refuse(bytes.substr(0, length));
  }
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = bytes;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << bit));
      refuse(damaged);
    }
  }
  const auto refuse_with = [&](const std::string& damaged, std::initializer_list<std::string_view> parts) {
    expect_error<FileError>([&] { load_of(compressor, damaged); }, parts);
  };
  refuse_with("", {"ends within its first bytes", "cut off"});
  refuse_with("this is a text", {"there is none at this place"});
  std::string newer = bytes;
  newer[8] = 2;
  refuse_with(newer, {"has version 2, this library reads version 1", "compress the context again"});
  refuse_with(bytes.substr(0, 100), {"ends within its contents, 80 bytes of "});
  std::string flipped = bytes;
  flipped[100] ^= 1;
  refuse_with(flipped, {"its checksum is not that of its bytes"});
  load_of(compressor, bytes);
  EXPECT_EQ(saved_of(compressor), bytes);
}

/// What somebody wrote who knows the checksum.
std::string sealed(const std::string& body, std::uint64_t length) {
  sequence::SavedWriter head;
  head.number(1, 4);
  head.number(length);
  std::string bytes = std::string(sequence::saved_magic) + std::string(head.bytes()) + body;
  sequence::Checksum sum;
  sum.add(bytes);
  sequence::SavedWriter tail;
  tail.number(sum.value());
  return bytes + std::string(tail.bytes());
}

TEST(Saving, HostileNumbersTakeNoMemory) {
  const std::string bytes = small_saved();
  const std::string body = bytes.substr(20, bytes.size() - 28);
  ASSERT_EQ(sealed(body, body.size()), bytes);
  const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  const std::uint64_t huge = std::numeric_limits<std::uint64_t>::max();
  const auto watch = [] { reference::most_alive = reference::alive.load(); };
  const auto taken = [before = reference::alive.load()] { return reference::most_alive - before; };
  for (const std::uint64_t length : {huge, huge / 2, std::uint64_t{1} << 40U}) {
    watch();
    expect_error<FileError>([&] { load_of(compressor, sealed(body, length)); }, {"ends within its contents"});
    EXPECT_LT(taken(), 200'000U);
  }
  // Any eight bytes of the contents as a number that is too large; most are counts or lengths or positions.
  std::size_t refused = 0;
  for (std::size_t at = 0; at + 8 <= body.size(); ++at) {
    for (const std::uint64_t value : {huge, huge >> 1U, std::uint64_t{1} << 33U, std::uint64_t{0}}) {
      std::string hostile = body;
      for (std::size_t byte = 0; byte < 8; ++byte) {
        hostile[at + byte] = static_cast<char>(value >> (8 * byte) & 0xFFU);
      }
      watch();
      try {
        load_of(compressor, sealed(hostile, hostile.size()));
        // What passes is a sequence: whatever is asked of it is answered or refused.
        const auto copy = compressor;
        expect_equal_memory(compressor, copy);
        const std::string again = saved_of(compressor);
        EXPECT_EQ(again, sealed(hostile, hostile.size())) << at;
      } catch (const Error&) {
        ++refused;
      }
      EXPECT_LT(taken(), 200'000U);
    }
  }
  EXPECT_GT(refused, body.size());
}

TEST(Saving, WhatNoSequenceComesToIsRefused) {
  const SavedPlan plan = saved_plan();
  const std::string bytes = small_saved();
  // Behind the fingerprint: rotation, protected tokens (3 numbers, 2 positions), then the layers.
  const std::string fingerprint = bytes.substr(20, 6 * 8 + 3 * 8 + 18 + 15 + 4);
  const auto refuse = [&](const std::function<void(sequence::SavedWriter&)>& write,
                          std::initializer_list<std::string_view> parts) {
    sequence::SavedWriter rest;
    write(rest);
    const std::string body = fingerprint + std::string(rest.bytes());
    Compressor compressor{plan};
    expect_error<FileError>([&] { load_of(compressor, sealed(body, body.size())); }, parts);
  };
  struct Layer {
    std::uint64_t announced = 70;
    std::uint64_t next = 70;
    std::uint64_t shared = 1;
    std::vector<std::vector<std::uint64_t>> sets = {{1}};
  };
  const auto write_layers = [](sequence::SavedWriter& out, const std::vector<Layer>& layers, int turned = 0,
                               SavedRows listed = {}) {
    out.number(static_cast<std::uint64_t>(turned), 1);
    out.number(0);
    out.number(0);
    out.number(listed.size());
    for (const std::uint32_t position : listed) {
      out.number(position, 4);
    }
    for (const Layer& layer : layers) {
      out.number(20);
      out.number(layer.announced, 4);
      out.number(layer.next, 4);
      out.number(0);
      out.number(layer.shared, 1);
      for (const auto& set : layer.sets) {
        out.number(set.size());
        for (const std::uint64_t word : set) {
          out.number(word);
        }
      }
    }
  };
  using Out = sequence::SavedWriter&;
  const auto loads = [&](const std::vector<Layer>& layers, int turned = 0) {
    sequence::SavedWriter rest;
    write_layers(rest, layers, turned);
    const std::string body = fingerprint + std::string(rest.bytes());
    Compressor compressor{plan};
    load_of(compressor, sealed(body, body.size()));
  };
  loads({{}, {.shared = 0, .sets = {{5, 32}, {}}}});  // the last position is 69
  refuse(
      [&](Out out) {
        write_layers(out, {{}, {.sets = {{5, 64}}}});
      },
      {"has a row at position 70, the layer has seen 70 tokens"});
  refuse([&](Out out) { write_layers(out, {{}, {.sets = {{1, 0}}}}); }, {"its positions end in nothing"});
  refuse([&](Out out) { write_layers(out, {{}, {.next = 71}}); }, {"layer 1 has seen 71 tokens of 70"});
  refuse([&](Out out) { write_layers(out, {{}, {.announced = 71}}); }, {"layer 1 has 71 tokens, layer 0 70"});
  loads({{}, {.announced = 71}}, 1);  // after rerotate layers may go on at positions of their own
  refuse([&](Out out) { write_layers(out, {{}, {.shared = 2}}); }, {"says 2 of its shared positions"});
  refuse([&](Out out) { write_layers(out, {{}, {}}, 3); }, {"says 3 of its rotation"});
  refuse([&](Out out) { write_layers(out, {{}}); }, {"ends within its capacities"});
  refuse([&](Out out) { write_layers(out, {{}, {}, {}}); }, {"bytes behind its end"});
  refuse([&](Out out) { write_layers(out, {{}, {}}, 0, {4, 4}); }, {"protected positions do not ascend"});
  refuse(
      [&](Out out) {
        out.number(0, 1);
        out.number(0);
        out.number(0);
        out.number(1U << 30U);
      },
      {"has 1073741824 protected tokens, and 0 bytes for them"});

  const SavedPlan one_head =
      saved_plan(Budget::tokens_per_layer(20), {.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 1});
  Compressor compressor{one_head};
  compressor.begin(70);
  std::string body = saved_of(compressor);
  body = body.substr(20, body.size() - 28);
  body[body.size() - 8 * 3 - 1] = 0;  // not shared
  expect_error<FileError>([&] { load_of(compressor, sealed(body, body.size())); },
                          {"one KV head that shares its positions with none"});
}

/// Takes so many bytes and no more.
struct FullDisk : std::streambuf {
  std::streamsize left;
  explicit FullDisk(std::streamsize bytes) : left(bytes) {}
  std::streamsize xsputn(const char*, std::streamsize count) override {
    const std::streamsize taken = std::min(count, left);
    left -= taken;
    return taken;
  }
  int overflow(int) override { return traits_type::eof(); }
};

TEST(Saving, AStreamThatDoesNotTakeItIsAnError) {
  const SavedPlan plan = saved_plan();
  Compressor compressor{plan};
  compressor.begin(70);
  const auto size = static_cast<std::streamsize>(saved_of(compressor).size());
  for (std::streamsize bytes = 0; bytes <= size; ++bytes) {
    FullDisk disk(bytes);
    std::ostream out(&disk);
    if (bytes == size) {
      compressor.save(out, saved_made);
    } else {
      expect_error<FileError>([&] { compressor.save(out, saved_made); }, {"the stream does not take it"});
    }
  }
}

}  // namespace
}  // namespace compresskv
