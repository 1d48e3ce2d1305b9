// expect: the kv view lacks key_element
#include "kv.hpp"

struct View : KvMembers {
  using value_element = compresskv::half;
};

static_assert(compresskv::models_kv_view<View>());
