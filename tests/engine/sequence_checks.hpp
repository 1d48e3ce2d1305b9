// What the tests of sequences share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "engine/sequence.hpp"

namespace engine::test {

template <typename Found>
testing::AssertionResult near(const Found& found, std::span<const double> expected, double bound) {
  if (found.size() != expected.size()) {
    return testing::AssertionFailure() << found.size() << " numbers instead of " << expected.size();
  }
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(found[i]) - expected[i]);
    if (!(difference <= bound)) {
      return testing::AssertionFailure()
             << "number " << i << ": " << found[i] << " instead of " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

inline std::vector<float> copy(std::span<const float> values) { return {values.begin(), values.end()}; }

// Moves the rows `kept` of every KV head to the front, as a compression does.
inline void keep_rows(LayerView& view, std::span<const std::vector<std::size_t>> kept) {
  with_kv_type(view.type, [&]<typename T>(T*) {
    const auto d = static_cast<std::size_t>(view.head_dim);
    std::vector<std::size_t> lengths;
    for (std::size_t h = 0; h < kept.size(); ++h) {
      for (std::size_t r = 0; r < kept[h].size(); ++r) {
        const std::size_t from = (h * view.allocated_rows + kept[h][r]) * d;
        const std::size_t to = (h * view.allocated_rows + r) * d;
        std::copy_n(view.keys<T>() + from, d, view.keys<T>() + to);
        std::copy_n(view.values<T>() + from, d, view.values<T>() + to);
      }
      lengths.push_back(kept[h].size());
    }
    view.shrink(lengths);
  });
}

}  // namespace engine::test
