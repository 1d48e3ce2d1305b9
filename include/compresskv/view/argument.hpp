#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>

#include "compresskv/core/borrowed.hpp"
#include "compresskv/core/element.hpp"
#include "compresskv/core/sizes.hpp"
#include "compresskv/view/layout.hpp"

// What a view's constructor takes: one template each, whose static_asserts say what a wrong argument should
// be. A list of overloads that do not match would fill a screen.

namespace compresskv::detail {

/// What `A`, a pointer or a contiguous range, points to; void where it is neither.
template <class A>
struct PointeeOf {
  using type = void;
};
template <class A>
requires std::is_pointer_v<std::remove_cvref_t<A>>
struct PointeeOf<A> {
  using type = std::remove_pointer_t<std::remove_cvref_t<A>>;
};
template <class A>
requires std::ranges::contiguous_range<A>
struct PointeeOf<A> {
  using type = std::remove_reference_t<std::ranges::range_reference_t<A>>;
};
template <class A>
using Pointee = typename PointeeOf<A>::type;

/// Types that a pointer can be to; int8 rows have a view of their own.
template <class T>
inline constexpr bool plain_stored = Stored<T> && !std::same_as<std::remove_const_t<T>, AffineInt8>;

/// The type of elements that `A` points to, for class template argument deduction. Of what is no such
/// pointer, float: the constructor then says what it should be, and that error stays alone.
template <class A>
using StoredIn = std::conditional_t<plain_stored<Pointee<A>>, Pointee<A>, float>;
template <class A>
using ElementIn = std::conditional_t<Element<Pointee<A>>, std::remove_const_t<Pointee<A>>, float>;

/// Whether what `A` points to can outlive the call: not the elements of a temporary container.
template <class A>
inline constexpr bool outlives = std::is_lvalue_reference_v<A> || std::is_pointer_v<std::remove_cvref_t<A>> ||
                                 std::ranges::borrowed_range<A>;

/// Stands for a layout that was not given.
struct NoLayout {};

/// `layout` once more, for the values; any other layout where it is none, which is an error elsewhere.
template <class L>
constexpr auto again(const L& layout) {
  if constexpr (layout::Layout<L>) {
    return layout;
  } else {
    return layout::Strides{};
  }
}

/// Whether `A` points to elements that may stand for `T`.
template <class A, class T>
inline constexpr bool points_to = std::is_convertible_v<Pointee<A> (*)[], T (*)[]>;
template <class A, class T>
requires std::is_void_v<Pointee<A>>
inline constexpr bool points_to<A, T> = false;

/// The memory that an argument points to; of a pointer, as much as memory can be.
template <class T, class A>
constexpr Borrowed<T> memory_of(A&& argument) {
  if constexpr (std::is_pointer_v<std::remove_cvref_t<A>>) {
    return {static_cast<T*>(argument), argument == nullptr ? 0 : max_bytes / sizeof(T)};
  } else {
    return Borrowed<T>(std::forward<A>(argument));
  }
}

/// Of an argument that is wrong, for class template argument deduction: see `StoredIn`.
template <class A>
using PointedElement = std::conditional_t<std::is_pointer_v<A>, ElementIn<A>, float>;

}  // namespace compresskv::detail
