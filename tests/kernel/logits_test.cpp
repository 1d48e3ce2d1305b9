#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <compresskv/kernel/logits.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "reference/cache.hpp"
#include "reference/forced_path.hpp"
#include "reference/random.hpp"

namespace compresskv::kernel {
namespace {

template <class T>
struct Logits : testing::Test {};
using Elements = testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(Logits, Elements);

/// `count` queries, `[query][head_dim]`, as the kernel wants them.
std::vector<float> packed(const std::vector<float>& queries, std::size_t count, std::size_t head_dim) {
  std::vector<float> data(PackedQueries::size(count, head_dim), 0.0F);
  for (std::size_t q = 0; q < count; ++q) {
    PackedQueries::pack(q, queries.data() + q * head_dim, head_dim, data.data());
  }
  return data;
}

/// Results are the products of `queries` with the keys from row `first` on, in double, within an addition an
/// element and the product with the scale, 0.125, one rounding each, and `below` for what is no normal
/// number.
template <class T>
void expect_products(const std::vector<float>& result, const std::vector<float>& queries,
                     const reference::Cache<T>& cache, std::size_t first, std::size_t used,
                     std::size_t head_dim, double below) {
  const double roundings = static_cast<double>(head_dim) + 1.0;
  for (std::size_t q = 0; q < queries.size() / head_dim; ++q) {
    for (std::size_t r = 0; r < used; ++r) {
      double dot = 0.0;
      double mass = 0.0;
      for (std::size_t e = 0; e < head_dim; ++e) {
        const double product = static_cast<double>(queries[q * head_dim + e]) *
                               static_cast<double>(to_float(cache.keys[cache.at(0, first + r, e)]));
        dot += product;
        mass += std::abs(product);
      }
      ASSERT_NEAR(result[q * used + r], 0.125 * dot, 0x1p-24 * roundings * 0.125 * mass + below);
    }
  }
}

/// Dot products in double, for any head_dim, number of queries, arrangement and path; every path's bits
/// alike.
TYPED_TEST(Logits, AreTheReferencesAndAgreeBitForBit) {
  reference::Random random(51);
  for (const std::size_t head_dim : {1U, 8U, 15U, 16U, 17U, 20U, 24U, 40U, 48U, 64U, 80U, 128U}) {
    for (const std::size_t count : {1U, 3U, 8U, 9U, 16U, 17U, 31U, 32U}) {
      constexpr std::size_t rows = 43;
      std::vector<float> queries(count * head_dim);
      for (float& value : queries) {
        value = random.gaussian();
      }
      const std::vector<float> data = packed(queries, count, head_dim);
      const PackedQueries block{.data = data.data(), .count = count, .head_dim = head_dim};
      for (const reference::Arrangement arrangement : reference::all_arrangements) {
        reference::Cache<TypeParam> cache({.kv_heads = 1, .rows = rows, .head_dim = head_dim}, arrangement);
        cache.fill(random);
        // A subnormal key is a number like any other.
        cache.keys[cache.at(0, 0, 0)] = std::bit_cast<TypeParam>(
            static_cast<std::conditional_t<sizeof(TypeParam) == 4, std::uint32_t, std::uint16_t>>(3));
        const Run<const TypeParam> run = cache.view().key_run(0, 0);
        const float scale = 0.125F;
        const std::size_t first = random.below(rows);
        const std::size_t used = rows - first;
        std::vector<std::vector<float>> results;
        reference::on_all_paths([&] {
          std::vector<float> buffer(key_buffer_size<TypeParam>(head_dim),
                                    std::numeric_limits<float>::quiet_NaN());
          // Rows of logits stand apart: what is written between them would be lost.
          constexpr std::size_t gap = 5;
          std::vector<float> apart(count * (used + gap), -7.0F);
          logits(run, first, used, block, scale, buffer.data(), apart.data(), used + gap);
          results.emplace_back();
          for (std::size_t q = 0; q < count; ++q) {
            const auto row = apart.begin() + static_cast<std::ptrdiff_t>(q * (used + gap));
            const auto end = row + static_cast<std::ptrdiff_t>(used);
            results.back().insert(results.back().end(), row, end);
            EXPECT_EQ(std::count(end, end + gap, -7.0F), static_cast<std::ptrdiff_t>(gap));
          }
        });
        for (const auto& result : results) {
          EXPECT_TRUE(reference::same_bytes(result, results.front())) << head_dim << " x " << count;
        }
        expect_products(results[0], queries, cache, first, used, head_dim, 1e-45);
      }
    }
  }
}

/// Rows enough that keys are prefetched, and none beyond the run.
TYPED_TEST(Logits, OfLongRunsAreThoseOfTheirParts) {
  reference::Random random(53);
  constexpr std::size_t head_dim = 128;
  constexpr std::size_t rows = 301;
  reference::Cache<TypeParam> cache({.kv_heads = 1, .rows = rows, .head_dim = head_dim},
                                    reference::Arrangement::head_token_dim);
  cache.fill(random);
  const Run<const TypeParam> run = cache.view().key_run(0, 0);
  std::vector<float> queries(9 * head_dim);
  for (float& value : queries) {
    value = random.gaussian();
  }
  const std::vector<float> data = packed(queries, 9, head_dim);
  const PackedQueries block{.data = data.data(), .count = 9, .head_dim = head_dim};
  std::vector<float> buffer(key_buffer_size<TypeParam>(head_dim));
  reference::on_all_paths([&] {
    std::vector<float> whole(9 * rows);
    logits(run, 0, rows, block, 0.125F, buffer.data(), whole.data(), rows);
    std::vector<float> parts(9 * rows);
    for (std::size_t first = 0; first < rows;) {
      const std::size_t part = std::min(random.between(1, 60), rows - first);
      logits(run, first, part, block, 0.125F, buffer.data(), parts.data() + first, rows);
      first += part;
    }
    EXPECT_TRUE(reference::same_bytes(whole, parts));
  });
}

/// bfloat16 times bfloat16 is exact: what is left are `head_dim` roundings, and sums below the normal
/// numbers.
TEST(Logits, PairsStayWithinTheirBound) {
  if (!supported(CodePath::avx512_bf16)) {
    GTEST_SKIP() << "this CPU has no bfloat16 dot products";
  }
  const reference::ForcedPath forced(CodePath::avx512_bf16);
  reference::Random random(52);
  for (const std::size_t head_dim : {2U, 8U, 30U, 64U, 80U, 128U}) {
    for (const std::size_t count : {1U, 8U, 9U, 16U, 33U}) {
      constexpr std::size_t rows = 19;
      std::vector<bfloat16> queries(count * head_dim);
      for (auto& value : queries) {
        value = static_cast<bfloat16>(random.gaussian());
      }
      std::vector<float> floats(queries.size());
      std::transform(queries.begin(), queries.end(), floats.begin(),
                     [](auto value) { return to_float(value); });
      std::vector<float> data(PackedQueries::size(count, head_dim / 2), 0.0F);
      std::vector<float> query(head_dim / 2);
      for (std::size_t q = 0; q < count; ++q) {
        std::memcpy(query.data(), queries.data() + q * head_dim, head_dim * sizeof(bfloat16));
        PackedQueries::pack(q, query.data(), head_dim / 2, data.data());
      }
      const PackedQueries block{
          .data = data.data(), .count = count, .head_dim = head_dim, .bf16_pairs = true};
      for (const reference::Arrangement arrangement : reference::all_arrangements) {
        reference::Cache<bfloat16> cache({.kv_heads = 1, .rows = rows, .head_dim = head_dim}, arrangement);
        cache.fill(random);
        std::vector<float> buffer(key_buffer_size<bfloat16>(head_dim),
                                  std::numeric_limits<float>::quiet_NaN());
        std::vector<float> result(count * rows);
        const compresskv::Run<const bfloat16> run = cache.view().key_run(0, 0);
        logits(run, 0, rows, block, 0.125F, buffer.data(), result.data(), rows);
        expect_products(result, floats, cache, 0, rows, head_dim, 1e-37);
      }
    }
  }
}

}  // namespace
}  // namespace compresskv::kernel
