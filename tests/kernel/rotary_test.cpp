// Turning a cached key from one position to another is rotating it there from scratch.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/cache.hpp"
#include "reference/errors.hpp"
#include "reference/layer_case.hpp"

namespace compresskv::kernel {
namespace {

using reference::expect_error;
using Rows = std::vector<std::uint32_t>;

/// The embedding of a key at a position, as kernel/rotary.hpp states it.
std::vector<double> rotated(const std::vector<double>& key, double position, const Rotary& rotary) {
  std::vector<double> out = key;
  const std::size_t dims = rotary.dims == 0 ? key.size() : rotary.dims;
  for (std::size_t j = 0; j < dims / 2; ++j) {
    double angle = position * rotary.position_scale *
                   std::pow(rotary.base, -2.0 * static_cast<double>(j) / static_cast<double>(dims));
    if (!rotary.frequency_factors.empty()) {
      angle /= static_cast<double>(rotary.frequency_factors[j]);
    }
    const bool split = rotary.pairing == RotaryPairing::half_split;
    const std::size_t x = split ? j : 2 * j;
    const std::size_t y = split ? j + dims / 2 : 2 * j + 1;
    out[x] = key[x] * std::cos(angle) - key[y] * std::sin(angle);
    out[y] = key[x] * std::sin(angle) + key[y] * std::cos(angle);
  }
  return out;
}

template <class T>
constexpr double roundoff = std::is_same_v<T, float>  ? 0x1p-24
                            : std::is_same_v<T, half> ? 0x1p-11
                                                      : 0x1p-8;

/// The key was rounded where it was written, is turned, and is rounded once more; a pair's length bounds
/// both. Halves below 2^-14 are rounded to 2^-25 at best.
template <class T>
double slack(const std::vector<double>& key) {
  double length = 0.0;
  for (const double x : key) {
    length = std::max(length, 1.5 * std::abs(x));
  }
  return 3.0 * roundoff<T> * length + 0x1p-22;
}

const std::vector<float> factors{1.0F, 1.5F, 4.0F, 8.0F, 8.0F, 8.0F, 8.0F, 8.0F};

std::vector<Rotary> rotaries() {
  std::vector<Rotary> all;
  for (const RotaryPairing pairing : {RotaryPairing::half_split, RotaryPairing::interleaved}) {
    all.push_back({.pairing = pairing});
    all.push_back({.base = 500000.0, .dims = 8, .pairing = pairing});
    all.push_back({.pairing = pairing, .position_scale = 0.25});
    all.push_back({.base = 1e6, .pairing = pairing, .position_scale = 0.5, .frequency_factors = factors});
  }
  return all;
}

template <class T>
struct RotaryOf : testing::Test {};
using Elements = testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(RotaryOf, Elements);

TYPED_TEST(RotaryOf, RerotationIsRotatingAtTheRowIndexFromScratch) {
  using T = TypeParam;
  constexpr std::size_t rows = 40;
  constexpr std::size_t head_dim = 16;
  const Plan plan{ModelShape{.layers = 1, .query_heads = 2, .kv_heads = 2, .head_dim = head_dim},
                  score::StreamingLlm{}, select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(20)}};
  std::uint64_t seed = 0;
  for (const Rotary& rotary : rotaries()) {
    SCOPED_TRACE(++seed);
    reference::Random random(seed);
    reference::Cache<T> cache({.kv_heads = 2, .rows = rows, .head_dim = head_dim},
                              reference::all_arrangements[seed % reference::all_arrangements.size()]);
    cache.fill(random);
    std::vector<std::vector<double>> plain;  // [head * rows + position], before rotation
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t position = 0; position < rows; ++position) {
        std::vector<double> key(head_dim);
        for (double& x : key) {
          x = static_cast<double>(random.gaussian());
        }
        const auto embedded = rotated(key, static_cast<double>(position), rotary);
        for (std::size_t e = 0; e < head_dim; ++e) {
          cache.keys[cache.at(head, position, e)] = static_cast<T>(static_cast<float>(embedded[e]));
        }
        plain.push_back(key);
      }
    }
    Compressor compressor{plan};
    compressor.begin(rows);
    const Rows kept{0, 1, 5, 6, 20, 33, 38, 39};
    compressor.compact(0, cache.view(), Selection::shared_by_heads(kept));
    const auto compacted = cache;
    cache.shape.rows = kept.size();
    const Retained& retained = compressor.rerotate(0, cache.view(), rotary);
    for (std::size_t head = 0; head < 2; ++head) {
      for (std::size_t row = 0; row < kept.size(); ++row) {
        const auto expected = rotated(plain[head * rows + kept[row]], static_cast<double>(row), rotary);
        for (std::size_t e = 0; e < head_dim; ++e) {
          const std::size_t at = cache.at(head, row, e);
          ASSERT_NEAR(static_cast<double>(to_float(cache.keys[at])), expected[e],
                      slack<T>(plain[head * rows + kept[row]]))
              << "head " << head << " row " << row << " element " << e;
          if (row < 2 || (rotary.dims != 0 && e >= rotary.dims)) {
            EXPECT_EQ(to_float(cache.keys[at]), to_float(compacted.keys[at])) << "not turned: not written";
          }
        }
      }
    }
    EXPECT_TRUE(reference::same_bytes(cache.values, compacted.values));
    EXPECT_EQ(Rows(retained.positions().begin(), retained.positions().end()), (Rows{0, 1, 2, 3, 4, 5, 6, 7}));
    EXPECT_EQ(retained.next_position(), kept.size()) << "the sequence goes on at the row count";
    EXPECT_EQ(retained.position(kept.size()), kept.size());
    // Again: everything is where it belongs.
    const auto before = cache;
    compressor.rerotate(0, cache.view(), rotary);
    EXPECT_EQ(cache, before);
  }
}

TEST(Rotary, RefusesHeadsThatHoldDifferentRowsAndRotationsThatDoNotFit) {
  const Plan plan{ModelShape{.layers = 1, .query_heads = 2, .kv_heads = 2, .head_dim = 6},
                  score::StreamingLlm{}, select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(20)}};
  reference::Cache<float> cache({.kv_heads = 2, .rows = 30, .head_dim = 6},
                                reference::Arrangement::head_token_dim);
  reference::Random random(1);
  cache.fill(random);
  Compressor compressor{plan};
  compressor.begin(30);
  const auto before = cache;
  const auto refused = [&](const Rotary& rotary, std::initializer_list<std::string_view> parts) {
    expect_error<ArgumentError>([&] { compressor.rerotate(0, cache.view(), rotary); }, parts);
    EXPECT_EQ(cache, before);
  };
  refused({.dims = 5}, {"Rotary: dims is 5", "even and at most head_dim 6"});
  refused({.dims = 8}, {"Rotary: dims is 8"});
  refused({.base = 0.0}, {"Rotary: base is 0"});
  refused({.base = std::numeric_limits<double>::quiet_NaN()}, {"Rotary: base is nan"});
  refused({.position_scale = -1.0}, {"Rotary: position_scale is -1"});
  refused({.frequency_factors = factors}, {"Rotary: 8 frequency factors for 3 pairs", "one a pair"});
  const std::vector<float> zero{1.0F, 0.0F, 1.0F};
  refused({.frequency_factors = zero}, {"Rotary: frequency factor 1 is 0", "above 0"});
  compressor.compact(0, cache.view(), Selection::per_head(std::vector<Rows>{{1, 2}, {3, 4, 5}}));
  const std::vector<std::size_t> lengths{2, 3};
  KvShape ragged = cache.shape;
  ragged.head_rows = lengths;
  const StridedKv<float> view(cache.keys.data(), cache.values.data(), ragged, cache.strides);
  const auto uneven = cache;
  expect_error<ArgumentError>([&] { compressor.rerotate(0, view, {}); },
                              {"KV head 1 has 3 rows, KV head 0 2", "contiguous positions"});
  EXPECT_EQ(cache, uneven);
}

}  // namespace
}  // namespace compresskv::kernel
