// Products of rows, against long double and, bit for bit, between code paths.

#include <gtest/gtest.h>

#include <cmath>
#include <compresskv/core/float_bits.hpp>
#include <compresskv/kernel/key_rows.hpp>
#include <cstddef>
#include <limits>
#include <optional>
#include <vector>

#include "reference/forced_path.hpp"
#include "reference/random.hpp"

namespace compresskv {
namespace {

TEST(ProductOfRows, IsTheSlowOneOnEveryPathAndBitForBit) {
  for (std::size_t head_dim = 1; head_dim <= 260; head_dim += head_dim < 70 ? 1 : 19) {
    SCOPED_TRACE(head_dim);
    reference::Random random(head_dim);
    std::vector<float> a(head_dim);
    std::vector<float> b(head_dim);
    long double expected = 0.0L;
    long double size = 0.0L;
    for (std::size_t e = 0; e < head_dim; ++e) {
      a[e] = random.gaussian() * (e % 5 == 0 ? 1e15F : 1.0F);
      b[e] = random.gaussian();
      const long double product = static_cast<long double>(a[e]) * static_cast<long double>(b[e]);
      expected += product;
      size += std::abs(product);
    }
    std::optional<double> found;
    reference::on_all_paths([&] {
      const double product = kernel::product_of_rows(a.data(), b.data(), head_dim);
      EXPECT_NEAR(product, static_cast<double>(expected), 1e-14 * static_cast<double>(size));
      EXPECT_EQ(product, found.value_or(product));
      found = product;
    });
  }
}

TEST(ProductOfRows, SquaresOfTheLargestRowsAreFiniteAndNaNStays) {
  for (const std::size_t head_dim : {3U, 16U, 128U, 131U}) {
    reference::on_all_paths([&] {
      std::vector<float> row(head_dim, (std::numeric_limits<float>::max)());
      EXPECT_TRUE(detail::is_finite(kernel::squared_norm(row.data(), head_dim)));
      row[head_dim / 2] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_TRUE(detail::is_nan(kernel::squared_norm(row.data(), head_dim)));
    });
  }
}

}  // namespace
}  // namespace compresskv
