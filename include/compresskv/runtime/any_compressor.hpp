#pragma once

#include <cstddef>
#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "compresskv/budget/allocator.hpp"
#include "compresskv/core/any_executor.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/function_ref.hpp"
#include "compresskv/core/made_with.hpp"
#include "compresskv/core/policy.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/retained.hpp"
#include "compresskv/core/scores.hpp"
#include "compresskv/core/selection.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/stretch.hpp"
#include "compresskv/kernel/rotary.hpp"
#include "compresskv/method_settings.hpp"
#include "compresskv/runtime/settings_of_layers.hpp"
#include "compresskv/view/any_kv.hpp"
#include "compresskv/view/any_observation.hpp"

// A method that is chosen when the program runs: what `Plan` and `Compressor` are for one that is written
// down. Link `compresskv::runtime`, where all methods are compiled once, or include any_compressor_impl.hpp
// in one source file of yours.

namespace compresskv {

/// Shares a turn's rows out among the layers, or among all KV heads, as `budget::Allocator::allocate` has it.
using ShareRows = FunctionRef<void(const budget::Allowance& allowance, std::span<std::size_t> capacities)>;

/// What an engine may add to a method that is chosen by name.
struct AnyPlanOptions {
  /// Shares the rows out in place of the method, whose own way is the first argument: it may be called with
  /// any allowance, and what it gives changed. Called by `begin` and `begin_turn` where something is to be
  /// evicted. Not for cake, whose layers share as they arrive.
  std::function<void(ShareRows own, const budget::Allowance& allowance, std::span<std::size_t> capacities)>
      share_rows = {};
};

/// Scores of one layer: `Scores`, its granularity a value. Valid until the compressor's next call.
class AnyScores {
 public:
  template <Granularity G>
  explicit AnyScores(const Scores<G>& scores)
      : granularity_(G), scores_(scores.template as<Granularity::kv_head>()) {}

  Granularity granularity() const { return granularity_; }
  /// All values, row after row; they may be changed.
  std::span<float> values() const { return scores_.values(); }
  std::span<float> row(std::size_t index) const { return scores_.row(index); }
  std::size_t rows() const { return scores_.rows(); }
  /// Evictable tokens of a row.
  std::size_t tokens(std::size_t index = 0) const { return scores_.tokens(index); }
  /// Rows of the cache behind them, which are kept whatever the scores.
  std::size_t window(std::size_t index = 0) const { return scores_.window(index); }

  template <Granularity G>
  Scores<G> as() const {
    return scores_.template as<G>();
  }

 private:
  Granularity granularity_;
  Scores<Granularity::kv_head> scores_;
};

/// A way to a layer's view: any function of the layer that gives a `KvView`.
using AnyViews = FunctionRef<AnyKv(std::size_t layer)>;
/// What changes a layer's scores before anything is selected: see `Compressor::compress`.
using AnyReduce = FunctionRef<void(std::span<float> scores)>;

namespace detail {

/// One sequence, whatever method compresses it: what `AnyCompressor` says of each call.
class AnySequence {
 public:
  AnySequence() = default;
  AnySequence& operator=(const AnySequence&) = delete;
  virtual ~AnySequence() = default;

  virtual std::unique_ptr<AnySequence> clone() const = 0;
  virtual void begin(std::size_t prompt_tokens, const Protection& protection) = 0;
  virtual void begin_turn(std::size_t total_tokens, const Protection& protection) = 0;
  virtual Held truncate(std::size_t position) = 0;
  virtual Held held(std::size_t tokens) const = 0;
  virtual std::span<const std::size_t> capacities() const = 0;
  virtual const Retained& retained(std::size_t layer) const = 0;
  virtual std::span<const std::size_t> arrive(std::size_t layer, AnyViews views,
                                              const AnyObservation& observation, AnyReduce reduce) = 0;
  virtual void observe(std::size_t layer, const AnyKv& kv, const Stretch& stretch,
                       const AnyObservation& queries, std::span<const float> hidden_norms) = 0;
  virtual std::span<const std::size_t> finish(AnyViews views) = 0;
  virtual AnyScores score(std::size_t layer, const AnyKv* kv, const AnyObservation& observation) = 0;
  virtual const Selection& select(std::size_t layer, const AnyScores& scores) = 0;
  virtual const Selection& select(std::size_t layer, const AnyObservation& attention) = 0;
  virtual const Retained& compact(std::size_t layer, const AnyKv& kv, const Selection& selection) = 0;
  virtual const Retained& gather(std::size_t layer, const AnyKv& source, const Selection& selection,
                                 const AnyKv& target) = 0;
  virtual const Retained& rerotate(std::size_t layer, const AnyKv& kv, const kernel::Rotary& rotary) = 0;
  virtual std::size_t memory_bytes() const = 0;
  virtual void save(std::ostream& out, const MadeWith& made) const = 0;
  virtual void load(std::istream& in, const MadeWith& made) = 0;

 protected:
  AnySequence(const AnySequence&) = default;
};

/// One method for one model.
class AnyMethod {
 public:
  AnyMethod(const MethodInfo& method, const ModelShape& model_shape) : info(&method), shape(model_shape) {}
  AnyMethod(const AnyMethod&) = delete;
  AnyMethod& operator=(const AnyMethod&) = delete;
  virtual ~AnyMethod() = default;

  virtual std::unique_ptr<AnySequence> make(AnyExecutor executor) const = 0;

  const MethodInfo* const info;
  const ModelShape shape;
  Reach reach = Reach::own_layer;
  Needs needs = Needs::nothing;
  std::size_t window = 0;
};

/// The only function of the door that is compiled elsewhere: in any_compressor_impl.hpp.
std::shared_ptr<const AnyMethod> make_any_method(const ModelShape& shape, Method method,
                                                 const MethodSettings& settings,
                                                 const AnyPlanOptions& options);

}  // namespace detail

/// What to do for a model, the method chosen when the program runs: immutable, made once, shared by all
/// sequences and threads. Copies are cheap and share it.
class AnyPlan {
 public:
  /// Throws ArgumentError where `with_method` and `Plan` do: a name that is none, a missing head ranking, a
  /// policy that does not fit the model, a budget that cannot hold the window. `Method::full` is a method
  /// too: nothing is evicted, and the budget is not looked at.
  AnyPlan(const ModelShape& shape, Method method, const MethodSettings& settings = {},
          const AnyPlanOptions& options = {})
      : method_(detail::make_any_method(shape, method, settings, options)),
        made_(std::make_shared<const Made>(Made{settings, options})) {}
  AnyPlan(const ModelShape& shape, std::string_view method, const MethodSettings& settings = {},
          const AnyPlanOptions& options = {})
      : AnyPlan(shape, method_named(method).method, settings, options) {}

  const ModelShape& shape() const { return method_->shape; }
  const MethodInfo& method() const { return *method_->info; }
  /// What must be seen before a layer can shrink: with `Reach::own_layer` `arrive` never asks for another's
  /// view, and only with `Reach::all_layers` has `finish` anything to do.
  Reach reach() const { return method_->reach; }
  /// What must be shown of a layer.
  Needs needs() const { return method_->needs; }
  /// Queries that observe and are always kept.
  std::size_t window() const { return method_->window; }

  /// The same for some layers alone, as if the model had no others: for models some of whose layers have no
  /// cache that can shrink. `layers` are their numbers, ascending; theirs are the head ranking, the scores
  /// and the errors, and the budget's rows a layer. `model_heads` is at most their heads, and `hold_layers`
  /// counts those of them that it held. Throws ArgumentError where there are none, one is no
  /// layer of the model or they do not ascend, and as the constructor does.
  AnyPlan of_layers(std::span<const std::size_t> layers) const {
    ModelShape some = shape();
    detail::require(!layers.empty(), "layers are none, the model has ", some.layers, ": give one or more");
    for (std::size_t i = 0; i < layers.size(); ++i) {
      detail::require(layers[i] < some.layers && (i == 0 || layers[i - 1] < layers[i]), "layers[", i, "] is ",
                      layers[i], ", must be below the model's ", some.layers,
                      " and above the one before it: give ascending layer numbers");
    }
    some.layers = layers.size();
    return {some, method().method, detail::settings_of_layers(made_->settings, shape(), layers),
            made_->options};
  }

 private:
  friend class AnyCompressor;
  struct Made {
    MethodSettings settings;
    AnyPlanOptions options;
  };
  std::shared_ptr<const detail::AnyMethod> method_;
  std::shared_ptr<const Made> made_;  // from which it is made again for fewer layers
};

/// `Compressor` for a method that is chosen when the program runs: one class for all methods, element types
/// and layouts, and one call path: `arrive` for each layer in order, `finish` after the last.
///
///     ckv::AnyCompressor compressor{ckv::AnyPlan{model_shape, "snapkv", settings}};
///     compressor.begin(prompt_tokens);
///     for (l = 0; l < layers; ++l) {
///       for (std::size_t changed : compressor.arrive(l, views, queries)) { ... retained(changed) ... }
///     }
///     for (std::size_t changed : compressor.finish(views)) { ... }
///
/// Results are those of `Compressor`, bit for bit, and so are errors, what each call promises, and what may
/// be called from where. Belongs to one sequence and one thread at a time; a copy goes on on its own (beams).
/// From the second sequence of the same shape on nothing is allocated.
class AnyCompressor {
 public:
  /// `executor` refers to one that must outlive the compressor and its copies.
  explicit AnyCompressor(AnyPlan plan, AnyExecutor executor = {})
      : plan_(std::move(plan)), sequence_(plan_.method_->make(executor)) {}
  AnyCompressor(const AnyCompressor& other) : plan_(other.plan_), sequence_(other.sequence_->clone()) {}
  AnyCompressor(AnyCompressor&&) = default;
  AnyCompressor& operator=(const AnyCompressor& other) {
    if (this != &other) {
      *this = AnyCompressor(other);
    }
    return *this;
  }
  /// The sequence goes before the plan that it was made from.
  AnyCompressor& operator=(AnyCompressor&& other) noexcept {
    sequence_ = std::move(other.sequence_);
    plan_ = std::move(other.plan_);
    return *this;
  }
  ~AnyCompressor() = default;

  const AnyPlan& plan() const { return plan_; }

  /// Starts a sequence; goes on with it. As `Compressor` has them.
  void begin(std::size_t prompt_tokens, const Protection& protection = {}) {
    sequence_->begin(prompt_tokens, protection);
  }
  void begin_turn(std::size_t total_tokens, const Protection& protection = {}) {
    sequence_->begin_turn(total_tokens, protection);
  }
  /// Takes tokens back, says what the cache holds. As `Compressor` has them.
  Held truncate(std::size_t position) { return sequence_->truncate(position); }
  Held held(std::size_t tokens) const { return std::as_const(*sequence_).held(tokens); }

  std::span<const std::size_t> capacities() const { return sequence_->capacities(); }
  const Retained& retained(std::size_t layer) const { return sequence_->retained(layer); }

  /// Layer `layer` has ended its prefill; it, and where the method reaches back layers before it, shrink to
  /// what they may keep now. Returns the layers that the engine must shorten, ascending, for methods of their
  /// own layer just this one: `retained(l)` says what each holds. Valid until the next call.
  ///
  /// `views(l)` gives the view of a layer that has arrived, with all its rows; `observation` shows the window
  /// of this layer, and may be left out where `plan().needs()` says so. Methods that reach over layers want
  /// layers in order, each once a turn.
  ///
  /// Throws as `Compressor::compress` and `arrive`, and ArgumentError where the observation is missing or not
  /// one that the method can use; everything is then as it was.
  std::span<const std::size_t> arrive(std::size_t layer, AnyViews views,
                                      const AnyObservation& observation = {}, AnyReduce reduce = {}) {
    return sequence_->arrive(layer, views, observation, reduce);
  }

  /// Shows tokens that repeat a stretch of the context, where `plan().needs()` is `Needs::repeats`; `arrive`
  /// is then not called. As `Compressor::observe`; ArgumentError for a method that does not ask for it.
  void observe(std::size_t layer, const AnyKv& kv, const Stretch& stretch, const AnyObservation& queries,
               std::span<const float> hidden_norms = {}) {
    sequence_->observe(layer, kv, stretch, queries, hidden_norms);
  }

  /// All layers have arrived: those that waited for the last one shrink. Returns them; for most methods none
  /// does, and nothing is asked or done. Throws as `Compressor::finish`.
  std::span<const std::size_t> finish(AnyViews views) { return sequence_->finish(views); }

  /// The steps of `arrive` alone, as `Compressor` has them: scores of a layer, from its view or from
  /// attention alone; the rows to keep; moving them. `Method::full` has no scores: ArgumentError.
  template <class V>
  requires(!KeylessObservation<V>) AnyScores
      score(std::size_t layer, const V& kv, const AnyObservation& observation = {}) {
    const AnyKv any(kv);
    return sequence_->score(layer, &any, observation);
  }
  template <KeylessObservation O>
  AnyScores score(std::size_t layer, const O& attention) {
    return sequence_->score(layer, nullptr, attention);
  }
  const Selection& select(std::size_t layer, const AnyScores& scores) {
    return sequence_->select(layer, scores);
  }
  const Selection& select(std::size_t layer, const AnyObservation& attention) {
    return sequence_->select(layer, attention);
  }
  const Retained& compact(std::size_t layer, const AnyKv& kv, const Selection& selection) {
    return sequence_->compact(layer, kv, selection);
  }
  const Retained& gather(std::size_t layer, const AnyKv& source, const Selection& selection,
                         const AnyKv& target) {
    return sequence_->gather(layer, source, selection, target);
  }

  /// As `Compressor::rerotate`; ArgumentError for quantised keys.
  const Retained& rerotate(std::size_t layer, const AnyKv& kv, const kernel::Rotary& rotary) {
    return sequence_->rerotate(layer, kv, rotary);
  }

  /// Writes what the sequence remembers to a stream, takes it up again. As `Compressor` has them; the
  /// method's name is given, and `made.method` says what else of its settings is to be told apart.
  void save(std::ostream& out, const MadeWith& made = {}) const { sequence_->save(out, made); }
  void load(std::istream& in, const MadeWith& made = {}) { sequence_->load(in, made); }

  /// Bytes of scratch and of positions held by this compressor now.
  std::size_t memory_bytes() const { return sequence_->memory_bytes(); }

 private:
  AnyPlan plan_;
  std::unique_ptr<detail::AnySequence> sequence_;
};

}  // namespace compresskv
