#pragma once

#include <concepts>
#include <span>
#include <type_traits>
#include <utility>

namespace compresskv {

/// A `std::span` that is kept: what it points to must outlive the object that keeps it. Made from whatever a
/// span is made from, but a temporary that owns its elements does not compile.
template <class T>
class Borrowed : public std::span<T> {
 public:
  constexpr Borrowed() = default;
  template <class R>
  requires(
      !std::derived_from<std::remove_cvref_t<R>, Borrowed> &&
      std::constructible_from<std::span<T>, std::remove_reference_t<R>&>) constexpr Borrowed(R&& elements)
      : std::span<T>(elements) {
    static_assert(std::is_lvalue_reference_v<R> || std::ranges::borrowed_range<R>,
                  "the elements are kept, not copied: give a variable that outlives this, not a temporary");
  }
  template <class First, class End>
  requires(std::constructible_from<std::span<T>, First, End>) constexpr Borrowed(First first, End end)
      : std::span<T>(first, end) {}
};

}  // namespace compresskv

template <class T>
inline constexpr bool std::ranges::enable_borrowed_range<compresskv::Borrowed<T>> = true;
