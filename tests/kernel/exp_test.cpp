#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <compresskv/kernel/code_path.hpp>
#include <compresskv/kernel/exp.hpp>
#include <cstdint>
#include <limits>
#include <vector>

namespace compresskv::kernel {
namespace {

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void exp_avx2(const float* in, float* out) {
  for (std::size_t i = 0; i < 16; i += 8) {
    _mm256_storeu_ps(out + i, avx2::exp(_mm256_loadu_ps(in + i)));
  }
}
[[gnu::target("avx2,fma,avx512f,avx512vl,avx512dq")]] void exp_avx512(const float* in, float* out) {
  _mm512_storeu_ps(out, avx512::exp(_mm512_loadu_ps(in)));
}

/// The wide ones that this CPU has, of sixteen numbers.
std::vector<void (*)(const float*, float*)> wide_exps() {
  std::vector<void (*)(const float*, float*)> exps;
  if (supported(CodePath::avx2)) {
    exps.push_back(exp_avx2);
  }
  if (supported(CodePath::avx512)) {
    exps.push_back(exp_avx512);
  }
  return exps;
}
#endif

/// Negative floats by their bits: -0 is the lowest.
constexpr std::uint32_t bits_of_zero = 0x80000000U;

TEST(Exp, StaysWithinItsStatedErrorAndAllPathsAgree) {
  const std::uint32_t last = std::bit_cast<std::uint32_t>(-87.0F);
  // A prime stride meets all residues, so every pattern of low bits is seen.
  constexpr std::uint32_t stride = 809;
  double worst = 0.0;
  std::size_t differing = 0;
  for (std::uint32_t bits = bits_of_zero; bits <= last; bits += 16 * stride) {
    float in[16];
    float out[16];
    for (std::uint32_t i = 0; i < 16; ++i) {
      in[i] = std::bit_cast<float>(std::min(bits + i * stride, last));
      out[i] = portable::exp(in[i]);
      const double exact = std::exp(static_cast<double>(in[i]));
      const double error = std::abs(static_cast<double>(out[i]) - exact) / exact;
      worst = std::max(worst, error - 3e-9 * std::abs(static_cast<double>(in[i])));
    }
#if defined(__x86_64__)
    for (const auto exp_of : wide_exps()) {
      float wide[16];
      exp_of(in, wide);
      for (std::size_t i = 0; i < 16; ++i) {
        differing += std::bit_cast<std::uint32_t>(wide[i]) != std::bit_cast<std::uint32_t>(out[i]) ? 1 : 0;
      }
    }
#endif
  }
  EXPECT_LT(worst, 2e-7);
  // A float cannot do better than half a unit in the last place: less would mean that nothing was measured.
  EXPECT_GT(worst, 5e-8);
  EXPECT_EQ(differing, 0U);
}

TEST(Exp, EdgesAreZeroOneAndNotANumber) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const float below = std::nextafter(-87.0F, -infinity);
  // Any NaN: its payload must not turn into a number. The first is what memory filled with 0xff bytes holds.
  const std::vector<float> not_numbers{std::bit_cast<float>(0xFFFFFFFFU), std::bit_cast<float>(0x7FC00001U),
                                       std::bit_cast<float>(0x7F800001U), std::bit_cast<float>(0xFFC001FFU),
                                       std::numeric_limits<float>::quiet_NaN()};
  const auto check = [&](auto&& exp_of) {
    EXPECT_EQ(exp_of(0.0F), 1.0F);
    EXPECT_EQ(exp_of(-0.0F), 1.0F);
    EXPECT_EQ(exp_of(-std::numeric_limits<float>::denorm_min()), 1.0F);
    EXPECT_TRUE(std::isnormal(exp_of(-87.0F)));
    EXPECT_EQ(exp_of(below), 0.0F);
    EXPECT_EQ(exp_of(std::numeric_limits<float>::lowest()), 0.0F);
    EXPECT_EQ(exp_of(-infinity), 0.0F);
    for (const float not_a_number : not_numbers) {
      EXPECT_TRUE(std::isnan(exp_of(not_a_number))) << std::bit_cast<std::uint32_t>(not_a_number);
    }
  };
  check([](float x) { return portable::exp(x); });
#if defined(__x86_64__)
  for (const auto exp_of : wide_exps()) {
    check([&](float x) {
      const std::vector<float> in(16, x);
      std::vector<float> out(16);
      exp_of(in.data(), out.data());
      return out[3];
    });
  }
#endif
}

}  // namespace
}  // namespace compresskv::kernel
