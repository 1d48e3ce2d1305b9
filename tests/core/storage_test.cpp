// as_half and as_bfloat16: memory of an engine's own 16-bit types.

#include <gtest/gtest.h>

#include <Eigen/Core>
#include <bit>
#include <compresskv/view/query_window.hpp>
#include <compresskv/view/strided_kv.hpp>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>
#if __has_include(<stdfloat>)
#include <stdfloat>
#endif

namespace compresskv {
namespace {

struct GgmlBf16 {
  std::uint16_t bits;
};
using GgmlFp16 = std::uint16_t;

// | stored as | half | bfloat16 |
template <class T, bool half, bool bfloat16>
constexpr bool stores = HalfStorage<T> == half&& HalfStorage<const T> == half&& Bfloat16Storage<T> ==
                        bfloat16&& Bfloat16Storage<const T> == bfloat16;
static_assert(stores<std::uint16_t, true, true> && stores<GgmlFp16, true, true>);
static_assert(stores<GgmlBf16, true, true>);
static_assert(stores<compresskv::half, true, false> && stores<compresskv::bfloat16, false, true>);
static_assert(stores<Eigen::half, true, false> && stores<Eigen::bfloat16, false, true>);
#if defined(__FLT16_MAX__) && (!defined(__GNUC__) || defined(__clang__) || __GNUC__ >= 13)
static_assert(stores<_Float16, true, false>);
#endif
#if defined(__STDCPP_FLOAT16_T__)
static_assert(stores<std::float16_t, true, false>);
#endif
#if defined(__STDCPP_BFLOAT16_T__)
static_assert(stores<std::bfloat16_t, false, true>);
#endif

// Neither of a size or an alignment, nor of 16 bits that are something else.
struct Bytes {
  unsigned char bytes[2];
};
enum class Code : std::uint16_t {};
static_assert(stores<Bytes, false, false> && stores<Code, false, false> && stores<char16_t, false, false>);
static_assert(stores<std::int16_t, false, false> && stores<float, false, false> &&
              stores<bool, false, false>);

/// 1.5 and -2 are both: by the bits of a half, or of a bfloat16.
template <class T>
std::vector<T> stored(std::uint16_t first, std::uint16_t second) {
  std::vector<T> values(2);
  const std::uint16_t bits[] = {first, second};
  std::memcpy(static_cast<void*>(values.data()), bits, sizeof(bits));
  return values;
}

template <class T>
void expect_half() {
  std::vector<T> values = stored<T>(0x3e00, 0xc000);
  const std::vector<T>& constant = values;
  static_assert(std::same_as<decltype(as_half(values.data())), half*>);
  static_assert(std::same_as<decltype(as_half(constant.data())), const half*>);
  static_assert(std::same_as<decltype(as_half(std::span(constant))), std::span<const half>>);
  EXPECT_EQ(to_float(as_half(constant.data())[0]), 1.5F);
  const std::span<half> seen = as_half(std::span(values));
  ASSERT_EQ(seen.size(), 2U);
  EXPECT_EQ(to_float(seen[1]), -2.0F);
  seen[1] = half(1.5F);
  EXPECT_EQ(static_cast<const void*>(seen.data()), static_cast<const void*>(values.data()));
  EXPECT_EQ(std::memcmp(&values[0], &values[1], 2), 0);
}

template <class T>
void expect_bfloat16() {
  std::vector<T> values = stored<T>(0x3fc0, 0xc000);
  const std::vector<T>& constant = values;
  static_assert(std::same_as<decltype(as_bfloat16(values.data())), bfloat16*>);
  static_assert(std::same_as<decltype(as_bfloat16(constant.data())), const bfloat16*>);
  static_assert(std::same_as<decltype(as_bfloat16(std::span(constant))), std::span<const bfloat16>>);
  EXPECT_EQ(to_float(as_bfloat16(constant.data())[0]), 1.5F);
  EXPECT_EQ(to_float(as_bfloat16(std::span(values))[1]), -2.0F);
}

TEST(Storage, IsLookedAtAsHalf) {
  expect_half<std::uint16_t>();
  expect_half<GgmlBf16>();
  expect_half<half>();
  expect_half<Eigen::half>();
#if defined(__FLT16_MAX__) && (!defined(__GNUC__) || defined(__clang__) || __GNUC__ >= 13)
  expect_half<_Float16>();
#endif
#if defined(__STDCPP_FLOAT16_T__)
  expect_half<std::float16_t>();
#endif
}

TEST(Storage, IsLookedAtAsBfloat16) {
  expect_bfloat16<std::uint16_t>();
  expect_bfloat16<GgmlBf16>();
  expect_bfloat16<bfloat16>();
  expect_bfloat16<Eigen::bfloat16>();
#if defined(__STDCPP_BFLOAT16_T__)
  expect_bfloat16<std::bfloat16_t>();
#endif
}

TEST(Storage, DeducesViewsAndQueries) {
  std::vector<std::uint16_t> keys(16);
  std::vector<GgmlBf16> values(16);
  const KvShape shape{.kv_heads = 1, .rows = 2, .head_dim = 8};
  const StridedKv kv{as_half(std::span(keys)), as_bfloat16(values.data()), shape, layout::head_token_dim};
  static_assert(std::same_as<decltype(kv), const StridedKv<half, bfloat16>>);
  EXPECT_EQ(static_cast<const void*>(kv.key_run(0, 0).base), static_cast<const void*>(keys.data()));
  const QueryWindow queries{as_half(keys.data()), QueryShape{.query_heads = 1, .queries = 2, .head_dim = 8}};
  static_assert(std::same_as<decltype(queries), const QueryWindow<half>>);
  EXPECT_EQ(queries.queries(), 2U);
}

// Memory of types that say what they are needs no conversion: the view has them, and kernels read one type.
template <class Half, class Brain>
void expect_read_as_they_are() {
  const std::vector<Half> keys = stored<Half>(0x3e00, 0xc000);
  const std::vector<Brain> values = stored<Brain>(0x3fc0, 0xc000);
  const KvShape shape{.kv_heads = 1, .rows = 1, .head_dim = 2};
  const StridedKv kv{keys, values, shape, layout::head_token_dim};
  static_assert(std::same_as<decltype(kv), const StridedKv<const Half, const Brain>>);
  static_assert(KvView<StridedKv<const Half, const Brain>> && QueryObservation<QueryWindow<Half>>);
  with_element(kv.key_run(0, 0), [&](const auto& run) {
    static_assert(std::same_as<decltype(run), const Run<const half>&>);
    EXPECT_EQ(static_cast<const void*>(run.base), static_cast<const void*>(keys.data()));
    EXPECT_EQ(to_float(run.base[0]), 1.5F);
  });
  with_element(kv.value_run(0, 0), [&](const auto& run) {
    static_assert(std::same_as<decltype(run), const Run<const bfloat16>&>);
    EXPECT_EQ(to_float(run.base[1]), -2.0F);
  });
  EXPECT_EQ(kind_of_element<Half>(), ElementKind::float16);
  EXPECT_EQ(kind_of_element<Brain>(), ElementKind::bfloat16);
}

TEST(Storage, OfTypesThatSayWhatTheyAreNeedsNoConversion) {
  expect_read_as_they_are<half, bfloat16>();
  expect_read_as_they_are<Eigen::half, Eigen::bfloat16>();
#if defined(__FLT16_MAX__) && (!defined(__GNUC__) || defined(__clang__) || __GNUC__ >= 13)
  expect_read_as_they_are<_Float16, bfloat16>();
#endif
}

}  // namespace
}  // namespace compresskv
