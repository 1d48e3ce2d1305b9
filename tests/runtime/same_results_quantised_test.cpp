// Quantised caches and blocks of a pool.

#include "same_results.hpp"

namespace compresskv {
namespace {

using namespace reference;

TEST(SameResults, OfQuantisedBlocks) {
  using M = StridedMemory<BlockQ8_0, BlockQ4_0, layout::HeadTokenDim, layout::TokenHeadDim>;
  const auto layer = [](std::uint64_t seed) {
    return M(seed, layout::head_token_dim, layout::token_head_dim);
  };
  expect_same_results<float>(Model<M>{{layer(1), layer(3), layer(5)}, {}});
}

TEST(SameResults, OfInt8) {
  expect_same_results<half>(Model<Int8Memory>{{Int8Memory(1), Int8Memory(3), Int8Memory(5)}, {}});
}

TEST(SameResults, OfPagedBlocks) {
  using M = PagedMemory<BlockQ4_0, bfloat16>;
  expect_same_results<float>(Model<M>{{M(1), M(3), M(5)}, {}});
}

}  // namespace
}  // namespace compresskv
