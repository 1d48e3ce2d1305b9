#pragma once

#include <concepts>
#include <cstddef>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/workspace.hpp"

namespace compresskv::select {

/// A way to turn scores and a capacity into rows.
///
/// | member | meaning |
/// | --- | --- |
/// | `accepts(granularity)` | whether it can use scores of that granularity |
/// | `reach` | what it must have seen before a layer can shrink |
/// | `select(scores, capacity, workspace, selection)` | ascending rows, `capacity` a KV head (mean), the
/// window whole |
///
/// Higher score first, then lower position, then lower KV head.
template <class S>
concept Selector = std::copyable<S> && requires(Granularity granularity) {
  { S::reach } -> std::same_as<const Reach&>;
  { S::accepts(granularity) } -> std::same_as<bool>;
};

/// A selector that also takes a capacity for each KV head in place of one for all:
/// `select(scores, std::span<const std::size_t> capacities, workspace, selection)`.
template <class S>
concept SelectsByHead = Selector<S> &&
    requires(const S& selector, const Scores<Granularity::kv_head>& scores,
             std::span<const std::size_t> capacities, Workspace& workspace, Selection& selection) {
  selector.select(scores, capacities, workspace, selection);
};

}  // namespace compresskv::select
