// Attention as llama.cpp computes it, token by token.
#pragma once

#include <llama.h>

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace ckv {

/// Shows the attention of tokens that are decoded one at a time: the function that a context calls for each
/// node of its graph (`cb_eval`). Rows exist without flash attention alone, so that it is turned off.
class ShownAttention {
 public:
  using Show = std::function<void(std::size_t layer, std::size_t head, std::span<const float> row)>;

  ShownAttention(std::size_t query_heads, Show show) : heads_(query_heads), show_(std::move(show)) {}
  ShownAttention(const ShownAttention&) = delete;
  ShownAttention& operator=(const ShownAttention&) = delete;

  /// A context made with these parameters shows its graphs to this object, which must outlive it.
  void attach(llama_context_params& params);

  /// From here on a token is decoded behind `before` others; sequence 0 alone has cells.
  void begin(std::size_t before);
  /// Throws engine::Error with what `Show` threw meanwhile, or where the graph is not as expected.
  void end();

 private:
  static bool call(ggml_tensor* node, bool ask, void* object);
  void take(const ggml_tensor& node);

  std::size_t heads_;
  Show show_;
  std::size_t tokens_ = 0;  // that the token looks at, itself included; 0: none is decoded
  std::string failure_;
  std::vector<float> rows_;  // [head][cell]
};

}  // namespace ckv
