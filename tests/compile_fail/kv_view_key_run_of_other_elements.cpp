// expect: key_run.*must give a Run<key_element>
#include "kv.hpp"

struct View : Kv {
  compresskv::Run<compresskv::half> key_run(std::size_t, std::size_t) const { return {}; }
};

static_assert(compresskv::models_kv_view<View>());
