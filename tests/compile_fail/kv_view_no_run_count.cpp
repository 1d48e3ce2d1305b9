// expect: the kv view lacks run_count
#include "kv.hpp"

struct View : Kv {
  void run_count(std::size_t) const {}
};

static_assert(compresskv::models_kv_view<View>());
