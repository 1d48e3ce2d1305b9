// A library compressor for one prompt, whichever method it is.
#pragma once

#include <compresskv/core/retained.hpp>
#include <compresskv/core/shape.hpp>
#include <compresskv/runtime/any_compressor.hpp>
#include <compresskv/view/attention_matrix.hpp>
#include <compresskv/view/hidden_states.hpp>
#include <compresskv/view/query_window.hpp>
#include <cstddef>
#include <iosfwd>
#include <memory>
#include <span>
#include <vector>

#include "engine/sequence.hpp"
#include "engine/thread_pool.hpp"
#include "method.hpp"

namespace ckv {

/// What shows how a layer is looked at: queries, and where a method wants those of the whole prompt perhaps
/// their attention, summed already; or what goes into its attention.
struct Observed {
  compresskv::QueryWindow<float> queries;
  const compresskv::AttentionSums* sums = nullptr;
  const compresskv::HiddenStates<float>* hidden_states = nullptr;  ///< before the others
};

/// Belongs to one sequence. Throws as the library's AnyCompressor does.
class PromptCompressor {
 public:
  PromptCompressor(const compresskv::AnyPlan& plan, engine::ThreadPool& pool);
  PromptCompressor(const PromptCompressor&) = delete;
  PromptCompressor& operator=(const PromptCompressor&) = delete;

  void begin(std::size_t prompt_tokens) { compressor_.begin(prompt_tokens); }
  void begin_turn(std::size_t total_tokens) { compressor_.begin_turn(total_tokens); }

  /// Compresses a layer where it lies and gives its memory back; where the method reaches back, that of
  /// earlier layers too.
  void compress(engine::LayerView& layer, const Observed& observed);

  /// Whether the method is shown repeats of the context: `observe`, then `finish`, in place of `compress`.
  bool repeats() const { return compressor_.plan().needs() == compresskv::Needs::repeats; }

  /// Shows a layer that holds repeats of a stretch behind the context; their queries are the layer's.
  void observe(engine::LayerView& layer, const compresskv::Stretch& stretch);

  /// Where this is the last layer, all shrink that waited for it.
  void finish(engine::LayerView& layer);

  const compresskv::Retained& retained(std::size_t layer) const { return compressor_.retained(layer); }
  compresskv::Held held(std::size_t tokens) const { return compressor_.held(tokens); }

  /// What it remembers between turns, as the library's AnyCompressor has it.
  void save(std::ostream& out, const compresskv::MadeWith& made) const { compressor_.save(out, made); }
  void load(std::istream& in, const compresskv::MadeWith& made) { compressor_.load(in, made); }

 private:
  template <class Change>
  void shrink(engine::LayerView& layer, Change&& change);

  engine::PoolExecutor executor_;  // before the compressor, which refers to it
  compresskv::AnyCompressor compressor_;
};

/// What the method is made from. There must be a budget.
compresskv::MethodSettings settings_of(const Compression& how);

/// For any method but `full`, which has nothing to compress. `prompt_tokens` matters with `working_rows`
/// alone; `pool` must outlive the result. Throws compresskv::ArgumentError where something does not fit the
/// model.
std::unique_ptr<PromptCompressor> make_compressor(const Compression& how, const compresskv::ModelShape& shape,
                                                  engine::ThreadPool& pool, std::size_t prompt_tokens = 0);

/// [query_head][token] attention that each token of a layer draws from all queries of the prompt, as the
/// library sums it up: what `Observed::sums` shows. Columns of the window are not filled. `layer` must hold
/// every row, `queries` show them all.
std::vector<float> sum_attention(const engine::LayerCache& layer,
                                 const compresskv::QueryWindow<float>& queries, std::size_t window,
                                 const compresskv::ModelShape& shape, engine::ThreadPool& pool);

}  // namespace ckv
