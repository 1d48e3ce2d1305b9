// expect: a kv view must be copyable
#include "kv.hpp"

struct View : Kv {
  View(const View&) = delete;
};

static_assert(compresskv::models_kv_view<View>());
