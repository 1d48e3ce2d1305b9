#pragma once

#include <cstddef>
#include <span>
#include <utility>
#include <variant>

#include "compresskv/budget/allocator.hpp"

namespace compresskv::budget {

/// An allocator that is chosen when the program runs: one type for all, so that an engine compiles its
/// methods once. `As` look at no layer but their own.
template <Allocator... As>
requires((As::reach == Reach::own_layer) && ...) class OneOf {
 public:
  static constexpr Reach reach = Reach::own_layer;

  template <class A>
  requires(std::same_as<A, As> || ...) OneOf(A allocator) : allocator_(std::move(allocator)) {}

  const Budget& budget() const {
    return std::visit([](const auto& a) -> const Budget& { return a.budget(); }, allocator_);
  }
  void validate(const ModelShape& shape) const {
    std::visit([&](const auto& a) { a.validate(shape); }, allocator_);
  }
  void allocate(const Allowance& allowance, std::span<std::size_t> capacities) const {
    std::visit([&](const auto& a) { a.allocate(allowance, capacities); }, allocator_);
  }

 private:
  std::variant<As...> allocator_;
};

}  // namespace compresskv::budget
