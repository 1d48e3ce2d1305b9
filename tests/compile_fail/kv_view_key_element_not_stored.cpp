// expect: the kv view's key_element is no type that keys can be stored as
#include "kv.hpp"

struct View : Kv {
  using key_element = double;
  compresskv::Run<double> key_run(std::size_t, std::size_t) const { return {}; }
};

static_assert(compresskv::models_kv_view<View>());
