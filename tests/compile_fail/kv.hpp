#pragma once

#include <compresskv/view/kv_view.hpp>

struct KvMembers {
  std::size_t kv_heads() const { return 1; }
  std::size_t head_dim() const { return 8; }
  std::size_t rows(std::size_t) const { return 1; }
  std::size_t run_count(std::size_t) const { return 1; }
  compresskv::Run<float> key_run(std::size_t, std::size_t) const { return {}; }
  compresskv::Run<compresskv::half> value_run(std::size_t, std::size_t) const { return {}; }
};

/// All that a view needs: a case takes one thing away.
struct Kv : KvMembers {
  using key_element = float;
  using value_element = compresskv::half;
};
