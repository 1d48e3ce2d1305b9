// The methods to compare with, over every view.

#include <gtest/gtest.h>

#include <compresskv/compresskv.hpp>

#include "view/every_view.hpp"

namespace compresskv {
namespace {

using reference::budget_of;
using reference::Layer;

struct SnapKv {
  static constexpr const char* name = "SnapKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::SnapKv{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct AdaKv {
  static constexpr const char* name = "AdaKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::SnapKv{{.window = layer.sizes.window}}, select::Adaptive{},
                budget_of(layer.sizes)};
  }
};

struct Cake {
  static constexpr const char* name = "Cake";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Cake{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct H2O {
  static constexpr const char* name = "H2O";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::H2O{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct Tova {
  static constexpr const char* name = "Tova";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Tova{}, select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct Knorm {
  static constexpr const char* name = "Knorm";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Knorm{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct KeyDiff {
  static constexpr const char* name = "KeyDiff";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::KeyDiff{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct LagKv {
  static constexpr const char* name = "LagKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::LagKv{{.lag = 9, .window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

struct Cur {
  static constexpr const char* name = "Cur";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Cur{{.window = layer.sizes.window}}, select::Adaptive{},
                budget_of(layer.sizes)};
  }
};

struct ChunkKv {
  static constexpr const char* name = "ChunkKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::ChunkKv{score::SnapKv{{.window = layer.sizes.window}}, {.chunk = 7}},
                select::GroupedTopK{}, budget_of(layer.sizes)};
  }
};

/// One set of rows for all KV heads.
struct HeadMean {
  static constexpr const char* name = "HeadMean";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::HeadMean{score::LagKv{{.lag = 16, .window = layer.sizes.window}}},
                select::SharedTopK{}, budget_of(layer.sizes)};
  }
};

struct RandomRows {
  static constexpr const char* name = "RandomRows";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::Random{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
  }
};

template <class M>
struct EveryViewOfBaselines : testing::Test {};
using EveryViewOfBaselinesMethods =
    testing::Types<SnapKv, AdaKv, Cake, H2O, Tova, Knorm, KeyDiff, LagKv, Cur, ChunkKv, HeadMean, RandomRows>;
TYPED_TEST_SUITE(EveryViewOfBaselines, EveryViewOfBaselinesMethods, reference::MethodNames);

TYPED_TEST(EveryViewOfBaselines, GivesThePlainCachesResult) {
  reference::expect_one_result_of_all_views<TypeParam>();
}
TYPED_TEST(EveryViewOfBaselines, TakesHeadsOfDifferentLengthsOrSaysThatItCannot) {
  reference::expect_one_result_of_all_ragged_views<TypeParam>();
}

}  // namespace
}  // namespace compresskv
