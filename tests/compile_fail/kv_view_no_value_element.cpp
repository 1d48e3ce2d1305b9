// expect: the kv view lacks value_element
#include "kv.hpp"

struct View : KvMembers {
  using key_element = float;
};

static_assert(compresskv::models_kv_view<View>());
