// Retrieval heads, with each selector that can use them, and position only: over every view.

#include "view/every_view.hpp"

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>

namespace compresskv {
namespace {

using reference::budget_of;
using reference::Layer;
using reference::retrieval;

struct SemanticRetrieval {
  static constexpr const char* name = "SemanticRetrieval";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::SemanticRetrieval{HeadRanking{layer.ranking}, retrieval(layer.sizes)},
                select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct StreamingLlm {
  static constexpr const char* name = "StreamingLlm";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::StreamingLlm{{.sinks = 3, .window = layer.sizes.window}},
                select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct GroupedRetrieval {
  static constexpr const char* name = "GroupedRetrieval";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::GroupedRetrieval{HeadRanking{layer.ranking}, retrieval(layer.sizes)},
                select::GroupedTopK{}, budget_of(layer.sizes)};
  }
};

struct AdaCompressKv {
  static constexpr const char* name = "AdaCompressKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::GroupedRetrieval{HeadRanking{layer.ranking}, retrieval(layer.sizes)},
                select::Adaptive{}, budget_of(layer.sizes)};
  }
};

template <class M>
struct EveryView : testing::Test {};
using EveryViewMethods = testing::Types<SemanticRetrieval, StreamingLlm, GroupedRetrieval, AdaCompressKv>;
TYPED_TEST_SUITE(EveryView, EveryViewMethods, reference::MethodNames);

TYPED_TEST(EveryView, GivesThePlainCachesResult) { reference::expect_one_result_of_all_views<TypeParam>(); }
TYPED_TEST(EveryView, TakesHeadsOfDifferentLengthsOrSaysThatItCannot) {
  reference::expect_one_result_of_all_ragged_views<TypeParam>();
}

}  // namespace
}  // namespace compresskv
