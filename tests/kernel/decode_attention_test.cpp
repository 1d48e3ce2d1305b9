#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/kernel/decode_attention.hpp>
#include <compresskv/kernel/lanes.hpp>
#include <limits>
#include <vector>

#include "reference/cache.hpp"
#include "reference/forced_path.hpp"
#include "reference/random.hpp"
#include "reference/scattered_kv.hpp"
#include "reference/scores.hpp"

namespace compresskv::kernel {
namespace {

struct Result {
  std::vector<float> out;
  std::vector<float> attention;
};

template <KvView V>
Result attend(const V& kv, std::size_t head, const std::vector<float>& query, float scale) {
  Result result{std::vector<float>(kv.head_dim()), std::vector<float>(kv.rows(head))};
  // Scratch comes with anything in it.
  std::vector<float> scratch(2 * round_up_to_lanes(kv.head_dim()), std::numeric_limits<float>::quiet_NaN());
  decode_attention(kv, head, query.data(), scale, scratch, result.attention, result.out.data());
  return result;
}

template <class T>
struct DecodeAttention : testing::Test {};
using Elements = testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(DecodeAttention, Elements);

TYPED_TEST(DecodeAttention, IsTheReferencesInEveryLayoutAndPath) {
  reference::Random random(71);
  for (int round = 0; round < 60; ++round) {
    const std::size_t head_dim = random.pick(std::vector<std::size_t>{1, 8, 20, 64, 128});
    const std::size_t rows = random.pick(std::vector<std::size_t>{1, 2, 15, 16, 17, 100, 400});
    reference::Cache<TypeParam> cache({.kv_heads = 2, .rows = rows, .head_dim = head_dim},
                                      reference::Arrangement::head_token_dim);
    cache.fill(random);
    std::vector<float> query(head_dim);
    for (float& x : query) {
      x = 2.0F * random.gaussian();
    }
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    const std::size_t head = random.below(2);
    const auto key = [&](std::size_t row, std::size_t dim) {
      return static_cast<double>(to_float(cache.keys[cache.at(head, row, dim)]));
    };
    const auto value = [&](std::size_t row, std::size_t dim) {
      return static_cast<double>(to_float(cache.values[cache.at(head, row, dim)]));
    };
    const auto expected = reference::decode_attention(
        key, value, [&](std::size_t dim) { return static_cast<double>(query[dim]); }, rows, head_dim, scale);
    const Result result = attend(cache.view(), head, query, scale);
    double sum = 0.0;
    for (const float weight : result.attention) {
      sum += static_cast<double>(weight);
    }
    EXPECT_NEAR(sum, 1.0, 1e-6);
    for (std::size_t dim = 0; dim < head_dim; ++dim) {
      // Weights are within some 1e-5 of exact (see score_tolerance), values within 5 of zero.
      ASSERT_NEAR(result.out[dim], expected[dim], 5e-5) << "rows " << rows << " d " << head_dim;
    }

    reference::on_all_paths([&] {
      for (const std::size_t chunk : {head_dim, std::size_t{1}, std::size_t{8}}) {
        reference::ScatteredMemory<TypeParam> pieces(cache, random, 9, chunk);
        const Result other = attend(pieces.view(), head, query, scale);
        EXPECT_TRUE(reference::same_bytes(other.out, result.out)) << "chunk " << chunk;
        EXPECT_TRUE(reference::same_bytes(other.attention, result.attention));
      }
    });
  }
}

TEST(DecodeAttention, EqualKeysGiveTheMeanOfTheValues) {
  reference::Cache<float> cache({.kv_heads = 1, .rows = 4, .head_dim = 2},
                                reference::Arrangement::head_token_dim);
  std::fill(cache.keys.begin(), cache.keys.end(), 0.5F);
  cache.values = {1, 10, 2, 20, 3, 30, 6, 60};
  const Result result = attend(cache.view(), 0, {1.0F, -1.0F}, 1.0F);
  EXPECT_EQ(result.attention, (std::vector<float>{0.25F, 0.25F, 0.25F, 0.25F}));
  EXPECT_EQ(result.out, (std::vector<float>{3.0F, 30.0F}));
}

}  // namespace
}  // namespace compresskv::kernel
