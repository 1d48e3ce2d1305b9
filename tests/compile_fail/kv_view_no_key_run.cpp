// expect: the kv view lacks key_run
#include "kv.hpp"

struct View : Kv {
  compresskv::Run<float> key_run(std::size_t, std::size_t) { return {}; }  // not const
};

static_assert(compresskv::models_kv_view<View>());
