// expect: the kv view lacks kv_heads
#include "kv.hpp"

struct View : Kv {
  void kv_heads() const = delete;
};

static_assert(compresskv::models_kv_view<View>());
