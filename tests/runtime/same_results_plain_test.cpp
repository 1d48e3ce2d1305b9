// Float, half and bfloat16, in layouts of their own for keys and values.

#include "same_results.hpp"

namespace compresskv {
namespace {

using namespace reference;

template <class K, class W, class KeyLayout, class ValueLayout>
auto model(KeyLayout of_keys, ValueLayout of_values) {
  using M = StridedMemory<K, W, KeyLayout, ValueLayout>;
  return Model<M>{{M(1, of_keys, of_values), M(3, of_keys, of_values), M(5, of_keys, of_values)}, {}};
}

TEST(SameResults, OfFloat) {
  expect_same_results<float>(model<float, float>(layout::head_token_dim, layout::head_dim_token));
}

TEST(SameResults, OfBfloat16KeysAndHalfValues) {
  expect_same_results<bfloat16>(model<bfloat16, half>(layout::token_head_dim, layout::head_token_dim));
}

TEST(SameResults, OfHalfKeysInASplitLayout) {
  expect_same_results<half>(model<half, bfloat16>(layout::SplitDim{8}, layout::token_head_dim));
}

}  // namespace
}  // namespace compresskv
