// expect: the kv view lacks rows\(kv_head\) const that gives the number of rows
#include "kv.hpp"

struct View : Kv {
  std::size_t rows() const { return 1; }  // without the KV head
};

static_assert(compresskv::models_kv_view<View>());
