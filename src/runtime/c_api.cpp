#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <istream>
#include <limits>
#include <new>
#include <optional>
#include <span>
#include <sstream>
#include <streambuf>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compresskv/compresskv.h"
#include "compresskv/io/query_statistics_file.hpp"
#include "compresskv/io/surrogate_file.hpp"
#include "compresskv/runtime/any_compressor.hpp"
#include "compresskv/sequence/saved_bytes.hpp"
#include "compresskv/view/attention_matrix.hpp"
#include "compresskv/view/hidden_states.hpp"
#include "compresskv/view/int8_kv.hpp"
#include "compresskv/view/paged_kv.hpp"
#include "compresskv/view/query_window.hpp"
#include "compresskv/view/strided_kv.hpp"

namespace ckv = compresskv;

struct ckv_plan {
  ckv::AnyPlan plan;
};

struct ckv_sequence {
  ckv::AnyCompressor compressor;
};

namespace {

using ckv::detail::require;

/// What `views` of the caller returned: it ends the call that asked.
struct ViewsRefused {
  ckv_status status;
};

std::string& last_error() {
  thread_local std::string text;
  return text;
}

ckv_status failed(ckv_status status, const char* text) noexcept {
  try {
    last_error() = text;
  } catch (...) {  // no memory for the text: what it says then is shorter
    last_error().clear();
  }
  return status;
}

/// Runs `body`; what it throws becomes a status and a text.
template <class F>
ckv_status guarded(F&& body) noexcept {
  try {
    body();
    return CKV_OK;
  } catch (const ViewsRefused& refused) {
    return failed(refused.status, "views() gave no view of the layer it was asked for");
  } catch (const ckv::ScoreError& error) {
    return failed(CKV_BAD_SCORE, error.what());
  } catch (const ckv::ArgumentError& error) {
    return failed(CKV_BAD_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return failed(CKV_NO_MEMORY, "memory ran out");
  } catch (const std::exception& error) {
    return failed(CKV_FAILED, error.what());
  } catch (...) {
    return failed(CKV_FAILED, "an exception of no known type");
  }
}

void require_given(const void* argument, const char* name) {
  require(argument != nullptr, name, " is NULL: give one");
}

/// More than any struct of this header will have: what is larger was never set.
constexpr std::size_t largest_struct = 4096;

/// Writes the defaults of a struct as far as the caller knows it.
template <class T>
void init_as(T* caller, const T& defaults, std::size_t size) {
  if (caller == nullptr) {
    return;
  }
  std::memset(static_cast<void*>(caller), 0, size);
  std::memcpy(static_cast<void*>(caller), &defaults, (std::min)(size, sizeof(T)));
  std::memcpy(static_cast<void*>(caller), &size, (std::min)(size, sizeof(size)));
}

/// A struct as this library has it: fields beyond what the caller's has keep their defaults.
template <class T, class Init>
T as_known(const T* given, const char* name, Init&& init) {
  require_given(given, name);
  T known;
  init(&known, sizeof(T));
  const std::size_t size = given->struct_size;
  require(size >= sizeof(std::size_t) && size <= largest_struct, name, ": struct_size is ", size, ": call ",
          name, "_init first");
  const auto* const bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(T); i < size; ++i) {
    require(bytes[i] == 0, name, ": byte ", i, " is set, this library knows ", sizeof(T),
            " bytes: link the library that the header came with");
  }
  std::memcpy(&known, given, (std::min)(size, sizeof(T)));
  known.struct_size = sizeof(T);
  return known;
}

ckv::Budget budget_of(const ckv_settings& settings) {
  switch (settings.budget) {
    case CKV_BUDGET_RATIO:
      return ckv::Budget::kept_ratio(settings.budget_ratio);
    case CKV_BUDGET_ROWS:
      return ckv::Budget::tokens_per_layer(settings.budget_amount);
    case CKV_BUDGET_BYTES:
      return ckv::Budget::bytes(settings.budget_amount);
  }
  ckv::detail::fail<ckv::ArgumentError>("ckv_settings: budget is ", static_cast<int>(settings.budget),
                                        ", must be a CKV_BUDGET_ value");
}

std::optional<ckv::kernel::Pool> pool_of(const ckv_settings& settings) {
  switch (settings.pool) {
    case CKV_POOL_AVERAGE:
      return ckv::kernel::Pool::average;
    case CKV_POOL_MAX:
      return ckv::kernel::Pool::max;
    case CKV_POOL_TRAILING:
      return ckv::kernel::Pool::trailing;
    case CKV_POOL_OF_METHOD:
      return std::nullopt;
  }
  ckv::detail::fail<ckv::ArgumentError>("ckv_settings: pool is ", static_cast<int>(settings.pool),
                                        ", must be a CKV_POOL_ value");
}

/// 0 stands for the method's own.
std::optional<std::size_t> given(std::size_t number) {
  return number == 0 ? std::nullopt : std::optional(number);
}

ckv::OutputWeights outputs_of(const ckv_settings& c, const ckv::ModelShape& shape) {
  require(c.output_element >= CKV_F32 && c.output_element <= CKV_BF16, "ckv_settings: output_element is ",
          static_cast<int>(c.output_element), ", must be CKV_F32, CKV_F16 or CKV_BF16");
  return ckv::with_plain_kind(static_cast<ckv::ElementKind>(c.output_element), [&]<class T>(T*) {
    std::vector<const T*> layers;
    for (const void* const weights : std::span(c.output_weights, shape.layers)) {
      layers.push_back(static_cast<const T*>(weights));
    }
    return ckv::OutputWeights(
        layers, {.hidden = c.hidden, .query_heads = shape.query_heads, .head_dim = shape.head_dim});
  });
}

ckv::MethodSettings settings_of(const ckv_settings& c, const ckv::ModelShape& shape) {
  shape.validate();
  ckv::MethodSettings settings{.budget = budget_of(c),
                               .heads_per_layer = c.heads_per_layer,
                               .window = given(c.window),
                               .pool = pool_of(c),
                               .pool_width = given(c.pool_width),
                               .seed = c.seed,
                               .decay = c.decay,
                               .hold_layers = c.hold_layers,
                               .model_heads = c.model_heads,
                               .equal_weights = c.equal_weights != 0,
                               .sinks = c.sinks,
                               .model_share = c.model_share,
                               .lag = c.lag,
                               .block = c.block,
                               .chunk = c.chunk,
                               .lambda = c.lambda,
                               .threshold = c.threshold,
                               .head_sinks = c.head_sinks,
                               .head_recent = c.head_recent};
  if (c.min_rows > 0) {
    settings.min_rows = c.min_rows;
  }
  const auto scores_of = [&](const double* scores, std::size_t heads) {
    std::vector<std::vector<double>> runs;
    for (const double score : std::span(scores, shape.layers * heads)) {
      runs.push_back({score});
    }
    return ckv::HeadScores(shape.layers, heads, std::move(runs));
  };
  if (c.kv_scores != nullptr) {
    settings.kv_scores = scores_of(c.kv_scores, shape.kv_heads);
  }
  if (c.scores != nullptr) {
    settings.scores = scores_of(c.scores, shape.query_heads);
    settings.heads = settings.scores->ranking();
  }
  if (c.ranking != nullptr) {
    require(c.ranked_heads > 0 && c.ranked_heads <= shape.query_heads, "ckv_settings: ranked_heads is ",
            c.ranked_heads, ", the model has ", shape.query_heads, " query heads a layer");
    std::vector<std::vector<std::uint32_t>> layers;
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      const std::span heads(c.ranking + layer * c.ranked_heads, c.ranked_heads);
      layers.emplace_back(heads.begin(), heads.end());
    }
    settings.heads.emplace(std::move(layers));
  }
  if (c.query_statistics != nullptr) {
    settings.statistics = ckv::io::load_query_statistics(c.query_statistics, shape);
  }
  if (c.output_weights != nullptr) {
    settings.output_weights = outputs_of(c, shape);
  }
  if (c.surrogate != nullptr) {
    settings.surrogate = ckv::io::load_surrogate(c.surrogate, shape);
  }
  if (!(c.score_threshold == -std::numeric_limits<float>::infinity())) {
    settings.score_threshold = c.score_threshold;
  }
  if (c.layer_errors != nullptr) {
    settings.errors.emplace(std::vector<double>(c.layer_errors, c.layer_errors + shape.layers),
                            std::vector<ckv::LayerErrors::DataSet>{});
  }
  return settings;
}

ckv::ElementKind kind_of(ckv_element element) {
  require(element >= CKV_F32 && element <= CKV_INT8, "element is ", static_cast<int>(element),
          ", must be a ckv_element");
  return static_cast<ckv::ElementKind>(element);
}
static_assert(static_cast<int>(ckv::ElementKind::q8_0) == CKV_Q8_0 &&
              static_cast<int>(ckv::ElementKind::int8) == CKV_INT8);

ckv::layout::Strides strides_of(const ckv_rows& rows) {
  return {.head = rows.head_stride,
          .row = rows.row_stride,
          .chunk = rows.chunk,
          .chunk_stride = rows.chunk_stride};
}

ckv::Int8Rows int8_rows(const ckv_rows& rows, const ckv::KvShape& shape, const char* name) {
  require(rows.data != nullptr && rows.scales != nullptr && rows.zeros != nullptr, name,
          ": data, scales or zeros are NULL: give all three");
  // Int8Kv wants to know how much there is: as much as the strides reach, which it checks.
  const std::size_t parameters = shape.kv_heads * shape.allocated_rows;
  return {.data = {static_cast<std::int8_t*>(rows.data), ckv::detail::max_bytes},
          .scales = {rows.scales, parameters},
          .zeros = {rows.zeros, parameters}};
}

bool same_strides(const ckv_rows& a, const ckv_rows& b) {
  return a.head_stride == b.head_stride && a.row_stride == b.row_stride && a.chunk == b.chunk &&
         a.chunk_stride == b.chunk_stride;
}

/// The memory of rows as elements `T`.
template <class T>
T* memory_of(const ckv_rows& rows, const char* name) {
  require(reinterpret_cast<std::uintptr_t>(rows.data) % alignof(T) == 0, "ckv_kv: ", name,
          " do not lie at a multiple of ", alignof(T), " bytes, as their elements must");
  return static_cast<T*>(rows.data);
}

/// Calls `f` with a null pointer of a type that a pointer can be to.
template <class F>
ckv::AnyKv with_block_kind(ckv::ElementKind kind, F&& f) {
  return ckv::with_kind(kind, [&]<class T>(T* null) -> ckv::AnyKv {
    if constexpr (std::same_as<T, ckv::AffineInt8>) {
      ckv::detail::fail<ckv::ArgumentError>(
          "ckv_kv: keys and values are both CKV_INT8, in one buffer each, or neither is");
    } else {
      return f(null);
    }
  });
}

ckv::AnyKv paged_view(const ckv_kv& kv, const ckv::ModelShape& model) {
  require(kv.keys.element == kv.values.element,
          "ckv_kv: keys and values of a paged cache are of one element type");
  const ckv::PagedShape shape{.kv_heads = model.kv_heads,
                              .rows = kv.rows,
                              .head_dim = model.head_dim,
                              .block_rows = kv.block_rows,
                              .pool_blocks = kv.pool_blocks,
                              .key_block_stride = kv.key_block_stride,
                              .value_block_stride = kv.value_block_stride,
                              .head_rows = {kv.head_rows, kv.head_rows == nullptr ? 0 : model.kv_heads}};
  const ckv::Borrowed<const std::int32_t> table(kv.table, kv.table_size);
  const ckv::Borrowed<const std::int32_t> references(kv.references,
                                                     kv.references == nullptr ? 0 : kv.pool_blocks);
  return with_block_kind(kind_of(kv.keys.element), [&]<class T>(T*) -> ckv::AnyKv {
    return ckv::PagedKv<T>(memory_of<T>(kv.keys, "keys"), memory_of<T>(kv.values, "values"), shape, table,
                           strides_of(kv.keys), strides_of(kv.values), references);
  });
}

ckv::AnyKv view_of(const ckv_kv& kv, const ckv::ModelShape& model) {
  if (kv.table != nullptr) {
    return paged_view(kv, model);
  }
  require(kv.table_size == 0 && kv.block_rows == 0 && kv.pool_blocks == 0 && kv.references == nullptr,
          "ckv_kv: table is NULL, but table_size, block_rows, pool_blocks or references are given: give the "
          "block table of a paged cache");
  ckv::KvShape shape{.kv_heads = model.kv_heads,
                     .rows = kv.rows,
                     .head_dim = model.head_dim,
                     .allocated_rows = kv.allocated_rows,
                     .head_rows = {kv.head_rows, kv.head_rows == nullptr ? 0 : model.kv_heads}};
  const ckv::ElementKind keys = kind_of(kv.keys.element);
  const ckv::ElementKind values = kind_of(kv.values.element);
  if (keys == ckv::ElementKind::int8 && values == keys) {
    require(same_strides(kv.keys, kv.values), "ckv_kv: int8 keys and values lie at the same strides");
    ckv::detail::check_kv_shape("ckv_kv", shape);
    return ckv::Int8Kv(int8_rows(kv.keys, shape, "ckv_kv: keys"),
                       int8_rows(kv.values, shape, "ckv_kv: values"), shape, strides_of(kv.keys));
  }
  return with_block_kind(keys, [&]<class K>(K*) -> ckv::AnyKv {
    return with_block_kind(values, [&]<class W>(W*) -> ckv::AnyKv {
      return ckv::StridedKv<K, W>(memory_of<K>(kv.keys, "keys"), memory_of<W>(kv.values, "values"), shape,
                                  strides_of(kv.keys), strides_of(kv.values));
    });
  });
}

/// What the caller's function gives of a layer.
ckv::AnyKv asked(ckv_views views, void* context, std::size_t layer, const ckv::ModelShape& model) {
  ckv_kv kv{};
  kv.struct_size = sizeof(kv);
  const ckv_status status = views(context, layer, &kv);
  if (status != CKV_OK) {
    throw ViewsRefused{status};
  }
  return view_of(kv, model);
}

/// Calls `f` with the observation by its type.
template <class F>
void with_observation(const ckv_observation* given, const ckv::ModelShape& model, F&& f) {
  if (given == nullptr) {
    f(ckv::AnyObservation());
    return;
  }
  const ckv_observation o = as_known(given, "ckv_observation", ckv_observation_init_sized);
  const ckv::AttentionShape attention{
      .query_heads = model.query_heads, .queries = o.queries, .tokens = o.tokens};
  if (o.shown == CKV_SHOWS_SUMS) {
    require(o.element == CKV_F32, "ckv_observation: sums of attention are CKV_F32");
    f(ckv::AttentionSums(static_cast<const float*>(o.data), attention));
    return;
  }
  require(
      o.shown == CKV_SHOWS_QUERIES || o.shown == CKV_SHOWS_ATTENTION || o.shown == CKV_SHOWS_HIDDEN_STATES,
      "ckv_observation: shown is ", static_cast<int>(o.shown), ", must be a CKV_SHOWS_ value");
  require(o.element >= CKV_F32 && o.element <= CKV_BF16, "ckv_observation: element is ",
          static_cast<int>(o.element), ", must be CKV_F32, CKV_F16 or CKV_BF16");
  ckv::with_plain_kind(kind_of(o.element), [&]<class T>(T*) {
    const T* const data = static_cast<const T*>(o.data);
    if (o.shown == CKV_SHOWS_HIDDEN_STATES) {
      f(ckv::HiddenStates<T>(
          data, {.tokens = o.tokens, .hidden_size = o.hidden_size, .token_stride = o.token_stride}));
      return;
    }
    if (o.shown == CKV_SHOWS_ATTENTION) {
      f(ckv::AttentionMatrix<T>(data, attention));
      return;
    }
    const ckv::QueryShape shape{.query_heads = model.query_heads,
                                .queries = o.queries,
                                .head_dim = model.head_dim,
                                .scale = o.scale,
                                .soft_cap = o.soft_cap,
                                .sliding_window = o.sliding_window,
                                .sinks = {o.sinks, o.sinks == nullptr ? 0 : model.query_heads}};
    const bool side_by_side = o.head_stride == 0 && o.query_stride == 0;
    f(side_by_side ? ckv::QueryWindow<T>(data, shape)
                   : ckv::QueryWindow<T>(data, shape, {.head = o.head_stride, .query = o.query_stride}));
  });
}

std::span<const float> hidden_norms_of(const ckv_observation* given) {
  if (given == nullptr) {
    return {};
  }
  const ckv_observation o = as_known(given, "ckv_observation", ckv_observation_init_sized);
  return {o.hidden_norms, o.hidden_norms == nullptr ? 0 : o.queries};
}

ckv::Protection protection_of(const ckv_protection* given) {
  if (given == nullptr) {
    return {};
  }
  require(given->positions != nullptr || given->count == 0, "ckv_protection: positions is NULL, count is ",
          given->count);
  return {.keep_first = given->keep_first,
          .keep_last = given->keep_last,
          .positions = {given->positions, given->count}};
}

const ckv::Retained& retained_of(const ckv_sequence& sequence, std::size_t layer, std::size_t kv_head) {
  const std::size_t heads = sequence.compressor.plan().shape().kv_heads;
  require(kv_head < heads, "kv_head is ", kv_head, ", the model has KV heads 0 to ", heads - 1);
  return sequence.compressor.retained(layer);
}

ckv::MadeWith made_of(const ckv_made_with* given) {
  const auto text = [](const char* t) { return t == nullptr ? std::string_view() : std::string_view(t); };
  return given == nullptr
             ? ckv::MadeWith{}
             : ckv::MadeWith{.method = text(given->settings), .calibration = text(given->calibration)};
}

/// The caller's memory as a stream's: read where it lies, never written.
class MemoryBuffer : public std::streambuf {
 public:
  MemoryBuffer(const void* bytes, std::size_t size) {
    char* const first = const_cast<char*>(static_cast<const char*>(bytes));
    setg(first, first, first + size);
  }
  std::size_t rest() const { return static_cast<std::size_t>(egptr() - gptr()); }
};

/// Nothing was shrunk yet.
void start_answer(ckv_views views, const std::size_t** changed, std::size_t* count) {
  require(views != nullptr && changed != nullptr && count != nullptr,
          "views, changed or count is NULL: give all three");
  *changed = nullptr;
  *count = 0;
}

}  // namespace

extern "C" {

const char* ckv_last_error(void) { return last_error().c_str(); }

void ckv_settings_init_sized(ckv_settings* settings, size_t struct_size) {
  const ckv::MethodSettings library;
  ckv_settings defaults{};
  defaults.budget_ratio = 1.0;
  defaults.heads_per_layer = library.heads_per_layer;
  defaults.pool = CKV_POOL_OF_METHOD;
  defaults.decay = library.decay;
  defaults.model_heads = library.model_heads;
  defaults.sinks = library.sinks;
  defaults.model_share = library.model_share;
  defaults.lag = library.lag;
  defaults.block = library.block;
  defaults.chunk = library.chunk;
  defaults.head_sinks = library.head_sinks;
  defaults.head_recent = library.head_recent;
  defaults.score_threshold = -std::numeric_limits<float>::infinity();
  defaults.lambda = library.lambda;
  defaults.threshold = library.threshold;
  init_as(settings, defaults, struct_size);
}

void ckv_observation_init_sized(ckv_observation* observation, size_t struct_size) {
  init_as(observation, ckv_observation{}, struct_size);
}

ckv_status ckv_plan_create(const ckv_model* model, const char* method, const ckv_settings* settings,
                           ckv_plan** plan) {
  return guarded([&] {
    require_given(plan, "plan");
    *plan = nullptr;
    require_given(model, "model");
    require_given(method, "method");
    const ckv::ModelShape shape{.layers = model->layers,
                                .query_heads = model->query_heads,
                                .kv_heads = model->kv_heads,
                                .head_dim = model->head_dim,
                                .kv_row_bytes = model->kv_row_bytes};
    const ckv_settings known = as_known(settings, "ckv_settings", ckv_settings_init_sized);
    *plan = new ckv_plan{ckv::AnyPlan(shape, method, settings_of(known, shape))};
  });
}

void ckv_plan_free(ckv_plan* plan) { delete plan; }
size_t ckv_plan_window(const ckv_plan* plan) { return plan == nullptr ? 0 : plan->plan.window(); }
int ckv_plan_needs_attention(const ckv_plan* plan) {
  return plan != nullptr && ckv::observes(plan->plan.needs()) ? 1 : 0;
}
int ckv_plan_reaches_back(const ckv_plan* plan) {
  return plan == nullptr || plan->plan.reach() == ckv::Reach::own_layer ? 0 : 1;
}

int ckv_plan_repeats(const ckv_plan* plan) {
  return plan != nullptr && plan->plan.needs() == ckv::Needs::repeats ? 1 : 0;
}

int ckv_plan_needs_hidden_states(const ckv_plan* plan) {
  return plan != nullptr && plan->plan.needs() == ckv::Needs::hidden_states ? 1 : 0;
}

ckv_status ckv_sequence_create(const ckv_plan* plan, ckv_sequence** sequence) {
  return guarded([&] {
    require_given(sequence, "sequence");
    *sequence = nullptr;
    require_given(plan, "plan");
    *sequence = new ckv_sequence{ckv::AnyCompressor(plan->plan)};
  });
}

ckv_status ckv_sequence_copy(const ckv_sequence* sequence, ckv_sequence** copy) {
  return guarded([&] {
    require_given(copy, "copy");
    *copy = nullptr;
    require_given(sequence, "sequence");
    *copy = new ckv_sequence(*sequence);
  });
}

void ckv_sequence_free(ckv_sequence* sequence) { delete sequence; }

ckv_status ckv_begin(ckv_sequence* sequence, size_t prompt_tokens, const ckv_protection* protection) {
  return guarded([&] {
    require_given(sequence, "sequence");
    sequence->compressor.begin(prompt_tokens, protection_of(protection));
  });
}

ckv_status ckv_begin_turn(ckv_sequence* sequence, size_t total_tokens, const ckv_protection* protection) {
  return guarded([&] {
    require_given(sequence, "sequence");
    sequence->compressor.begin_turn(total_tokens, protection_of(protection));
  });
}

ckv_status ckv_truncate(ckv_sequence* sequence, size_t position) {
  return guarded([&] {
    require_given(sequence, "sequence");
    sequence->compressor.truncate(position);
  });
}

ckv_status ckv_arrive(ckv_sequence* sequence, size_t layer, ckv_views views, void* context,
                      const ckv_observation* observation, const size_t** changed, size_t* count) {
  return guarded([&] {
    require_given(sequence, "sequence");
    start_answer(views, changed, count);
    const ckv::ModelShape& model = sequence->compressor.plan().shape();
    const auto view = [&](std::size_t l) { return asked(views, context, l, model); };
    with_observation(observation, model, [&](const auto& shown) {
      const std::span<const std::size_t> shrunk = sequence->compressor.arrive(layer, view, shown);
      *changed = shrunk.data();
      *count = shrunk.size();
    });
  });
}

ckv_status ckv_observe(ckv_sequence* sequence, size_t layer, ckv_views views, void* context, size_t first,
                       size_t last, const ckv_observation* observation) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require(views != nullptr, "views is NULL: give a function that fills a ckv_kv");
    const ckv::ModelShape& model = sequence->compressor.plan().shape();
    with_observation(observation, model, [&](const auto& shown) {
      sequence->compressor.observe(layer, asked(views, context, layer, model), {.first = first, .last = last},
                                   shown, hidden_norms_of(observation));
    });
  });
}

ckv_status ckv_finish(ckv_sequence* sequence, ckv_views views, void* context, const size_t** changed,
                      size_t* count) {
  return guarded([&] {
    require_given(sequence, "sequence");
    start_answer(views, changed, count);
    const ckv::ModelShape& model = sequence->compressor.plan().shape();
    const auto view = [&](std::size_t l) { return asked(views, context, l, model); };
    const std::span<const std::size_t> shrunk = sequence->compressor.finish(view);
    *changed = shrunk.data();
    *count = shrunk.size();
  });
}

ckv_status ckv_rows_kept(const ckv_sequence* sequence, size_t layer, size_t kv_head, size_t* rows) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require_given(rows, "rows");
    *rows = retained_of(*sequence, layer, kv_head).rows(kv_head);
  });
}

ckv_status ckv_positions_kept(const ckv_sequence* sequence, size_t layer, size_t kv_head, uint32_t* positions,
                              size_t capacity, size_t* count) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require_given(count, "count");
    require(positions != nullptr || capacity == 0, "positions is NULL, capacity is ", capacity);
    const auto& kept = retained_of(*sequence, layer, kv_head).positions(kv_head);
    std::size_t written = 0;
    for (const std::uint32_t position : kept) {
      if (written == capacity) {
        break;
      }
      positions[written++] = position;
    }
    *count = kept.size();
  });
}

ckv_status ckv_next_position(const ckv_sequence* sequence, size_t layer, size_t* position) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require_given(position, "position");
    *position = sequence->compressor.retained(layer).next_position();
  });
}

ckv_status ckv_held_rows(const ckv_sequence* sequence, size_t tokens, size_t layer, size_t kv_head,
                         size_t* rows) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require_given(rows, "rows");
    retained_of(*sequence, layer, kv_head);
    *rows = sequence->compressor.held(tokens).rows(layer, kv_head);
  });
}

ckv_status ckv_capacity(const ckv_sequence* sequence, size_t layer, size_t* rows) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require_given(rows, "rows");
    sequence->compressor.retained(layer);                       // the layer is there
    const auto capacities = sequence->compressor.capacities();  // of each layer one, or one a KV head
    const std::size_t of_layer = capacities.size() / sequence->compressor.plan().shape().layers;
    *rows = *std::ranges::max_element(capacities.subspan(layer * of_layer, of_layer));
  });
}

size_t ckv_memory_bytes(const ckv_sequence* sequence) {
  return sequence == nullptr ? 0 : sequence->compressor.memory_bytes();
}

ckv_status ckv_save(const ckv_sequence* sequence, const ckv_made_with* made, void* bytes, size_t capacity,
                    size_t* size) {
  return guarded([&] {
    require_given(size, "size");
    *size = 0;
    require_given(sequence, "sequence");
    require(bytes != nullptr || capacity == 0, "bytes is NULL, capacity is ", capacity);
    std::ostringstream out;
    sequence->compressor.save(out, made_of(made));
    const std::string_view saved = out.view();
    *size = saved.size();
    require(capacity == 0 || capacity >= saved.size(), "capacity is ", capacity, ", the saved sequence has ",
            saved.size(), " bytes: give as many");
    if (capacity > 0) {
      std::memcpy(bytes, saved.data(), saved.size());
    }
  });
}

ckv_status ckv_load(ckv_sequence* sequence, const ckv_made_with* made, const void* bytes, size_t size) {
  return guarded([&] {
    require_given(sequence, "sequence");
    require(bytes != nullptr || size == 0, "bytes is NULL, size is ", size);
    MemoryBuffer memory(bytes, size);
    std::istream in(&memory);
    // Not into the one at hand, which stays as it is where bytes are left over.
    ckv::AnyCompressor loaded(sequence->compressor.plan());
    loaded.load(in, made_of(made));
    ckv::sequence::require_saved(memory.rest() == 0, "has ", memory.rest(),
                                 " bytes behind its end: give those of ckv_save alone");
    sequence->compressor = std::move(loaded);
  });
}

}  // extern "C"
