#include <gtest/gtest.h>

#include <compresskv/kernel/packed_queries.hpp>
#include <vector>

namespace compresskv::kernel {
namespace {

/// Every element is where the doc block says, and the rest is left alone.
TEST(PackedQueries, AreInterleavedByTwosOfElements) {
  for (const std::size_t head_dim : {1U, 2U, 5U, 8U}) {
    for (const std::size_t count : {1U, 8U, 9U, 17U}) {
      const std::size_t steps = PackedQueries::steps(head_dim);
      std::vector<float> data(PackedQueries::size(count, head_dim), 0.0F);
      ASSERT_EQ(data.size(), (count + 7) / 8 * steps * 16);
      std::vector<float> expected(data.size(), 0.0F);
      for (std::size_t q = 0; q < count; ++q) {
        std::vector<float> query(head_dim);
        for (std::size_t e = 0; e < head_dim; ++e) {
          query[e] = static_cast<float>(1 + q * head_dim + e);
          expected[(q / 8 * steps + e / 2) * 16 + q % 8 * 2 + e % 2] = query[e];
        }
        PackedQueries::pack(q, query.data(), head_dim, data.data());
      }
      EXPECT_EQ(data, expected) << head_dim << " x " << count;
    }
  }
}

TEST(PackedQueries, OfPairsHaveHalfTheSteps) {
  EXPECT_EQ((PackedQueries{.head_dim = 128}).steps(), 64U);
  EXPECT_EQ((PackedQueries{.head_dim = 128, .bf16_pairs = true}).steps(), 32U);
  EXPECT_EQ((PackedQueries{.head_dim = 30, .bf16_pairs = true}).steps(), 8U);
}

}  // namespace
}  // namespace compresskv::kernel
