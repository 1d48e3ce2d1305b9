#include <gtest/gtest.h>

#include <compresskv/batch.hpp>
#include <compresskv/compresskv.hpp>
#include <cstdint>
#include <limits>
#include <vector>

#include "reference/errors.hpp"
#include "reference/executors.hpp"
#include "reference/layer_case.hpp"

namespace compresskv {
namespace {

using reference::expect_error;
using reference::Layer;
using Rows = std::vector<std::uint32_t>;
using Own = Compressor<reference::SemanticPlan>;

const std::vector<std::size_t> lengths{3, 120, 40, 41, 77};

Layer<float> layer_of(std::size_t i) {
  return Layer<float>({.group = 2, .kv_heads = 2, .rows = lengths[i], .capacity = 40, .seed = 60 + i});
}

template <class X>
void check(X executor, bool one_is_broken) {
  const Layer<float> model = layer_of(0);
  std::vector<Layer<float>> alone;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    alone.push_back(layer_of(i));
    alone.back().ranking = model.ranking;
  }
  auto batched = alone;
  std::vector<Own> compressors;
  std::vector<BatchItem<Own, StridedKv<float>, QueryWindow<float>>> items;
  compressors.reserve(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (one_is_broken && (i == 1 || i == 4)) {
      float& key = batched[i].cache.keys[batched[i].cache.at(model.ranking[0][0] / 2, i, 1)];
      key = std::numeric_limits<float>::quiet_NaN();
    }
    compressors.emplace_back(model.plan);
    compressors.back().begin(lengths[i]);
    items.push_back({.compressor = &compressors[i],
                     .kv = batched[i].cache.view(),
                     .observation = batched[i].observation()});
  }
  const auto before = batched;
  const auto compress = [&] { compress_batch(0, std::span(items), executor); };
  if (one_is_broken) {
    // The first in the order of the items, not of time: token 1 belongs to item 1.
    expect_error<ScoreError>(compress, {"token 1 ", "is not finite"});
  } else {
    EXPECT_NO_THROW(compress());
  }
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    SCOPED_TRACE(i);
    if (one_is_broken && (i == 1 || i == 4)) {
      EXPECT_TRUE(items[i].error);
      EXPECT_EQ(batched[i].cache, before[i].cache) << "left as it was";
      EXPECT_EQ(compressors[i].retained(0).rows(), lengths[i]);
      continue;
    }
    EXPECT_FALSE(items[i].error);
    Own own{model.plan};
    own.begin(lengths[i]);
    const Retained& kept = own.compress(0, alone[i].cache.view(), alone[i].observation());
    const Retained& together = compressors[i].retained(0);
    EXPECT_EQ(Rows(together.positions().begin(), together.positions().end()),
              Rows(kept.positions().begin(), kept.positions().end()));
    EXPECT_EQ(batched[i].cache, alone[i].cache);
  }
}

TEST(Batch, EachSequenceIsAsOnItsOwn) {
  check(SerialExecutor{}, false);
  check(reference::ShuffledExecutor{}, false);
  check(reference::ThreadExecutor{}, false);
}

TEST(Batch, OneThatFailsLeavesTheOthersAlone) {
  check(SerialExecutor{}, true);
  check(reference::ReverseExecutor{}, true);
  check(reference::ThreadExecutor{}, true);
}

}  // namespace
}  // namespace compresskv
