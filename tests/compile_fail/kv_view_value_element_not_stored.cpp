// expect: the kv view's value_element is no type that values can be stored as
#include "kv.hpp"

struct View : Kv {
  using value_element = int;
  compresskv::Run<int> value_run(std::size_t, std::size_t) const { return {}; }
};

static_assert(compresskv::models_kv_view<View>());
