// expect: the kv view lacks value_run
#include "kv.hpp"

struct View : Kv {
  void value_run() const;
};

static_assert(compresskv::models_kv_view<View>());
