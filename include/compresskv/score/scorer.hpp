#pragma once

#include <concepts>
#include <cstddef>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/workspace.hpp"
#include "compresskv/kernel/layer_input.hpp"

namespace compresskv::score {

/// A way to score tokens: one header, one struct.
///
/// | member | meaning |
/// | --- | --- |
/// | `granularity` | what a row of its scores is: the layer or a KV head |
/// | `needs` | what it must be shown |
/// | `reach` | what it must have seen before a layer can shrink |
/// | `window()` | queries that observe and are always kept |
/// | `validate(shape)` | throws when it does not fit the model |
/// | `score(input, workspace, executor, scores)` | fills `Scores<granularity>`, higher means keep; `input` is
/// a `kernel::LayerInput` |
template <class S>
concept Scorer = std::copyable<S> && requires(const S& scorer, const ModelShape& shape) {
  { S::granularity } -> std::same_as<const Granularity&>;
  { S::needs } -> std::same_as<const Needs&>;
  { S::reach } -> std::same_as<const Reach&>;
  { scorer.window() } -> std::same_as<std::size_t>;
  scorer.validate(shape);
};

}  // namespace compresskv::score
