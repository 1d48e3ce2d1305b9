#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/core/element.hpp>
#include <compresskv/kernel/ranks.hpp>
#include <compresskv/kernel/row_reader.hpp>
#include <cstddef>
#include <limits>
#include <vector>

#include "reference/cache.hpp"
#include "reference/pool.hpp"
#include "reference/random.hpp"

namespace compresskv::kernel {
namespace {

using reference::Cache;
using reference::Random;

constexpr std::size_t reader_dim = 12;

/// Reads a KV head in pieces drawn at random, skipping some, and holds each row against the cache.
template <Part part, class V, class Of>
void expect_rows(const V& view, std::size_t kv_head, Random& random, Of&& of) {
  std::vector<float> buffer(reader_dim);
  RowReader<part, V> reader(view, kv_head, buffer.data());
  const std::size_t rows = view.rows(kv_head);
  while (reader.at() < rows) {
    const std::size_t from = reader.at();
    const std::size_t to = random.between(from, std::min(rows, from + 40));
    if (random.below(3) == 0) {
      reader.skip_to(to);
    } else {
      std::size_t next = from;
      reader.read_to(to, [&](std::size_t row, const float* values) {
        ASSERT_EQ(row, next++);
        for (std::size_t e = 0; e < reader_dim; ++e) {
          ASSERT_EQ(values[e], of(row, e)) << "row " << row << " element " << e;
        }
      });
      ASSERT_EQ(next, to);
    }
    ASSERT_EQ(reader.at(), to);
  }
  reader.read_to(rows, [](std::size_t, const float*) { FAIL() << "nothing is left"; });
  reader.skip_to(rows);
}

TEST(RowReader, ReadsAnyPiecesOfKeysAndOfValues) {
  Random random(5);
  Cache<half, float> cache({.kv_heads = 2, .rows = 200, .head_dim = reader_dim},
                           layout::head_dim_token({.kv_heads = 2, .rows = 200, .units = reader_dim}),
                           layout::token_head_dim({.kv_heads = 2, .rows = 200, .units = reader_dim}));
  cache.fill(random);
  Cache<float> plain({.kv_heads = 2, .rows = 200, .head_dim = reader_dim},
                     reference::Arrangement::token_head_dim);
  plain.fill(random);
  const reference::Pool pool(plain, {.block_rows = 16, .keys = layout::token_head_dim}, random);
  auto paged = pool;
  for (int repeat = 0; repeat < 20; ++repeat) {
    for (const std::size_t head : {0U, 1U}) {
      expect_rows<Part::keys>(cache.view(), head, random, [&](std::size_t row, std::size_t e) {
        return to_float(cache.keys[cache.at(head, row, e)]);
      });
      expect_rows<Part::values>(cache.view(), head, random, [&](std::size_t row, std::size_t e) {
        return cache.values[cache.value_at(head, row, e)];
      });
      expect_rows<Part::keys>(paged.view(), head, random, [&](std::size_t row, std::size_t e) {
        return plain.keys[plain.at(head, row, e)];
      });
      expect_rows<Part::values>(paged.view(), head, random, [&](std::size_t row, std::size_t e) {
        return plain.values[plain.value_at(head, row, e)];
      });
    }
  }
}

TEST(RowReader, KnowsARowThatIsNotFinite) {
  for (const std::size_t size : {1U, 7U, 64U}) {
    std::vector<float> row(size, 1e38F);
    EXPECT_TRUE(row_is_finite(row.data(), size));
    for (std::size_t e = 0; e < size; ++e) {
      for (const float poison :
           {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        row[e] = poison;
        EXPECT_FALSE(row_is_finite(row.data(), size)) << e;
      }
      row[e] = 0.0F;
    }
  }
}

TEST(Ranks, CountWhatIsLowerAndOfEqualScoresTheLowerIndexIsAbove) {
  Random random(6);
  for (const std::size_t size : {1U, 2U, 3U, 16U, 100U, 1000U}) {
    for (const std::size_t different : {1U, 3U, 1000000U}) {
      std::vector<float> scores(size);
      for (float& score : scores) {
        score = static_cast<float>(random.below(different)) - 2.0F;
      }
      std::vector<float> expected;
      for (std::size_t t = 0; t < size; ++t) {
        std::size_t below = 0;
        for (std::size_t other = 0; other < size; ++other) {
          below += scores[other] < scores[t] || (scores[other] == scores[t] && other > t) ? 1U : 0U;
        }
        expected.push_back(static_cast<float>(below) / static_cast<float>(size));
      }
      std::vector<std::size_t> order(size);
      rank(scores, order);
      for (std::size_t t = 0; t < size; ++t) {
        EXPECT_FLOAT_EQ(scores[t], expected[t]);  // the test's own division may be by a reciprocal: -Ofast
      }
    }
  }
}

}  // namespace
}  // namespace compresskv::kernel
