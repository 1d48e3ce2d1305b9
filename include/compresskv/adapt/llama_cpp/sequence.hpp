#pragma once

#include <llama.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compresskv/adapt/llama_cpp/cells_of_rows.hpp"
#include "compresskv/adapt/llama_cpp/context_state.hpp"
#include "compresskv/adapt/llama_cpp/model.hpp"
#include "compresskv/adapt/llama_cpp/observer.hpp"
#include "compresskv/adapt/llama_cpp/sliding_layers.hpp"
#include "compresskv/adapt/llama_cpp/state.hpp"
#include "compresskv/core/any_executor.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/runtime/any_compressor.hpp"
#include "compresskv/view/any_observation.hpp"

namespace compresskv::llama_cpp {

/// What a compression has done to a sequence.
struct Compressed {
  std::size_t rows_before = 0;  ///< cells of the context
  std::size_t rows_after = 0;
  std::size_t bytes_before = 0;  ///< of its state
  std::size_t bytes_after = 0;
};

/// One sequence of a llama.cpp context whose cache is compressed by a method of the library.
///
///     Sequence sequence{plan, observer, {.context = context, .sequence = 0}};
///     sequence.read(prompt);                 // or Observer::decode, by batches of your own
///     sequence.compress();                   // the context now holds few cells: go on with llama_decode
///
/// Where it goes on: at `next_position()`, which llama.cpp's own counting gives too (`llama_batch_get_one`).
/// Later turns: read them and compress again. Belongs to one thread at a time; the plan's copies, the
/// observer and the contexts are the caller's, and the latter two must outlive it. Its memory is a few bytes
/// a kept row; while it compresses also the sequence's whole state, and what is kept of it once more.
///
/// Where layers slide (gemma, gpt-oss) it compresses the others: the plan's head ranking, scores and budget
/// are theirs, and the last window of those that slide stays whole.
///
/// All or nothing: whatever a call throws, the context's sequence and this object are as they were. One
/// exception: a copy that shares cells (`copy_to`) in a context without a spare sequence number and without
/// free cells for what is kept is lost, and the error says so.
class Sequence {
 public:
  /// Nothing is read yet, or the sequence holds tokens that were decoded before. Throws ArgumentError where
  /// the place is none, plan, observer and model are not of one shape, the observer's window is shorter than
  /// the plan's, or the method wants the attention of all queries (h2o), which libllama does not show, or
  /// the context once more (kvzip, kvzip-plus).
  Sequence(AnyPlan plan, Observer& observer, const Place& place, AnyExecutor executor = {})
      : observer_(&observer),
        place_(place),
        plan_(std::move(plan)),
        executor_(executor),
        compressor_(plan_, executor) {
    detail::check_place(place);
    check_shape(model_shape(llama_get_model(place.context)), "the context's model");
    check_shape(observer.shape(), "the observer");
    detail::require(
        this->plan().needs() != Needs::all_queries, "method ", this->plan().method().name,
        " wants the attention of all queries, which libllama does not show: take snapkv, or another");
    detail::require(this->plan().needs() != Needs::repeats, "method ", this->plan().method().name,
                    " has the context fed once more and taken back, which this sequence does not do: take "
                    "snapkv, or another");
    detail::require(observer.window() >= this->plan().window() || !wants_queries(), "the observer holds ",
                    observer.window(), " queries, the plan's window is ", this->plan().window(),
                    ": make it with that");
  }

  Sequence(Sequence&&) = default;
  Sequence& operator=(Sequence&&) = default;
  ~Sequence() = default;

  const AnyPlan& plan() const { return plan_; }
  const Place& place() const { return place_; }
  /// What each layer kept, by `retained(i)`: valid once it was compressed. Its layer `i` is the model's
  /// `layers()[i]`, as is that of its plan.
  const AnyCompressor& compressor() const { return compressor_; }
  /// The layers that are compressed, ascending: those that do not slide. Throws ArgumentError where that is
  /// not known yet (`Observer::global_layers`).
  std::span<const std::size_t> layers() const { return observer_->global_layers(model()); }
  /// The position of the token that comes next.
  std::size_t next_position() const {
    return static_cast<std::size_t>(llama_memory_seq_pos_max(memory(), place_.sequence) + 1);
  }

  /// Decodes `tokens` behind those that the sequence has, in batches of the context's size; the last has
  /// logits. The last ones are observed. Throws ArgumentError where there are none, and Error where
  /// `llama_decode` fails: then those of earlier batches stay decoded, no other.
  void read(std::span<const llama_token> tokens) {
    detail::require(!tokens.empty(), "read: tokens are none: give those of the prompt");
    const std::size_t most = llama_n_batch(place_.context);
    std::vector<llama_token> own(tokens.begin(), tokens.end());
    std::vector<llama_pos> positions(own.size());
    for (std::size_t i = 0; i < own.size(); ++i) {
      positions[i] = static_cast<llama_pos>(next_position() + i);
    }
    std::vector<std::int32_t> counts(own.size(), 1);
    std::vector<llama_seq_id*> sequences(own.size(), &place_.sequence);
    std::vector<std::int8_t> logits(own.size(), 0);
    logits.back() = 1;
    for (std::size_t first = 0; first < own.size(); first += most) {
      const std::size_t count = (std::min)(most, own.size() - first);
      const llama_batch batch{.n_tokens = static_cast<std::int32_t>(count),
                              .token = own.data() + first,
                              .embd = nullptr,
                              .pos = positions.data() + first,
                              .n_seq_id = counts.data() + first,
                              .seq_id = sequences.data() + first,
                              .logits = logits.data() + first};
      const std::int32_t status = observer_->decode(place_.context, batch, own.size() - first - count);
      detail::require<Error>(status == 0, "llama_decode gave ", status, " for tokens ", first, " to ",
                             first + count - 1, " of ", own.size(),
                             status == 1 ? ": no room in the cache; make the context with a greater n_ctx"
                                         : ": libllama's log says why");
    }
  }

  /// Compresses what the sequence holds, in its context. `protection` as `Compressor::begin` has it.
  ///
  /// Throws ArgumentError, besides what the method throws, where the last tokens were not observed, the
  /// sequence was changed by others, its state is of a kind that is not compressed (see `State`), or the
  /// method leaves layers or KV heads unequal rows. Cost: two reads of the state and one write of what is
  /// kept, over the bus where the cache is on a GPU, and the method's own on this machine's processor.
  Compressed compress(const Protection& protection = {}) { return compress_into(place_, protection); }

  /// The same, and the sequence moves to `target`, an empty sequence of the same model in this or another
  /// context, made with the same `type_k`, `type_v` and flash attention; a smaller context has memory for
  /// what is kept alone. Throws also where `target` holds tokens, and Error where it cannot take the state.
  Compressed compress_into(const Place& target, const Protection& protection = {}) {
    const bool stays = target.context == place_.context && target.sequence == place_.sequence;
    detail::check_place(target);
    detail::require(stays || is_empty(target), "sequence ", target.sequence,
                    " of the target holds tokens: remove them with llama_memory_seq_rm");
    detail::require(!is_empty(place_), "sequence ", place_.sequence, " holds no tokens: read a prompt first");

    leave_out_sliding_layers();
    detail::StateBytes bytes;
    bytes.read(place_);
    State state = state_of(bytes.span());
    state.sort();
    Compressed result{.rows_before = state.cells(), .bytes_before = bytes.size};

    AnyCompressor next = compressor_;
    begin(next, state, protection);
    const std::size_t total = static_cast<std::size_t>(state.positions().back()) + 1;
    compress_layers(next, state, total);

    const std::vector<std::uint8_t> smaller = state.first_rows(
        detail::cell_positions(next), {.streams = detail::streams_of(*target.context),
                                       .sequence = static_cast<std::int32_t>(target.sequence)});
    result.rows_after = detail::rows_of_all(next);
    result.bytes_after = smaller.size();

    if (const auto spare = stays && shared_ ? spare_sequence() : std::nullopt) {
      replace_shared(smaller, *spare);
    } else {
      // Its rows have moved: what is to be put back on failure is read again, while the context still has it.
      if (stays) {
        bytes.read(place_);
      }
      replace(target, smaller, stays ? bytes.span() : std::span<const std::uint8_t>{});
    }
    if (!stays) {
      observer_->copy(place_, target);
      observer_->forget(place_);
      detail::remove_sequence(place_);
    }
    compressor_ = std::move(next);
    compressed_ = true;
    shared_ = false;
    place_ = target;
    return result;
  }

  /// A second sequence of the context that goes its own way from here: `llama_memory_seq_cp`. Cells are
  /// shared until one of the two is compressed, which then needs cells of its own.
  Sequence copy_to(llama_seq_id sequence) {
    Sequence copy(*this);
    copy.shared_ = detail::streams_of(*place_.context) == 1;
    copy.place_.sequence = sequence;
    detail::check_place(copy.place_);
    detail::require(is_empty(copy.place_), "sequence ", sequence,
                    " holds tokens: remove them with llama_memory_seq_rm");
    llama_memory_seq_cp(memory(), place_.sequence, sequence, -1, -1);
    observer_->copy(place_, copy.place_);
    shared_ = copy.shared_;
    return copy;
  }

  /// Takes back all tokens from `position` on, as rejected drafts are: decoded since the last compression, or
  /// of its window. Throws ArgumentError where the token before `position` was evicted somewhere, as then the
  /// sequence could not go on there, or tokens of the sliding window before it are no longer held.
  void truncate(std::size_t position) {
    detail::require(position > 0 && position <= next_position(), "truncate: position is ", position,
                    ", must be 1 to ", next_position());
    if (slides()) {
      detail::require_window(place_, position);
    }
    if (compressed_) {
      const std::size_t layers = compressor_.plan().shape().layers;
      for (std::size_t layer = 0; layer < layers; ++layer) {
        const Retained& kept = compressor_.retained(layer);
        for (std::size_t head = 0; head < kept.lists() && position < kept.next_position(); ++head) {
          detail::require(
              newer_rows(kept, head, position) == kept.next_position() - position &&
                  kept.row(position - 1, head),
              "truncate: position is ", position, ", of the tokens before ", kept.next_position(),
              " some from there on were evicted: only the window's and later ones can be taken back");
        }
      }
      compressor_.truncate(position);
    }
    llama_memory_seq_rm(memory(), place_.sequence, static_cast<llama_pos>(position), -1);
  }

 private:
  Sequence(const Sequence&) = default;  // two would write to one place: copy_to

  const llama_model* model() const { return llama_get_model(place_.context); }
  llama_memory_t memory() const { return llama_get_memory(place_.context); }
  static bool is_empty(const Place& place) { return detail::is_empty(place); }
  bool wants_queries() const {
    return plan().needs() == Needs::window_attention || plan().needs() == Needs::window_queries;
  }

  /// Whether some layers have a window: where that is not known yet, whether the model's family has.
  bool slides() const {
    const std::size_t layers = compressor_.plan().shape().layers;
    return llama_model_n_swa(model()) > 0 && (!compressed_ || layers < plan_.shape().layers);
  }

  /// Before it compresses: only now a graph must have shown which layers slide.
  void leave_out_sliding_layers() {
    const std::span<const std::size_t> others = layers();
    if (others.size() < compressor_.plan().shape().layers) {
      compressor_ = AnyCompressor(plan_.of_layers(others), executor_);
    }
  }

  State state_of(std::span<std::uint8_t> bytes) const {
    const ModelShape& shape = compressor_.plan().shape();
    return {bytes, shape, shape.layers < plan_.shape().layers ? State::Second::sliding : State::Second::none};
  }

  void check_shape(const ModelShape& other, const char* whose) const {
    const ModelShape& shape = plan().shape();
    detail::require(other.layers == shape.layers && other.query_heads == shape.query_heads &&
                        other.kv_heads == shape.kv_heads && other.head_dim == shape.head_dim,
                    "the plan is for ", shape.layers, " layers of ", shape.query_heads, " query heads, ",
                    shape.kv_heads, " KV heads of ", shape.head_dim, "; ", whose, " has ", other.layers, ", ",
                    other.query_heads, ", ", other.kv_heads, " of ", other.head_dim,
                    ": make all of them from model_shape(model)");
  }

  static std::size_t newer_rows(const Retained& kept, std::size_t head, std::size_t position) {
    return kept.rows(head) - kept.positions(head).rows_before(position);
  }

  /// Announces the tokens, and holds the cells against what the compressor knows of them.
  void begin(AnyCompressor& next, const State& state, const Protection& protection) const {
    const std::size_t total = static_cast<std::size_t>(state.positions().back()) + 1;
    if (!compressed_) {
      detail::require(
          state.cells() == total && state.positions().front() == 0, "sequence ", place_.sequence, " has ",
          state.cells(), " cells and its last position is ", total - 1,
          ": it was shifted or cut by others; compress a sequence that holds every token from 0 on");
      next.begin(total, protection);
      return;
    }
    const std::size_t known =
        next.retained(0).rows(0) + total - (std::min)(total, next.retained(0).next_position());
    detail::require(state.cells() == known && total >= next.retained(0).next_position(), "sequence ",
                    place_.sequence, " has ", state.cells(), " cells up to position ", total - 1, ", ", known,
                    " were expected: it was changed by others; take tokens back with Sequence::truncate");
    next.begin_turn(total, protection);
  }

  void compress_layers(AnyCompressor& next, const State& state, std::size_t total) const {
    const std::size_t layers = next.plan().shape().layers;
    // Methods that reach back are shown an earlier layer as they have left it.
    const std::size_t heads = plan().shape().kv_heads;
    std::vector<std::size_t> rows(layers * heads, state.cells());
    const auto views = [&](std::size_t layer) {
      return state.view(layer, std::span<const std::size_t>(rows).subspan(layer * heads, heads));
    };
    const auto shorten = [&](std::span<const std::size_t> changed) {
      for (const std::size_t layer : changed) {
        for (std::size_t head = 0; head < heads; ++head) {
          rows[layer * heads + head] = next.retained(layer).rows(head);
        }
      }
    };
    const std::size_t window = wants_queries() ? (std::min)(plan().window(), total) : 0;
    const std::size_t seen = window > 0 ? observer_->seen(place_, total) : 0;
    detail::require(
        seen >= window, "of the last ", window, " tokens of sequence ", place_.sequence, " ", seen,
        " were observed: decode them with Sequence::read or Observer::decode, in a context that the "
        "observer was attached to");
    const std::span<const std::size_t> numbers = this->layers();
    for (std::size_t layer = 0; layer < layers; ++layer) {
      if (window > 0) {
        shorten(next.arrive(layer, views, observer_->queries(place_, numbers[layer])));
      } else {
        shorten(next.arrive(layer, views));
      }
    }
    next.finish(views);
  }

  /// Puts a state in the sequence's place; where libllama does not take it, what was there before comes back.
  void replace(const Place& target, std::span<const std::uint8_t> state,
               std::span<const std::uint8_t> before) const {
    const std::string reason = write(target, state);
    if (reason.empty()) {
      return;
    }
    detail::remove_sequence(target);
    const bool restored = before.empty() || detail::write_state(target, before);
    detail::fail<Error>("sequence ", target.sequence, ": ", reason,
                        restored ? "" : "; the sequence could not be put back and is now empty");
  }

  /// The same for one that shares cells with a copy. They do not become free, so there may be no room to put
  /// it back: a spare sequence holds them meanwhile.
  void replace_shared(std::span<const std::uint8_t> state, llama_seq_id spare) const {
    llama_memory_seq_cp(memory(), place_.sequence, spare, -1, -1);
    const std::string reason = write(place_, state);
    if (!reason.empty()) {
      detail::remove_sequence(place_);
      llama_memory_seq_cp(memory(), spare, place_.sequence, -1, -1);
    }
    detail::remove_sequence({place_.context, spare});
    detail::require<Error>(reason.empty(), "sequence ", place_.sequence, ": ", reason);
  }

  std::optional<llama_seq_id> spare_sequence() const {
    for (std::uint32_t id = 0; id < llama_n_seq_max(place_.context); ++id) {
      if (is_empty({place_.context, static_cast<llama_seq_id>(id)})) {
        return static_cast<llama_seq_id>(id);
      }
    }
    return std::nullopt;
  }

  /// Why a state could not be written; empty where it was.
  std::string write(const Place& target, std::span<const std::uint8_t> state) const {
    return detail::write_state(target, state)
               ? why_not_as_written(target, state)
               : "the context did not take the state: its flash attention, type_k or type_v are others than "
                 "where "
                 "the sequence comes from, or it has too few free cells; libllama's log says which";
  }

  /// The state read back: empty where it is what was written, its cells in any order. Formats have no number
  /// of their own, so this is what tells that libllama understood.
  std::string why_not_as_written(const Place& target, std::span<const std::uint8_t> written) const try {
    detail::StateBytes now;
    now.read(target);
    if (std::ranges::equal(now.span(), written)) {
      return {};
    }
    std::vector<std::uint8_t> copy(written.begin(), written.end());
    return std::ranges::equal(by_position(now.span()), by_position(copy))
               ? std::string()
               : std::string(
                     "the context gives back another state than it was given: its libllama writes states "
                     "in a format that is not known here");
  } catch (const std::exception& error) {
    return error.what();
  }

  /// The same state, its cells by ascending position.
  std::vector<std::uint8_t> by_position(std::span<std::uint8_t> bytes) const {
    State state = state_of(bytes);
    state.sort();
    state.sort_sliding();
    return state.first_rows(state.positions(), {.streams = state.streams(), .sequence = state.sequence()});
  }

  Observer* observer_;
  Place place_;
  AnyPlan plan_;  // for all layers
  AnyExecutor executor_;
  AnyCompressor compressor_;  // for those that do not slide, once it has compressed
  bool compressed_ = false;
  bool shared_ = false;  // cells with a copy
};

}  // namespace compresskv::llama_cpp
