// expect: value_run.*must give a Run<value_element>
#include "kv.hpp"

struct View : Kv {
  compresskv::Run<float> value_run(std::size_t, std::size_t) const { return {}; }
};

static_assert(compresskv::models_kv_view<View>());
