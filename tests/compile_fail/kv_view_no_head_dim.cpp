// expect: the kv view lacks head_dim
#include "kv.hpp"

struct View : Kv {
  void head_dim() const = delete;
};

static_assert(compresskv::models_kv_view<View>());
