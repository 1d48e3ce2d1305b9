#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <vector>

namespace compresskv::reference {

struct Bounds {
  std::size_t min = 0;
  std::size_t max = 0;
};

/// docs/method.md 5.3, before the walk.
inline std::vector<std::size_t> first_budgets(const std::vector<double>& errors, std::size_t total,
                                              const Bounds& bounds) {
  const double spare = static_cast<double>(total) - static_cast<double>(errors.size() * bounds.min);
  std::vector<std::size_t> budgets;
  for (const double error : errors) {
    const double rounded = std::nearbyint(error * spare);  // half to even in the default mode
    const double wished = static_cast<double>(bounds.min) + rounded;
    budgets.push_back(static_cast<std::size_t>(
        std::min(std::max(wished, static_cast<double>(bounds.min)), static_cast<double>(bounds.max))));
  }
  return budgets;
}

inline std::size_t sum(const std::vector<std::size_t>& budgets) {
  return std::accumulate(budgets.begin(), budgets.end(), std::size_t{0});
}

/// Step 2 as the released code does it, one row at a time.
inline std::vector<std::size_t> budgets_by_rounds(const std::vector<double>& errors, std::size_t total,
                                                  const Bounds& bounds) {
  auto budgets = first_budgets(errors, total, bounds);
  std::vector<std::size_t> falling(errors.size());
  std::iota(falling.begin(), falling.end(), std::size_t{0});
  auto rising = falling;
  std::sort(falling.begin(), falling.end(), [&](std::size_t a, std::size_t b) {
    return errors[a] != errors[b] ? errors[a] > errors[b] : a < b;
  });
  std::sort(rising.begin(), rising.end(), [&](std::size_t a, std::size_t b) {
    return errors[a] != errors[b] ? errors[a] < errors[b] : a < b;
  });
  bool moved = true;
  while (sum(budgets) != total && moved) {
    moved = false;
    const bool grow = sum(budgets) < total;
    for (const std::size_t layer : grow ? falling : rising) {
      if (sum(budgets) != total && budgets[layer] != (grow ? bounds.max : bounds.min)) {
        budgets[layer] += grow ? std::size_t{1} : ~std::size_t{0};
        moved = true;
      }
    }
  }
  return budgets;
}

/// Step 2 as the paper's Algorithm 1 does it, one row at a time.
inline std::vector<std::size_t> budgets_by_extremes(const std::vector<double>& errors, std::size_t total,
                                                    const Bounds& bounds) {
  auto budgets = first_budgets(errors, total, bounds);
  while (sum(budgets) != total) {
    const bool grow = sum(budgets) < total;
    std::size_t best = errors.size();
    for (std::size_t layer = 0; layer < errors.size(); ++layer) {
      if (budgets[layer] == (grow ? bounds.max : bounds.min)) {
        continue;
      }
      if (best == errors.size() || (grow ? errors[layer] > errors[best] : errors[layer] < errors[best])) {
        best = layer;
      }
    }
    if (best == errors.size()) {
      break;
    }
    budgets[best] += grow ? std::size_t{1} : ~std::size_t{0};
  }
  return budgets;
}

/// docs/method.md 5.6, one row at a time: `numbers` of all KV heads of the model, lower layers first.
inline std::vector<std::size_t> whole_heads(const std::vector<double>& numbers, std::size_t per_layer,
                                            std::size_t window, std::size_t tokens, std::size_t least) {
  const std::size_t own = std::max(std::min(window, tokens), std::min(least, per_layer / 2));
  std::vector<std::size_t> budgets(numbers.size(), own);
  std::vector<std::size_t> best(numbers.size());
  std::iota(best.begin(), best.end(), std::size_t{0});
  std::stable_sort(best.begin(), best.end(),
                   [&](std::size_t a, std::size_t b) { return numbers[a] > numbers[b]; });
  for (const std::size_t head : best) {
    while (budgets[head] < tokens && sum(budgets) < per_layer * numbers.size()) {
      ++budgets[head];
    }
  }
  return budgets;
}

}  // namespace compresskv::reference
