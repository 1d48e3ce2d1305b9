// expect: this composition must see more than one layer before it can shrink any
#include <compresskv/compresskv.hpp>

namespace ckv = compresskv;

struct Scorer {
  static constexpr ckv::Granularity granularity = ckv::Granularity::layer;
  static constexpr ckv::Needs needs = ckv::Needs::nothing;
  static constexpr ckv::Reach reach = ckv::Reach::all_layers;
  std::size_t window() const { return 1; }
  void validate(const ckv::ModelShape&) const {}
  template <class Kv, class O, class X>
  void score(const ckv::kernel::LayerInput<Kv, O>&, ckv::Workspace&, X&,
             const ckv::Scores<granularity>&) const {}
};

const ckv::ModelShape shape{.layers = 1, .query_heads = 2, .kv_heads = 1, .head_dim = 8};
const ckv::budget::Uniform uniform{ckv::Budget::tokens_per_layer(16)};

const ckv::Plan plan{shape, Scorer{}, ckv::select::SharedTopK{}, uniform};

void compress(const ckv::StridedKv<float>& kv) {
  ckv::Compressor compressor{plan};
  compressor.compress(0, kv);
}
