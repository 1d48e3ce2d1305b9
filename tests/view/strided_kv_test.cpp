#include <gtest/gtest.h>

#include <compresskv/view/kv_view.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"

namespace compresskv {
namespace {

using reference::expect_error;

/// Element `e` of row `r`, by the formula that view/run.hpp states.
template <class T>
T* element(const Run<T>& run, std::size_t r, std::size_t e) {
  return run.base + static_cast<std::ptrdiff_t>(r) * run.row_stride +
         static_cast<std::ptrdiff_t>(e / run.chunk) * run.chunk_stride +
         static_cast<std::ptrdiff_t>(e % run.chunk);
}

TEST(StridedKv, RunsReachEveryElementInEveryArrangement) {
  for (const reference::Arrangement arrangement : reference::all_arrangements) {
    for (const std::size_t allocated : {0U, 9U}) {
      for (const std::size_t head_dim : {1U, 6U}) {
        reference::Cache<float, half> cache(
            {.kv_heads = 3, .rows = 7, .head_dim = head_dim, .allocated_rows = allocated}, arrangement);
        const auto view = cache.view();
        EXPECT_EQ(view.kv_heads(), 3U);
        EXPECT_EQ(view.head_dim(), head_dim);
        EXPECT_EQ(kv_row_bytes(view), head_dim * 6);
        for (std::size_t head = 0; head < 3; ++head) {
          EXPECT_EQ(view.rows(head), 7U);
          ASSERT_EQ(view.run_count(head), 1U);
          const auto keys = view.key_run(head, 0);
          const auto values = view.value_run(head, 0);
          EXPECT_EQ(keys.rows, 7U);
          EXPECT_EQ(values.rows, 7U);
          for (std::size_t row = 0; row < 7; ++row) {
            EXPECT_EQ(keys.row(row), element(keys, row, 0));
            for (std::size_t e = 0; e < head_dim; ++e) {
              EXPECT_EQ(element(keys, row, e), cache.keys.data() + cache.at(head, row, e));
              EXPECT_EQ(element(values, row, e), cache.values.data() + cache.at(head, row, e));
            }
          }
        }
      }
    }
  }
}

TEST(StridedKv, LayoutsAreWhatTheirNamesSay) {
  std::vector<float> keys(2 * 10 * 4);
  std::vector<float> values(2 * 10 * 4);
  const KvShape shape{.kv_heads = 2, .rows = 6, .head_dim = 4, .allocated_rows = 10};
  const StridedKv heads_first{keys.data(), values.data(), shape, layout::head_token_dim};
  EXPECT_EQ(heads_first.key_run(1, 0).base, keys.data() + 10 * 4);
  EXPECT_EQ(heads_first.key_run(1, 0).row_stride, 4);
  const StridedKv rows_first{keys.data(), values.data(), shape, layout::token_head_dim};
  EXPECT_EQ(rows_first.value_run(1, 0).base, values.data() + 4);
  EXPECT_EQ(rows_first.value_run(1, 0).row_stride, 8);
  // A layout of the user's own: any function that gives strides.
  const auto odd = [](const layout::Extents& e) {
    return layout::Strides{.head = e.rows * e.units, .row = e.units / 2, .chunk = 2, .chunk_stride = 20};
  };
  const StridedKv own{keys.data(), values.data(), shape, odd};
  EXPECT_EQ(element(own.key_run(1, 0), 5, 3), keys.data() + 40 + 5 * 2 + 20 + 1);
  // Keys and values each their own: values transposed, keys split as paged pools split them.
  const StridedKv mixed{keys.data(), values.data(), shape, layout::SplitDim{2}, layout::head_dim_token};
  EXPECT_EQ(element(mixed.key_run(1, 0), 5, 3), keys.data() + 40 + 5 * 2 + 20 + 1);
  EXPECT_EQ(element(mixed.value_run(1, 0), 5, 3), values.data() + 40 + 5 + 30);
}

TEST(StridedKv, RejectsNullBuffersByName) {
  std::vector<float> buffer(64);
  const KvShape shape{.kv_heads = 2, .rows = 4, .head_dim = 8};
  float* null = nullptr;
  expect_error<ArgumentError>([&] { StridedKv(null, buffer.data(), shape, layout::head_token_dim); },
                              {"StridedKv: keys is null"});
  expect_error<ArgumentError>([&] { StridedKv(buffer.data(), null, shape, layout::head_token_dim); },
                              {"StridedKv: values is null", "give the layer's buffer"});
}

TEST(StridedKv, RejectsSizesOfZero) {
  std::vector<float> buffer(64);
  const auto make = [&](const KvShape& shape) {
    StridedKv(buffer.data(), buffer.data(), shape, layout::head_token_dim);
  };
  expect_error<ArgumentError>([&] { make({.kv_heads = 0, .rows = 4, .head_dim = 8}); },
                              {"shape has 0 KV heads, 4 rows, head_dim 8", "at least 1"});
  expect_error<ArgumentError>([&] { make({.kv_heads = 2, .rows = 0, .head_dim = 8}); },
                              {"shape has 2 KV heads, 0 rows, head_dim 8"});
  expect_error<ArgumentError>([&] { make({.kv_heads = 2, .rows = 4, .head_dim = 0}); },
                              {"shape has 2 KV heads, 4 rows, head_dim 0"});
}

TEST(StridedKv, RejectsMoreRowsThanAllocated) {
  std::vector<float> buffer(64);
  const KvShape shape{.kv_heads = 1, .rows = 5, .head_dim = 8, .allocated_rows = 4};
  expect_error<ArgumentError>([&] { StridedKv(buffer.data(), buffer.data(), shape, layout::head_token_dim); },
                              {"StridedKv: 5 rows in use, only 4 allocated"});
}

TEST(StridedKv, RejectsStridesThatLayRowsOverEachOther) {
  std::vector<float> buffer(1000);
  const KvShape shape{.kv_heads = 2, .rows = 5, .head_dim = 8};
  const auto make = [&](const KvShape& s, const layout::Strides& strides) {
    StridedKv<float>(buffer.data(), buffer.data(), s, strides);
  };
  expect_error<ArgumentError>([&] { make(shape, {.head = 40, .row = 7}); },
                              {"StridedKv keys: row stride is 7", "covers 8", "rows would overlap"});
  expect_error<ArgumentError>([&] { make(shape, {.head = 39, .row = 8}); },
                              {"head stride is 39", "covers 40"});
  expect_error<ArgumentError>([&] { make(shape, {.head = 40, .row = 8, .chunk = 1}); },
                              {"chunk stride is 0"});
  expect_error<ArgumentError>([&] { make(shape, {.head = 0, .row = 8}); }, {"head stride is 0"});
  expect_error<ArgumentError>([&] { make(shape, {.head = 40, .row = 1, .chunk = 1, .chunk_stride = 4}); },
                              {"chunk stride is 4", "covers 5"});
  expect_error<ArgumentError>([&] { make(shape, {.head = 40, .row = 8, .chunk = 3, .chunk_stride = 3}); },
                              {"chunks of 3 do not divide a row of 8 units"});
  // Of an axis with one entry the stride is never used.
  EXPECT_NO_THROW(make({.kv_heads = 1, .rows = 5, .head_dim = 8}, {.head = 0, .row = 8}));
  EXPECT_NO_THROW(
      make({.kv_heads = 2, .rows = 5, .head_dim = 1}, {.head = 5, .row = 1, .chunk = 1, .chunk_stride = 0}));
  EXPECT_NO_THROW(make(shape, {.head = 8, .row = 16}));
}

TEST(StridedKv, RejectsRowsThatLeaveTheirBuffer) {
  std::vector<float> keys(79);
  std::vector<float> values(80);
  const KvShape shape{.kv_heads = 2, .rows = 4, .head_dim = 8, .allocated_rows = 5};
  const auto make = [&](const KvShape& s) {
    StridedKv(std::span(keys), std::span(values), s, layout::head_token_dim);
  };
  EXPECT_NO_THROW(make(shape)) << "the row that is not there is not in use";
  KvShape full = shape;
  full.rows = 5;
  expect_error<ArgumentError>(
      [&] { make(full); },
      {"StridedKv keys: 2 KV heads of 5 rows reach 80 units, the buffer has 79", "give the whole buffer"});
  keys.resize(80);
  EXPECT_NO_THROW(make(full));
}

TEST(StridedKv, HeadsMayHoldDifferentNumbersOfRows) {
  std::vector<float> buffer(2 * 6 * 8);
  const std::vector<std::size_t> head_rows{2, 6};
  const KvShape shape{.kv_heads = 2, .head_dim = 8, .head_rows = head_rows};
  const StridedKv ragged{buffer.data(), buffer.data(), shape, layout::head_token_dim};
  EXPECT_EQ(ragged.rows(0), 2U);
  EXPECT_EQ(ragged.rows(1), 6U);
  EXPECT_EQ(ragged.key_run(0, 0).rows, 2U);
  EXPECT_EQ(ragged.value_run(1, 0).rows, 6U);
  EXPECT_EQ(ragged.key_run(1, 0).base, buffer.data() + 48)
      << "room for the longest, where nothing else is said";
  const auto make = [&](const KvShape& s) {
    StridedKv(buffer.data(), buffer.data(), s, layout::head_token_dim);
  };
  KvShape three = shape;
  three.kv_heads = 3;
  expect_error<ArgumentError>([&] { make(three); }, {"2 head_rows for 3 KV heads", "one length a head"});
  const std::vector<std::size_t> empty{2, 0};
  expect_error<ArgumentError>([&] { make({.kv_heads = 2, .head_dim = 8, .head_rows = empty}); },
                              {"head_rows of KV head 1 is 0"});
  expect_error<ArgumentError>(
      [&] { make({.kv_heads = 2, .head_dim = 8, .allocated_rows = 5, .head_rows = head_rows}); },
      {"6 rows in use, only 5 allocated"});
}

TEST(StridedKv, StridesMayStandBareForALayout) {
  std::vector<float> buffer(2 * 5 * 8);
  const KvShape shape{.kv_heads = 2, .rows = 5, .head_dim = 8};
  const StridedKv one{buffer.data(), buffer.data(), shape, {.head = 8, .row = 16}};
  EXPECT_EQ(one.value_run(1, 0).base, buffer.data() + 8);
  const std::span<float> whole = buffer;
  const StridedKv<float> two(whole, whole, shape, {.head = 8, .row = 16}, {.head = 40, .row = 8});
  EXPECT_EQ(two.key_run(1, 0).row_stride, 16);
  EXPECT_EQ(two.value_run(1, 0).base, buffer.data() + 40);
}

TEST(StridedKv, RejectsRowsThatBlocksDoNotDivide) {
  std::vector<BlockQ8_0> blocks(64);
  expect_error<ArgumentError>(
      [&] {
        StridedKv(blocks.data(), blocks.data(), KvShape{.kv_heads = 1, .rows = 4, .head_dim = 48},
                  layout::head_token_dim);
      },
      {"StridedKv keys: head_dim is 48", "the 32 elements of a quantised block"});
}

TEST(StridedKv, RejectsStridesBeyondMemory) {
  std::vector<float> buffer(1000);
  const KvShape shape{.kv_heads = 2, .rows = 5, .head_dim = 8};
  const std::size_t huge = std::numeric_limits<std::size_t>::max() / 4;
  expect_error<ArgumentError>(
      [&] { StridedKv<float>(buffer.data(), buffer.data(), shape, layout::Strides{.head = huge, .row = 8}); },
      {"head stride", "times 2", "does not fit in memory"});
}

// Each product wraps to 0 or to a size that the buffer has.
TEST(StridedKv, RejectsSizesWhoseProductWraps) {
  std::vector<float> buffer(1000);
  const auto make = [&](std::size_t allocated, std::size_t head_dim, std::size_t kv_heads, auto layout) {
    const KvShape shape{.kv_heads = kv_heads, .rows = 5, .head_dim = head_dim, .allocated_rows = allocated};
    StridedKv(std::span(buffer), std::span(buffer), shape, layout);
  };
  const auto refused = [&](std::size_t allocated, std::size_t head_dim, std::size_t kv_heads) {
    const auto each = [&](auto layout) {
      expect_error<ArgumentError>([&] { make(allocated, head_dim, kv_heads, layout); },
                                  {"StridedKv keys: " + std::to_string(kv_heads) + " KV heads of " +
                                       std::to_string(allocated) + " rows of " + std::to_string(head_dim),
                                   "do not fit in memory"});
    };
    each(layout::head_token_dim);
    each(layout::token_head_dim);
    each(layout::head_dim_token);
    each(layout::SplitDim{2});
  };
  refused((std::size_t{1} << 61U) + 5, 8, 2);  // rows * head_dim = 40
  refused(std::size_t{1} << 60U, 8, 2);        // twice that is 0
  refused(5, std::size_t{1} << 62U, 2);        // head_dim * kv_heads * rows
  refused(5, 8, (std::size_t{1} << 61U) + 2);  // kv_heads * head_dim = 16
  refused(std::size_t{1} << 61U, 1, 1);        // bytes: a fourth of it are units
  // Bare strides ask for no allocated rows: what stands there is not looked at.
  EXPECT_NO_THROW(make(std::numeric_limits<std::size_t>::max(), 8, 2, layout::Strides{.head = 8, .row = 16}));
  // A pointer alone may be as large as memory, and no larger.
  const KvShape shape{.kv_heads = 2, .rows = 5, .head_dim = 8};
  const std::size_t most = detail::max_bytes / sizeof(float) - 5 * 8;
  EXPECT_NO_THROW(StridedKv(buffer.data(), buffer.data(), shape, layout::Strides{.head = most, .row = 8}));
  expect_error<ArgumentError>(
      [&] { StridedKv(buffer.data(), buffer.data(), shape, layout::Strides{.head = most + 1, .row = 8}); },
      {"StridedKv keys: head stride 2305843009213693912 times 2 does not fit in memory"});
}

TEST(StridedKv, RejectsMoreRowsThanPositionsCount) {
  std::vector<float> buffer(10);
  std::vector<std::size_t> lengths{1, std::size_t{1} << 32U};
  const auto make = [&](const KvShape& shape) {
    StridedKv(buffer.data(), buffer.data(), shape, layout::head_token_dim);
  };
  EXPECT_NO_THROW(make({.kv_heads = 1, .rows = 4294967295U, .head_dim = 1}));
  EXPECT_NO_THROW(make({.kv_heads = 1, .rows = 1, .head_dim = 1, .allocated_rows = std::size_t{1} << 33U}));
  expect_error<ArgumentError>([&] { make({.kv_heads = 1, .rows = std::size_t{1} << 32U, .head_dim = 1}); },
                              {"StridedKv: 4294967296 rows in use", "32 bits", "at most 4294967295"});
  expect_error<ArgumentError>([&] { make({.kv_heads = 2, .head_dim = 1, .head_rows = lengths}); },
                              {"StridedKv: 4294967296 rows in use"});
}

TEST(StridedKv, RejectsSplitsThatAreNone) {
  std::vector<float> buffer(1000);
  const KvShape shape{.kv_heads = 2, .rows = 5, .head_dim = 8};
  for (const std::size_t x : {std::size_t{0}, std::size_t{12}, std::size_t{1} << 63U}) {
    expect_error<ArgumentError>([&] { StridedKv(buffer.data(), buffer.data(), shape, layout::SplitDim{x}); },
                                {"SplitDim: x is " + std::to_string(x), "must divide the 8 units of a row"});
  }
  EXPECT_NO_THROW(StridedKv(buffer.data(), buffer.data(), shape, layout::SplitDim{8}));
}

/// A view of a user's own with any number of rows.
struct OwnKv : StridedKv<float> {
  std::size_t rows_are;
  std::size_t rows(std::size_t kv_head) const { return kv_head == 1 ? rows_are : 5; }
};

TEST(KvView, OfAUsersOwnHasRowsThatPositionsCount) {
  std::vector<float> buffer(1000);
  const StridedKv base{buffer.data(), buffer.data(), KvShape{.kv_heads = 2, .rows = 5, .head_dim = 8},
                       layout::head_token_dim};
  const ModelShape model{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8};
  EXPECT_NO_THROW(detail::check_view(OwnKv{base, 4294967295U}, model));
  for (const std::size_t rows : {std::size_t{0}, std::size_t{1} << 32U}) {
    expect_error<ArgumentError>(
        [&] {
          detail::check_view(OwnKv{base, rows}, model);
        },
        {"kv view has " + std::to_string(rows) + " rows of KV head 1", "at most 4294967295"});
  }
}

TEST(KvView, IsCheckedAgainstTheModel) {
  std::vector<float> buffer(1000);
  const StridedKv kv{buffer.data(), buffer.data(), KvShape{.kv_heads = 2, .rows = 5, .head_dim = 8},
                     layout::head_token_dim};
  const ModelShape good{.layers = 1, .query_heads = 4, .kv_heads = 2, .head_dim = 8, .kv_row_bytes = 64};
  EXPECT_NO_THROW(detail::check_view(kv, good));
  ModelShape shape = good;
  shape.kv_heads = 4;
  expect_error<ArgumentError>([&] { detail::check_view(kv, shape); },
                              {"kv view has 2 KV heads", "model has 4", "one whole layer"});
  shape = good;
  shape.head_dim = 16;
  expect_error<ArgumentError>([&] { detail::check_view(kv, shape); }, {"rows of 8", "head_dim is 16"});
  shape = good;
  shape.kv_row_bytes = 32;
  expect_error<ArgumentError>([&] { detail::check_view(kv, shape); },
                              {"64 bytes a K and V row", "kv_row_bytes is 32", "make them agree"});
}

}  // namespace
}  // namespace compresskv
