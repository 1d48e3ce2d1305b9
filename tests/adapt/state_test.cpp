// States as libllama writes them, made here byte by byte: what is read of them, what a smaller one is, and
// that each field that is not as it must be is refused by name.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/adapt/llama_cpp/state.hpp>
#include <compresskv/core/element.hpp>
#include <compresskv/core/error.hpp>
#include <compresskv/core/shape.hpp>
#include <compresskv/view/run.hpp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "message_of.hpp"

namespace {

using compresskv::AnyKv;
using compresskv::ArgumentError;
using compresskv::ElementKind;
using compresskv::ModelShape;
using compresskv::llama_cpp::State;
using compresskv::test::message_of;
using compresskv::test::says;
using Bytes = std::vector<std::uint8_t>;

constexpr ModelShape shape{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 32};
constexpr std::size_t width = 64;

struct Type {
  std::int32_t number;
  ElementKind kind;
  std::size_t block;  // elements
  std::size_t bytes;  // of a block
};
constexpr Type f32{0, ElementKind::float32, 1, 4};
constexpr Type f16{1, ElementKind::float16, 1, 2};
constexpr Type bf16{30, ElementKind::bfloat16, 1, 2};
constexpr Type q8_0{8, ElementKind::q8_0, 32, 34};
constexpr Type q4_0{2, ElementKind::q4_0, 32, 18};

/// What a state is made of, each field to be broken.
struct Recipe {
  std::uint32_t magic = 0xaf143cd8;
  std::int32_t sequence = 3;
  std::uint32_t streams = 1;
  std::uint32_t stream = 0;  // that holds the cells
  std::vector<std::int32_t> positions = {0, 1, 2, 3, 4, 5, 6};
  std::uint32_t sequences_a_cell = 1;
  std::int32_t cell_sequence = 3;
  std::uint32_t transposed = 0;
  std::uint32_t layers = 2;
  Type keys = f16;
  Type values = f16;
  std::uint64_t key_bytes_off = 0;
  std::uint64_t value_bytes_off = 0;
  std::uint32_t width_off = 0;
  std::uint32_t cells_off = 0;
};

/// A byte that tells layer, keys or values, position and place in the row apart.
std::uint8_t mark(std::size_t layer, bool value, std::int32_t position, std::size_t byte) {
  return static_cast<std::uint8_t>(layer * 101 + (value ? 57U : 0U) + static_cast<std::size_t>(position) * 7 +
                                   byte * 3);
}

/// Sums of the places where fields lie, by name.
Bytes make(const Recipe& r) {
  Bytes out;
  const auto put = [&](auto value) {
    const std::size_t at = out.size();
    out.resize(at + sizeof(value));
    std::memcpy(out.data() + at, &value, sizeof(value));
  };
  put(r.magic);
  put(r.sequence);
  put(r.streams);
  for (std::uint32_t stream = 0; stream < r.streams; ++stream) {
    if (stream != r.stream || r.positions.empty()) {
      put(std::uint32_t{0});
      continue;
    }
    put(static_cast<std::uint32_t>(r.positions.size()) + r.cells_off);
    for (const std::int32_t position : r.positions) {
      put(position);
      put(r.sequences_a_cell);
      put(r.cell_sequence);
    }
    put(r.transposed);
    put(r.layers);
    const std::size_t key_bytes = width / r.keys.block * r.keys.bytes;
    for (std::size_t layer = 0; layer < r.layers; ++layer) {
      put(r.keys.number);
      put(std::uint64_t{key_bytes} + r.key_bytes_off);
      for (const std::int32_t position : r.positions) {
        for (std::size_t byte = 0; byte < key_bytes; ++byte) {
          put(mark(layer, false, position, byte));
        }
      }
    }
    const std::size_t value_bytes = width / r.values.block * r.values.bytes;
    for (std::size_t layer = 0; layer < r.layers; ++layer) {
      put(r.values.number);
      if (r.transposed == 0) {
        put(std::uint64_t{value_bytes} + r.value_bytes_off);
        for (const std::int32_t position : r.positions) {
          for (std::size_t byte = 0; byte < value_bytes; ++byte) {
            put(mark(layer, true, position, byte));
          }
        }
        continue;
      }
      put(static_cast<std::uint32_t>(r.values.bytes + r.value_bytes_off));
      put(static_cast<std::uint32_t>(width) + r.width_off);
      for (std::size_t element = 0; element < width; ++element) {
        for (const std::int32_t position : r.positions) {
          for (std::size_t byte = 0; byte < r.values.bytes; ++byte) {
            put(mark(layer, true, position, element * r.values.bytes + byte));
          }
        }
      }
    }
  }
  return out;
}

std::string refusal(Bytes bytes) {
  return message_of<ArgumentError>([&] { const State state(bytes, shape); });
}
std::string refusal(const Recipe& recipe) { return refusal(make(recipe)); }

/// Byte `byte` of a row, wherever its units lie.
template <class Run>
std::uint8_t byte_of(const Run& run, std::size_t unit_bytes, std::size_t row, std::size_t byte) {
  const std::size_t unit = byte / unit_bytes;
  const auto at = static_cast<std::ptrdiff_t>(row) * run.row_stride +
                  static_cast<std::ptrdiff_t>(unit / run.chunk) * run.chunk_stride +
                  static_cast<std::ptrdiff_t>(unit % run.chunk);
  return static_cast<const std::uint8_t*>(
      run.base)[static_cast<std::size_t>(at) * unit_bytes + byte % unit_bytes];
}

/// Every byte of every row as its view shows it.
void expect_rows(const State& state, const Recipe& recipe, std::span<const std::int32_t> positions) {
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    const AnyKv view = state.view(layer);
    ASSERT_EQ(view.kv_heads(), shape.kv_heads);
    ASSERT_EQ(view.head_dim(), shape.head_dim);
    ASSERT_EQ(view.key_kind(), recipe.keys.kind);
    ASSERT_EQ(view.value_kind(), recipe.values.kind);
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      ASSERT_EQ(view.rows(head), positions.size());
      for (const bool value : {false, true}) {
        const Type& type = value ? recipe.values : recipe.keys;
        const auto run = value ? view.value_run(head, 0) : view.key_run(head, 0);
        const std::size_t head_bytes = shape.head_dim / type.block * type.bytes;
        for (std::size_t row = 0; row < positions.size(); ++row) {
          for (std::size_t byte = 0; byte < head_bytes; ++byte) {
            ASSERT_EQ(byte_of(run, type.bytes, row, byte),
                      mark(layer, value, positions[row], head * head_bytes + byte))
                << "layer " << layer << " head " << head << " row " << row << " byte " << byte;
          }
        }
      }
    }
  }
}

std::vector<Recipe> kinds() {
  std::vector<Recipe> all;
  for (const Type& keys : {f32, f16, bf16, q8_0, q4_0}) {
    for (const Type& values : {f32, f16, bf16, q8_0, q4_0}) {
      all.push_back({.keys = keys, .values = values});
      if (values.block == 1) {
        all.push_back({.transposed = 1, .keys = keys, .values = values});
      }
    }
  }
  all.push_back({.streams = 4, .stream = 2});
  return all;
}

TEST(LlamaCppState, ViewsShowEveryRowOfEveryTypeInPlace) {
  for (const Recipe& recipe : kinds()) {
    Bytes bytes = make(recipe);
    const State state(bytes, shape);
    ASSERT_EQ(state.cells(), 7U);
    ASSERT_EQ(state.transposed(), recipe.transposed == 1);
    ASSERT_EQ(state.streams(), recipe.streams);
    ASSERT_EQ(state.sequence(), 3);
    expect_rows(state, recipe, recipe.positions);
  }
}

TEST(LlamaCppState, FirstRowsAreTheStateOfTheseCells) {
  for (const Recipe& recipe : kinds()) {
    Bytes bytes = make(recipe);
    const State state(bytes, shape);
    for (std::size_t rows = 1; rows <= 7; ++rows) {
      Recipe smaller = recipe;
      smaller.positions.resize(rows);
      smaller.sequence = smaller.cell_sequence = 5;
      smaller.streams = 2;
      smaller.stream = 0;
      ASSERT_EQ(state.first_rows(smaller.positions, {.streams = 2, .sequence = 5}), make(smaller)) << rows;
    }
  }
  Bytes bytes = make({});
  const State state(bytes, shape);
  EXPECT_TRUE(
      says(message_of<ArgumentError>([&] { state.first_rows({}, {}); }), {"rows to write are 0", "7 cells"}));
  const std::vector<std::int32_t> eight(8);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { state.first_rows(eight, {}); }), {"rows to write are 8"}));
}

TEST(LlamaCppState, CellsThatWereUsedBeforeAreSorted) {
  for (Recipe recipe : kinds()) {
    recipe.positions = {5, 6, 0, 9, 2, 1};
    Bytes bytes = make(recipe);
    State state(bytes, shape);
    state.sort();
    const std::vector<std::int32_t> sorted = {0, 1, 2, 5, 6, 9};
    ASSERT_TRUE(std::ranges::equal(state.positions(), sorted));
    expect_rows(state, recipe, sorted);
  }
  Bytes bytes = make({.positions = {4, 1, 4}});
  State state(bytes, shape);
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { state.sort(); }), {"two cells have position 4"}));
}

TEST(LlamaCppState, OfNoTokenHasNoCells) {
  Bytes bytes = make({.positions = {}});
  EXPECT_EQ(State(bytes, shape).cells(), 0U);
}

TEST(LlamaCppState, EachFieldThatIsNotAsItMustBeIsRefusedByName) {
  EXPECT_TRUE(says(refusal(Recipe{.magic = 7}), {"magic is 7", "must be 2937339096", "libllama 0.5"}));
  EXPECT_TRUE(says(refusal(Recipe{.streams = 0}), {"streams are 0", "1 to 4096"}));
  EXPECT_TRUE(says(refusal(Recipe{.positions = {0, -4}}), {"position of cell 1 is -4"}));
  EXPECT_TRUE(says(refusal(Recipe{.sequences_a_cell = 2}), {"cell 0 is of 2 sequences", "M-RoPE"}));
  EXPECT_TRUE(says(refusal(Recipe{.cell_sequence = 1}), {"cell 0", "first 1", "must be of sequence 3"}));
  EXPECT_TRUE(says(refusal(Recipe{.transposed = 2}), {"transposed is 2", "0 or 1"}));
  EXPECT_TRUE(says(refusal(Recipe{.layers = 3}), {"layers are 3", "the model has 2"}));
  EXPECT_TRUE(says(refusal(Recipe{.keys = {6, ElementKind::q8_0, 32, 22}}),
                   {"keys of layer 0", "ggml's type 6", "q8_0"}));
  EXPECT_TRUE(
      says(refusal(Recipe{.values = {99, ElementKind::float32, 1, 4}}), {"values of layer 0", "type 99"}));
  EXPECT_TRUE(
      says(refusal(Recipe{.key_bytes_off = 2}), {"row of keys of layer 0 has 130 bytes", "have 128"}));
  EXPECT_TRUE(says(refusal(Recipe{.value_bytes_off = 4}), {"row of values of layer 0 has 132 bytes"}));
  EXPECT_TRUE(says(refusal(Recipe{.transposed = 1, .value_bytes_off = 1}),
                   {"element of values", "has 3 bytes", "have 2"}));
  EXPECT_TRUE(
      says(refusal(Recipe{.transposed = 1, .width_off = 8}), {"values of layer 0 are 72 wide", "are 64"}));
  EXPECT_TRUE(says(refusal(Recipe{.transposed = 1, .values = q8_0}), {"quantised", "flash attention"}));
  EXPECT_TRUE(says(refusal(Recipe{.cells_off = 0xfffffff0U}), {"cells are", "cut off"}));

  Bytes two_parts = make({});
  const Bytes second = make({});
  two_parts.insert(two_parts.end(), second.begin() + 8, second.end());
  EXPECT_TRUE(says(refusal(two_parts), {"bytes follow", "sliding-window"}));

  Bytes two_streams = make({.streams = 2});
  two_streams.resize(two_streams.size() - 4);
  const Bytes again = make({});
  two_streams.insert(two_streams.end(), again.begin() + 12, again.end());
  EXPECT_TRUE(says(refusal(two_streams), {"streams 1 and one before it"}));

  Bytes odd = make({.keys = {2, ElementKind::q4_0, 32, 18}, .values = f32});
  ModelShape one = shape;
  one.kv_heads = 2;
  EXPECT_EQ(State(odd, one).cells(), 7U);
}

// ---- a second part: layers that slide ----

/// The first part, and behind it one of another shape and of the last window's cells.
Bytes with_sliding(const Recipe& first, const Recipe& second) {
  Bytes bytes = make(first);
  const Bytes part = make(second);
  bytes.insert(bytes.end(), part.begin() + 8, part.end());
  return bytes;
}
Recipe window_of(Recipe recipe) {
  recipe.layers = 3;
  recipe.positions = {4, 5, 6};
  return recipe;
}
State::Second sliding() { return State::Second::sliding; }
std::string refusal_of_two(Bytes bytes) {
  return message_of<ArgumentError>([&] { const State state(bytes, shape, sliding()); });
}

TEST(LlamaCppState, LayersThatSlideKeepTheirPart) {
  for (const Recipe& recipe : kinds()) {
    const Recipe window = window_of(recipe);
    Bytes bytes = with_sliding(recipe, window);
    const State state(bytes, shape, sliding());
    ASSERT_EQ(state.cells(), 7U);
    expect_rows(state, recipe, recipe.positions);
    for (std::size_t rows = 1; rows <= 7; ++rows) {
      Recipe smaller = recipe;
      smaller.positions.resize(rows);
      Recipe same = window;
      smaller.sequence = smaller.cell_sequence = same.sequence = same.cell_sequence = 5;
      smaller.streams = same.streams = 2;
      smaller.stream = same.stream = 0;
      ASSERT_EQ(state.first_rows(smaller.positions, {.streams = 2, .sequence = 5}),
                with_sliding(smaller, same))
          << rows;
    }
  }
}

TEST(LlamaCppState, LayersThatSlideAreSortedWhereThatIsAskedFor) {
  for (const Recipe& recipe : kinds()) {
    Recipe window = window_of(recipe);
    window.positions = {6, 4, 5};
    Bytes bytes = with_sliding(recipe, window);
    State state(bytes, shape, sliding());
    state.sort();
    const compresskv::llama_cpp::StateTarget same{.streams = recipe.streams, .sequence = 3};
    Recipe first = recipe;
    first.stream = window.stream = 0;
    ASSERT_EQ(state.first_rows(state.positions(), same), with_sliding(first, window));
    state.sort_sliding();
    window.positions = {4, 5, 6};
    ASSERT_EQ(state.first_rows(state.positions(), same), with_sliding(first, window));
  }
  Bytes bytes = with_sliding({}, {.positions = {6, 4, 4}});
  State state(bytes, shape, sliding());
  EXPECT_TRUE(says(message_of<ArgumentError>([&] { state.sort_sliding(); }), {"two cells have position 4"}));
}

TEST(LlamaCppState, SecondPartsThatAreNotAsTheyMustBeAreRefusedByName) {
  EXPECT_TRUE(says(refusal_of_two(make({})), {"state: streams at byte"}));
  const auto broken = [](const Recipe& second) { return refusal_of_two(with_sliding({}, second)); };
  EXPECT_TRUE(says(broken({.streams = 0}), {"streams are 0"}));
  EXPECT_TRUE(says(broken({.positions = {1, 2}}), {"slide is 2, of the others 6", "changed by others"}));
  EXPECT_TRUE(says(broken({.positions = {}}), {"slide is -1, of the others 6"}));
  EXPECT_TRUE(says(broken({.cell_sequence = 1}), {"cell 0", "must be of sequence 3"}));
  EXPECT_TRUE(says(broken({.transposed = 2}), {"transposed is 2"}));
  EXPECT_TRUE(says(broken({.key_bytes_off = ~std::uint64_t{0} / 4}), {"which no memory holds"}));
  Bytes three = with_sliding({}, {});
  const Bytes third = make({});
  three.insert(three.end(), third.begin() + 8, third.end());
  EXPECT_TRUE(says(refusal_of_two(three), {"bytes follow", "more than two parts"}));

  const Bytes whole = with_sliding({}, window_of({.transposed = 1, .keys = q4_0}));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    ASSERT_TRUE(says(refusal_of_two(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size))),
                     {"state:"}))
        << size;
  }
}

TEST(LlamaCppState, CutOffAnywhereItIsRefused) {
  for (const Recipe& recipe :
       {Recipe{}, Recipe{.transposed = 1, .keys = q4_0}, Recipe{.streams = 3, .stream = 1}}) {
    const Bytes whole = make(recipe);
    for (std::size_t size = 0; size < whole.size(); ++size) {
      ASSERT_TRUE(
          says(refusal(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size))), {"state:"}))
          << size;
    }
  }
}

TEST(LlamaCppState, AnyOneByteMayBeWrong) {
  const auto try_all = [](const Bytes& whole, State::Second second) {
    for (std::size_t at = 0; at < whole.size(); ++at) {
      for (const unsigned bits : {0x01U, 0x80U, 0xffU}) {
        Bytes bytes = whole;
        bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ bits);
        // Read as another state, or refused; never past its end.
        try {
          State state(bytes, shape, second);
          state.sort();
          state.sort_sliding();
          state.first_rows(state.positions(), {});
        } catch (const ArgumentError&) {
        }
      }
    }
  };
  for (const Recipe& recipe : {Recipe{}, Recipe{.transposed = 1}}) {
    try_all(make(recipe), State::Second::none);
    try_all(with_sliding(recipe, window_of(recipe)), sliding());
  }
}

}  // namespace
