#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <compresskv/core/float_bits.hpp>
#include <compresskv/kernel/code_path.hpp>
#include <compresskv/kernel/exp2.hpp>
#include <compresskv/kernel/x86/exp2_avx2_avx512.hpp>
#include <cstdint>
#include <limits>
#include <vector>

namespace compresskv::kernel {
namespace {

#if defined(__x86_64__)
// What is inlined takes the flags of what it is inlined into.
#include "compresskv/core/strict_float_begin.hpp"
[[gnu::target("avx2,fma")]] void exp2_avx2(const float* in, float* out) {
  for (std::size_t i = 0; i < 16; i += 8) {
    _mm256_storeu_ps(out + i, avx2::exp2(_mm256_loadu_ps(in + i)));
  }
}
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq")]] void exp2_avx512(const float* in, float* out) {
  _mm512_storeu_ps(out, avx512::exp2(_mm512_loadu_ps(in)));
}
#include "compresskv/core/strict_float_end.hpp"

/// exp2 of sixteen numbers, in each width that this CPU has.
std::vector<void (*)(const float*, float*)> vector_exp2s() {
  std::vector<void (*)(const float*, float*)> exp2s;
  if (supported(CodePath::avx2)) {
    exp2s.push_back(exp2_avx2);
  }
  if (supported(CodePath::avx512)) {
    exp2s.push_back(exp2_avx512);
  }
  return exp2s;
}
#endif

/// Negative floats by their bits: -0 is the lowest.
constexpr std::uint32_t bits_of_zero = 0x80000000U;

TEST(Exp2, StaysWithinItsStatedErrorAndAllPathsAgree) {
  const std::uint32_t last = std::bit_cast<std::uint32_t>(-126.0F);
  // A prime stride meets all residues, so every pattern of low bits is seen.
  constexpr std::uint32_t stride = 809;
  double worst = 0.0;
  std::size_t differing = 0;
  for (std::uint32_t bits = bits_of_zero; bits <= last; bits += 16 * stride) {
    float in[16];
    float out[16];
    for (std::uint32_t i = 0; i < 16; ++i) {
      in[i] = std::bit_cast<float>(std::min(bits + i * stride, last));
      out[i] = portable::exp2(in[i]);
      const double exact = std::exp2(static_cast<double>(in[i]));
      worst = std::max(worst, std::abs(static_cast<double>(out[i]) - exact) / exact);
    }
#if defined(__x86_64__)
    for (const auto exp2_of : vector_exp2s()) {
      float result[16];
      exp2_of(in, result);
      for (std::size_t i = 0; i < 16; ++i) {
        differing +=
            std::bit_cast<std::uint32_t>(result[i]) != std::bit_cast<std::uint32_t>(out[i]) ? 1U : 0U;
      }
    }
#endif
  }
  EXPECT_LT(worst, 2e-7);
  // A float cannot do better than half a unit in the last place: less would mean that nothing was measured.
  EXPECT_GT(worst, 5e-8);
  EXPECT_EQ(differing, 0U);
}

TEST(Exp2, EdgesAreZeroOneAndNotANumber) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const float below = std::nextafter(-126.0F, -infinity);
  // Any NaN: its payload must not turn into a number. The first is what memory filled with 0xff bytes holds.
  const std::vector<float> not_numbers{std::bit_cast<float>(0xFFFFFFFFU), std::bit_cast<float>(0x7FC00001U),
                                       std::bit_cast<float>(0x7F800001U), std::bit_cast<float>(0xFFC001FFU),
                                       std::numeric_limits<float>::quiet_NaN()};
  const auto check = [&](auto&& exp2_of) {
    EXPECT_EQ(exp2_of(0.0F), 1.0F);
    EXPECT_EQ(exp2_of(-0.0F), 1.0F);
    EXPECT_EQ(exp2_of(-std::numeric_limits<float>::denorm_min()), 1.0F);
    EXPECT_TRUE(std::isnormal(exp2_of(-126.0F)));
    EXPECT_EQ(exp2_of(below), 0.0F);
    EXPECT_EQ(exp2_of(std::numeric_limits<float>::lowest()), 0.0F);
    EXPECT_EQ(exp2_of(-infinity), 0.0F);
    for (const float not_a_number : not_numbers) {
      EXPECT_TRUE(compresskv::detail::is_nan(exp2_of(not_a_number)))
          << std::bit_cast<std::uint32_t>(not_a_number);
    }
  };
  check([](float x) { return portable::exp2(x); });
#if defined(__x86_64__)
  for (const auto exp2_of : vector_exp2s()) {
    check([&](float x) {
      const std::vector<float> in(16, x);
      std::vector<float> out(16);
      exp2_of(in.data(), out.data());
      return out[3];
    });
  }
#endif
}

}  // namespace
}  // namespace compresskv::kernel
