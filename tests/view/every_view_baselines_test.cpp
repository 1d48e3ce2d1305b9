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

struct RKv {
  static constexpr const char* name = "RKv";
  static auto plan(const Layer<float>& layer) {
    return Plan{layer.shape, score::RKv{{.window = layer.sizes.window}}, select::GroupedTopK{},
                budget_of(layer.sizes)};
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
    testing::Types<SnapKv, AdaKv, Cake, H2O, Tova, Knorm, KeyDiff, RKv, RandomRows>;
TYPED_TEST_SUITE(EveryViewOfBaselines, EveryViewOfBaselinesMethods, reference::MethodNames);

TYPED_TEST(EveryViewOfBaselines, GivesThePlainCachesResult) {
  reference::expect_one_result_of_all_views<TypeParam>();
}
TYPED_TEST(EveryViewOfBaselines, TakesHeadsOfDifferentLengthsOrSaysThatItCannot) {
  reference::expect_one_result_of_all_ragged_views<TypeParam>();
}

}  // namespace
}  // namespace compresskv
