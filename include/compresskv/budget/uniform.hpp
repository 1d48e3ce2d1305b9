#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "compresskv/budget/allocator.hpp"

namespace compresskv::budget {

/// Every layer keeps the same number of rows.
class Uniform {
 public:
  static constexpr Reach reach = Reach::own_layer;

  explicit Uniform(Budget budget) : budget_(budget) {}

  const Budget& budget() const { return budget_; }
  void validate(const ModelShape&) const {}
  void allocate(const Allowance& allowance, std::span<std::size_t> capacities) const {
    std::fill(capacities.begin(), capacities.end(), allowance.per_layer);
  }

 private:
  Budget budget_;
};

}  // namespace compresskv::budget
