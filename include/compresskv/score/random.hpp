#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compresskv/core/policy.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/kernel/layer_input.hpp"
#include "compresskv/score/scorer.hpp"
#include "compresskv/score/window_scorer.hpp"

namespace compresskv::score {

struct RandomOptions {
  std::uint64_t seed = 0;
  std::size_t window = 8;  ///< most recent tokens, kept whatever their scores
};

/// Random rows: the floor that every method must beat.
///
///     score[g][t] = hash(seed, layer, KV head, position) in [0, 1)
///
/// A token's score depends on nothing else, so that results repeat on any machine and over turns.
/// docs/method.md 3.10. Cost: a hash a row.
class Random : public WindowScorer<Granularity::kv_head, Needs::nothing, RandomOptions> {
 public:
  using WindowScorer::WindowScorer;

  template <class Kv, class O, class X>
  void score(const kernel::LayerInput<Kv, O>& in, Workspace&, X&, const Scores<granularity>& scores) const {
    for (std::size_t kv_head = 0; kv_head < in.shape.kv_heads; ++kv_head) {
      const std::uint64_t head_seed = mixed(mixed(options().seed + in.layer) + kv_head);
      Retained::Cursor positions = in.retained.cursor(kv_head);
      std::size_t t = 0;
      for (float& score : scores.row(kv_head)) {
        // The upper 24 bits: float32 holds each such fraction exactly.
        score = static_cast<float>(mixed(head_seed + positions.seek(t++)) >> 40U) * 0x1p-24F;
      }
    }
  }

 private:
  /// The finaliser of splitmix64: any change of the input changes about half of the bits.
  static constexpr std::uint64_t mixed(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27U)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31U);
  }
};

}  // namespace compresskv::score
