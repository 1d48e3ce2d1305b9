#pragma once

#include <compresskv/compresskv.hpp>

namespace ckv = compresskv;

/// A scorer that is whatever a case needs it to be, and a plan around it.
template <ckv::Granularity G, ckv::Needs N, ckv::Reach R>
struct Scorer {
  static constexpr ckv::Granularity granularity = G;
  static constexpr ckv::Needs needs = N;
  static constexpr ckv::Reach reach = R;
  std::size_t window() const { return 1; }
  void validate(const ckv::ModelShape&) const {}
  template <class Kv, class O, class X>
  void score(const ckv::kernel::LayerInput<Kv, O>&, ckv::Workspace&, X&, const ckv::Scores<G>&) const {}
};

const ckv::ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8};
const ckv::budget::Uniform uniform{ckv::Budget::tokens_per_layer(16)};
