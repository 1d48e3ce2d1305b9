// Any calls of a compressor in any order, over random methods, shapes and caches, beside a model of the
// sequence: the tokens announced, and of each layer the rows, token by token, as each value row names its
// own.
//
// The model says of each call whether it must succeed, must be refused, or may be either (blocks that are
// shared where the rows that move are not known). After every call: the window and what is protected are
// there, as many rows stay as the budget says, each row is the token that the compressor says, nothing
// outside the rows in use was written. A call that throws has changed nothing, now and then seen by what the
// calls after it come to. Only the library's own errors are thrown.

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cmath>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "reference/arriving_methods.hpp"
#include "reference/output_norms.hpp"

namespace {

using namespace compresskv;
using Rows = std::vector<std::uint32_t>;

void check(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "compressor_fuzz: %s\n", what);
    std::abort();
  }
}

constexpr std::size_t room = 120;  // rows that each KV head has memory for
constexpr std::size_t block_rows = 8;
constexpr std::size_t most_heads = 9;  // query heads
constexpr std::size_t most_dim = 20;
constexpr float untouched = 7777.0F;

struct Sizes {
  std::size_t layers;
  std::size_t kv_heads;
  std::size_t group;
  std::size_t head_dim;
  std::size_t window;
  std::size_t layout;  // 0, 1, 2: strided; 3: paged

  std::size_t query_heads() const { return kv_heads * group; }
  ModelShape shape() const {
    return {.layers = layers, .query_heads = query_heads(), .kv_heads = kv_heads, .head_dim = head_dim};
  }
};

/// A number that follows from what it is for: contents repeat whatever was done before.
float noise(std::size_t layer, std::size_t head, std::size_t token, std::size_t element) {
  std::uint64_t x = ((layer * 31 + head) * 1021 + token) * 257 + element + 1;
  x = (x ^ (x >> 31U)) * 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 29U)) * 0xbf58476d1ce4e5b9U;
  return static_cast<float>(static_cast<std::int64_t>(x >> 40U)) / 8388608.0F - 1.0F;
}

/// `count` numbers between -1 and 1.
std::vector<float> noises(std::size_t count) {
  std::vector<float> numbers(count);
  for (std::size_t i = 0; i < count; ++i) {
    numbers[i] = noise(77, 0, i, 0);
  }
  return numbers;
}

/// What stands in a row.
struct Row {
  std::uint32_t token;
  std::uint32_t position;  // as the compressor counts
  std::size_t turned;      // where its key is in Cache::turned, or as_appended
};
constexpr std::size_t as_appended = std::numeric_limits<std::size_t>::max();

/// One layer: exactly the memory that its rows reach, and what must stand in them.
struct Cache {
  Sizes sizes;
  std::size_t layer;
  layout::Strides strides;
  std::vector<float> keys;
  std::vector<float> values;
  std::vector<std::vector<Row>> rows;  // [kv_head][row]
  std::vector<float> turned;           // keys that rerotate() made, row after row
  std::vector<std::size_t> lengths;    // what a view shows
  std::vector<std::int32_t> table;     // of a paged cache
  std::vector<std::int32_t> references;
  std::size_t most = 0;        // rows that have been in use
  std::size_t known = 0;       // tokens that the compressor has seen of the layer
  std::size_t shift = 0;       // tokens that its positions do not count
  bool turned_lately = false;  // in this turn

  Cache(const Sizes& s, std::size_t of_layer)
      : sizes(s), layer(of_layer), strides(strides_of(s)), rows(s.kv_heads), lengths(s.kv_heads, 0) {
    keys.assign(room * s.kv_heads * s.head_dim, untouched);
    values = keys;
    for (std::size_t i = 0; i < room / block_rows; ++i) {
      table.push_back(static_cast<std::int32_t>((i * 7 + 3) % (room / block_rows)));
      references.push_back(1);
    }
  }

  static layout::Strides strides_of(const Sizes& sizes) {
    const layout::Extents extents{
        .kv_heads = sizes.kv_heads, .rows = sizes.layout == 3 ? block_rows : room, .units = sizes.head_dim};
    layout::Strides found = sizes.layout == 0   ? layout::head_token_dim(extents)
                            : sizes.layout == 1 ? layout::head_dim_token(extents)
                                                : layout::token_head_dim(extents);
    return found;
  }
  /// First element of a row, and the distance from one to the next.
  std::size_t at(std::size_t head, std::size_t row) const {
    std::size_t block = 0;
    if (sizes.layout == 3) {
      block =
          static_cast<std::size_t>(table[row / block_rows]) * block_rows * sizes.kv_heads * sizes.head_dim;
      row %= block_rows;
    }
    return block + head * strides.head + row * strides.row;
  }
  std::size_t step() const { return sizes.layout == 1 ? room : 1; }

  void append(std::uint32_t token) {
    for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
      const std::size_t first = at(head, rows[head].size());
      for (std::size_t e = 0; e < sizes.head_dim; ++e) {
        keys[first + e * step()] = noise(layer, head, token, e);
        values[first + e * step()] = value_of(token, e);
      }
      rows[head].push_back({token, token - static_cast<std::uint32_t>(shift), as_appended});
    }
    show_all();
    most = std::max(most, longest());
  }
  void show_all() {
    for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
      lengths[head] = rows[head].size();
    }
  }
  std::size_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  bool even() const { return std::count(lengths.begin(), lengths.end(), lengths[0]) == std::ssize(lengths); }
  /// Rows that the compressor left, or was told of by begin().
  std::size_t kept(std::size_t head, std::size_t next) const { return rows[head].size() + known - next; }

  bool shares(std::size_t block) const {
    return sizes.layout == 3 && references[static_cast<std::size_t>(table[block])] > 1;
  }
  bool shares() const {
    return sizes.layout == 3 && *std::max_element(references.begin(), references.end()) > 1;
  }
  bool writable(std::size_t first, std::size_t last) const {
    for (std::size_t row = first; row < last; ++row) {
      if (shares(row / block_rows)) {
        return false;
      }
    }
    return true;
  }

  StridedKv<float> strided() {
    return {std::span(keys), std::span(values),
            KvShape{.kv_heads = sizes.kv_heads,
                    .head_dim = sizes.head_dim,
                    .allocated_rows = room,
                    .head_rows = lengths},
            strides};
  }
  PagedKv<float> paged() {
    return {keys.data(),
            values.data(),
            PagedShape{.kv_heads = sizes.kv_heads,
                       .head_dim = sizes.head_dim,
                       .block_rows = block_rows,
                       .pool_blocks = room / block_rows,
                       .head_rows = lengths},
            table,
            strides,
            references};
  }

  static float value_of(std::uint32_t token, std::size_t e) {
    return static_cast<float>(token) + static_cast<float>(e) * 0.001F;
  }
  float key_of(std::size_t head, const Row& row, std::size_t e) const {
    return row.turned == as_appended ? noise(layer, head, row.token, e) : turned[row.turned + e];
  }

  /// Every row in use holds what it must.
  void expect_contents() const {
    const std::size_t distance = step();
    for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
      for (std::size_t i = 0; i < rows[head].size(); ++i) {
        const Row row = rows[head][i];
        const float* const value = values.data() + at(head, i);
        const float* const key = keys.data() + at(head, i);
        bool same_values = true;
        bool same_keys = true;
        for (std::size_t e = 0; e < sizes.head_dim; ++e) {
          same_values &= value[e * distance] == value_of(row.token, e);
          same_keys &= key[e * distance] == key_of(head, row, e);
        }
        check(same_values, "a value row is not that of its token");
        check(same_keys, "a key row is not that of its token");
      }
    }
  }
  /// Rows that never were in use are as they were.
  void expect_rest_untouched() const {
    for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
      for (std::size_t i = most; i < room; ++i) {
        for (std::size_t e = 0; e < sizes.head_dim; ++e) {
          const std::size_t there = at(head, i) + e * step();
          check(values[there] == untouched && keys[there] == untouched, "memory behind the rows was written");
        }
      }
    }
  }

  /// Compares with what it was: rows of shared blocks are as they were.
  void expect_shared_kept(const std::vector<float>& old_keys, const std::vector<float>& old_values) const {
    for (std::size_t row = 0; shares() && row < room; ++row) {
      for (std::size_t head = 0; shares(row / block_rows) && head < sizes.kv_heads; ++head) {
        const auto first = static_cast<std::ptrdiff_t>(at(head, row));
        const auto last = first + static_cast<std::ptrdiff_t>(sizes.head_dim);
        check(std::equal(keys.begin() + first, keys.begin() + last, old_keys.begin() + first) &&
                  std::equal(values.begin() + first, values.begin() + last, old_values.begin() + first),
              "a shared block was written");
      }
    }
  }
};

/// What must come of a call.
enum class Due { success, either, refusal };

Due success_if(bool right) { return right ? Due::success : Due::refusal; }

template <class P>
class Driver {
 public:
  Driver(const P& plan, const Sizes& sizes, FuzzedDataProvider& data)
      : plan_(plan), sizes_(sizes), data_(data), compressor_(plan) {
    static const std::vector<float> numbers = noises(most_heads * room * most_dim);
    queries_.assign(numbers.begin(), numbers.begin() + static_cast<std::ptrdiff_t>(sizes.query_heads() *
                                                                                   room * sizes.head_dim));
    new_caches();
  }

  void run() {
    begin();
    for (int step = 0; step < 40 && data_.remaining_bytes() > 0; ++step) {
      one_call();
      expect_consistent();
    }
    for (const Cache& cache : caches_) {
      cache.expect_rest_untouched();
    }
  }

 private:
  using C = Compressor<P>;
  using S = typename P::scorer_type;
  /// Whether scores, or what layers may keep, go from layer to layer.
  static constexpr bool carries = requires(const S& scorer) { scorer.decay(); };
  static constexpr bool cascades = P::allocator_type::reach != Reach::own_layer;
  static constexpr bool own_layer = P::reach == Reach::own_layer;
  static constexpr bool by_head = P::capacity_granularity == Granularity::kv_head;
  static constexpr bool adaptive =
      std::same_as<std::remove_cvref_t<decltype(std::declval<P>().selector())>, select::Adaptive>;

  // What can be seen of a compressor.

  std::vector<std::size_t> state(const C& compressor) const {
    std::vector<std::size_t> found(compressor.capacities().begin(), compressor.capacities().end());
    if (found.empty()) {
      return found;
    }
    for (std::size_t l = 0; l < sizes_.layers; ++l) {
      const Retained& kept = compressor.retained(l);
      found.insert(found.end(), {kept.next_position(), kept.bytes_freed(), kept.lists()});
      for (std::size_t list = 0; list < kept.lists(); ++list) {
        found.push_back(kept.rows(list));
        found.insert(found.end(), kept.positions(list).begin(), kept.positions(list).end());
      }
    }
    if (agree()) {
      for (const std::size_t tokens : {next_ / 2, next_, next_ + 9}) {
        const Held held = compressor.held(tokens);
        for (std::size_t l = 0; l < sizes_.layers; ++l) {
          for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
            found.push_back(held.rows(l, head));
          }
        }
      }
    }
    return found;
  }

  struct Outcome {
    std::string errors;
    std::vector<std::vector<std::size_t>> states;
    std::vector<std::vector<float>> memory;
    friend bool operator==(const Outcome&, const Outcome&) = default;
  };

  /// What a compressor makes of the rest of this turn, and of another.
  Outcome outcome(C compressor) const {
    Outcome found;
    std::vector<Cache> caches = caches_;
    for (Cache& cache : caches) {
      std::fill(cache.references.begin(), cache.references.end(), 1);
    }
    for (int turn = 0; turn < 2; ++turn) {
      try {
        if (turn == 1) {
          compressor.begin_turn(next_ - caches[0].shift);
        }
        shrink_all(compressor, caches, turn == 0 ? arrived_ : 0);
      } catch (const Error& error) {
        found.errors += error.what();
      }
      found.states.push_back(state(compressor));
    }
    for (Cache& cache : caches) {
      found.memory.push_back(std::move(cache.keys));
      found.memory.push_back(std::move(cache.values));
    }
    return found;
  }

  void shrink_all(C& compressor, std::vector<Cache>& caches, std::size_t first) const {
    const auto shorten = [&](std::size_t l) {
      for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
        caches[l].lengths[head] = compressor.retained(l).rows(head);
      }
    };
    with_views(caches, [&](const auto& views) {
      if constexpr (own_layer) {
        for (std::size_t l = 0; l < sizes_.layers; ++l) {
          compressor.compress(l, views(l), observation());
          shorten(l);
        }
      } else {
        for (std::size_t l = first; l < sizes_.layers; ++l) {
          for (const std::size_t changed : compressor.arrive(l, views, observation())) {
            shorten(changed);
          }
        }
        if constexpr (P::reach == Reach::all_layers) {
          for (const std::size_t changed : compressor.finish(views)) {
            shorten(changed);
          }
        }
      }
    });
  }

  /// Makes a call of which `due` must come. Whether it got through; else nothing has changed.
  template <class Call>
  bool attempt(const char* name, Due due, Call&& call) {
    before_.resize(2 * sizes_.layers);
    for (std::size_t l = 0; l < sizes_.layers; ++l) {
      before_[2 * l] = caches_[l].keys;
      before_[2 * l + 1] = caches_[l].values;
    }
    std::optional<C> unasked;
    if (due == Due::either || (due == Due::refusal && data_.ConsumeIntegralInRange(0, 3) == 3)) {
      unasked.emplace(compressor_);
    }
    const std::vector<std::size_t> told = state(compressor_);
    try {
      call();
    } catch (const Error& error) {
      const std::string message = error.what();
      if (due == Due::success) {
        std::fprintf(stderr, "%s: %s\n", name, message.c_str());
      }
      check(due != Due::success, "a right call was refused");
      check(message.size() < 2000, "a message is endless");
      for (std::size_t l = 0; l < sizes_.layers; ++l) {
        check(caches_[l].keys == before_[2 * l] && caches_[l].values == before_[2 * l + 1],
              "an error changed a cache");
        caches_[l].show_all();
      }
      check(state(compressor_) == told, "an error changed the compressor");
      if (unasked) {
        check(outcome(*unasked) == outcome(compressor_), "an error changed what comes after it");
      }
      return false;
    }
    if (due == Due::refusal) {
      std::fprintf(stderr, "%s\n", name);
    }
    check(due != Due::refusal, "a wrong call got through");
    for (std::size_t l = 0; l < sizes_.layers; ++l) {
      caches_[l].expect_shared_kept(before_[2 * l], before_[2 * l + 1]);
      caches_[l].show_all();
    }
    return true;
  }

  // Sequences and turns.

  void new_caches() {
    caches_.clear();
    for (std::size_t l = 0; l < sizes_.layers; ++l) {
      caches_.emplace_back(sizes_, l);
    }
    next_ = 0;
  }

  /// Whether all layers go on at the same position: else rerotate() left them at different ones.
  bool agree() const {
    return std::all_of(caches_.begin(), caches_.end(),
                       [&](const Cache& cache) { return cache.shift == caches_[0].shift; });
  }

  void begin() {
    const auto tokens = data_.ConsumeIntegralInRange<std::size_t>(0, 90);
    const std::size_t told = tokens + (data_.ConsumeIntegralInRange(0, 15) == 15 ? 1 : 0);
    Rows listed;
    const Protection protection = some_protection(told, listed);
    const bool right = told > 0 && (listed.empty() || listed.back() < told);
    if (!attempt("begin", success_if(right), [&] { compressor_.begin(told, protection); })) {
      return;
    }
    new_caches();
    turned_ = false;
    started(told, protection, listed);
    for (Cache& cache : caches_) {
      cache.known = told;
    }
    append(tokens);
    if (data_.ConsumeIntegralInRange(0, 3) == 3) {
      C fresh(plan_);
      fresh.begin(told, protection);
      check(outcome(fresh) == outcome(compressor_), "a sequence remembers the one before it");
    }
  }

  void begin_turn() {
    append(data_.ConsumeIntegralInRange<std::size_t>(0, 20));
    // Now and then tokens that are still to come, or not all that have come.
    const int kind = data_.ConsumeIntegralInRange(0, 15);
    const std::size_t now = next_ - caches_[0].shift;
    const std::size_t total = kind == 15 ? now + 3 : kind == 14 && now > 0 ? now - 1 : now;
    Rows listed;
    const Protection protection = some_protection(total, listed);
    bool right =
        total > 0 && (listed.empty() || listed.back() < total) && begun() && agree() && !(carries && turned_);
    for (const Cache& cache : caches_) {
      right = right && total + cache.shift >= cache.known;
    }
    if (attempt("begin_turn", success_if(right), [&] { compressor_.begin_turn(total, protection); })) {
      started(total, protection, listed);
    }
  }

  Protection some_protection(std::size_t tokens, Rows& listed) {
    Protection protection;
    if (data_.ConsumeIntegralInRange(0, 3) == 3) {
      protection.keep_first = data_.ConsumeIntegralInRange<std::size_t>(0, 6);
      protection.keep_last = data_.ConsumeIntegralInRange<std::size_t>(0, 12);
      for (auto position = data_.ConsumeIntegralInRange<std::uint32_t>(0, 30);
           position < tokens && listed.size() < 5;
           position += data_.ConsumeIntegralInRange<std::uint32_t>(1, 20)) {
        listed.push_back(position);
      }
      if (data_.ConsumeIntegralInRange(0, 15) == 15) {
        listed.push_back(static_cast<std::uint32_t>(tokens));
      }
      protection.positions = listed;
    }
    return protection;
  }

  void started(std::size_t total, const Protection& protection, const Rows& listed) {
    protected_ = listed;
    keep_first_ = protection.keep_first;
    keep_from_ = protection.keep_last == 0 ? std::numeric_limits<std::size_t>::max()
                                           : total - std::min(total, protection.keep_last);
    announced_ = total + caches_[0].shift;
    arrived_ = 0;
    over_ = false;
    least_.clear();
    for (Cache& cache : caches_) {
      cache.turned_lately = false;
    }
    mean_ = plan_.allocator().budget().resolve(total, sizes_.window, sizes_.shape());
    const auto capacities = compressor_.capacities();
    check(std::accumulate(capacities.begin(), capacities.end(), std::size_t{0}) ==
              mean_ * sizes_.layers * (by_head ? sizes_.kv_heads : 1),
          "capacities do not sum to the budget");
    for (const std::size_t capacity : capacities) {
      check(capacity >= std::min(sizes_.window, total) && capacity <= total, "a capacity is out of bounds");
    }
  }

  bool begun() const { return !compressor_.capacities().empty(); }

  void append(std::size_t count) {
    for (std::size_t i = 0; i < count && next_ < 2000; ++i, ++next_) {
      for (const Cache& cache : caches_) {
        if (cache.longest() >= room) {
          return;  // a layer that did not shrink is full: the engine stops
        }
      }
      for (Cache& cache : caches_) {
        cache.append(static_cast<std::uint32_t>(next_));
      }
    }
  }

  void truncate() {
    const std::size_t shift = caches_[0].shift;
    const std::size_t position = data_.ConsumeIntegralInRange<std::size_t>(0, next_ - shift);
    std::optional<Held> held;
    if (!attempt("truncate", success_if(begun() && agree() && position > 0),
                 [&] { held = compressor_.truncate(position); })) {
      return;
    }
    next_ = position + shift;
    announced_ = std::min(announced_, next_);
    over_ = over_ || arrived_ > 0;
    for (Cache& cache : caches_) {
      for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
        std::erase_if(cache.rows[head], [&](const Row& row) { return row.position >= position; });
        check(held->rows(cache.layer, head) == cache.rows[head].size(), "truncate does not say what is left");
      }
      cache.known = std::min(cache.known, next_);
      cache.show_all();
    }
  }

  // Views, right and wrong.

  QueryWindow<float> observation() const {
    const std::size_t shown = std::clamp<std::size_t>(next_, 1, room);
    return {queries_.data(),
            QueryShape{.query_heads = sizes_.query_heads(), .queries = shown, .head_dim = sizes_.head_dim}};
  }

  /// Calls `f` with what gives the view of a layer.
  template <class F>
  void with_views(std::vector<Cache>& caches, F&& f) const {
    if (sizes_.layout == 3) {
      f([&](std::size_t l) { return caches[l].paged(); });
    } else {
      f([&](std::size_t l) { return caches[l].strided(); });
    }
  }
  template <class F>
  void with_view(std::size_t layer, F&& f) {
    with_views(caches_, [&](const auto& views) { f(views(layer)); });
  }

  /// Now and then lets a view show what no call may take, or none by which layers arrive; whether it does.
  bool misshow(Cache& cache, bool arrives = false) {
    std::vector<std::size_t> shown = cache.lengths;
    switch (data_.ConsumeIntegralInRange(0, 15)) {
      case 15: {  // one that was not shortened: more than is announced
        const std::size_t open = announced_ > next_ ? announced_ - next_ : 0;
        const std::size_t stale = open + data_.ConsumeIntegralInRange<std::size_t>(1, 2);
        for (std::size_t& length : shown) {
          length += stale;
        }
        break;
      }
      case 14:  // fewer than were left, or of a layer that arrives than are announced
        for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
          const std::size_t least =
              arrives ? cache.rows[head].size() + announced_ - next_ : cache.kept(head, next_);
          shown[head] = least - 1;
        }
        break;
      case 13:  // tokens that not all heads have
        if (sizes_.kv_heads == 1) {
          return false;
        }
        --shown.back();
        break;
      default:
        return false;
    }
    // Of no head none: the view could not be made. And none beyond the memory.
    if (std::any_of(shown.begin(), shown.end(), [](std::size_t rows) { return rows == 0 || rows > room; })) {
      return false;
    }
    cache.lengths = shown;
    return true;
  }

  /// Whether the compressor must take a view of all rows of a layer.
  bool right(const Cache& cache) const {
    return begun() && next_ >= cache.known && next_ <= announced_ &&
           *std::min_element(cache.lengths.begin(), cache.lengths.end()) > 0;
  }
  /// Whether it must take it to score.
  bool right_to_score(const Cache& cache) const {
    return right(cache) && (S::granularity == Granularity::kv_head || cache.even());
  }
  bool right_to_arrive(const Cache& cache) const { return right_to_score(cache) && next_ == announced_; }

  /// Of one KV head of a layer, of which so many rows are shown.
  std::size_t capacity(std::size_t l, std::size_t head, const std::vector<std::size_t>& shown) const {
    const std::size_t rows = by_head ? shown[head] : *std::max_element(shown.begin(), shown.end());
    return std::max(compressor_.capacities()[by_head ? l * sizes_.kv_heads + head : l],
                    std::min(sizes_.window, rows));
  }
  bool shrinks(std::size_t l, const std::vector<std::size_t>& shown) const {
    bool found = false;
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      found = found || shown[head] > capacity(l, head, shown);
    }
    return found;
  }

  bool is_protected(std::size_t position) const {
    return position < keep_first_ || position >= keep_from_ ||
           std::binary_search(protected_.begin(), protected_.end(), position);
  }
  std::size_t position_of(const Cache& cache, std::size_t head, std::size_t row) const {
    const std::vector<Row>& rows = cache.rows[head];
    return row < rows.size() ? rows[row].position : next_ - cache.shift + row - rows.size();
  }
  /// Rows of a KV head that stay whatever the scores, of `shown`.
  std::size_t fixed_rows(const Cache& cache, std::size_t head, std::size_t shown) const {
    std::size_t count = std::min(sizes_.window, shown);
    for (std::size_t row = 0; row + sizes_.window < shown; ++row) {
      bool found = is_protected(position_of(cache, head, row));
      for (std::size_t other = 0; S::granularity == Granularity::layer && other < sizes_.kv_heads; ++other) {
        found = found || is_protected(position_of(cache, other, row));  // one set of rows for all
      }
      count += found ? 1 : 0;
    }
    return count;
  }
  /// The most of them that a KV head has.
  std::size_t fixed_rows(const Cache& cache) const {
    std::size_t most = 0;
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      most = std::max(most, fixed_rows(cache, head, cache.lengths[head]));
    }
    return most;
  }
  /// Whether a layer's capacity holds what must stay.
  bool fits(const Cache& cache, const std::vector<std::size_t>& shown) const {
    for (std::size_t head = 0; head < (S::granularity == Granularity::layer ? 1 : shown.size()); ++head) {
      if (fixed_rows(cache, head, shown[head]) > capacity(cache.layer, head, shown)) {
        return false;
      }
    }
    return true;
  }
  bool fits(const Cache& cache) const { return fits(cache, cache.lengths); }

  /// The window and what is protected were chosen, and as many rows as the budget says.
  void expect_choice(const Cache& cache, const std::vector<Rows>& choice,
                     const std::vector<std::size_t>& shown) const {
    const bool may_ask = !(cascades && cache.turned_lately);  // the positions are not those it arrived with
    std::size_t total = 0;
    std::size_t all = 0;
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      const Rows& rows = choice[head];
      check(std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end(),
            "rows do not ascend");
      check(rows.empty() || rows.back() < shown[head], "a row that is not there was chosen");
      for (std::uint32_t row = 0; row < shown[head]; ++row) {
        const bool stays = row + sizes_.window >= shown[head];
        if (stays || (may_ask && is_protected(position_of(cache, head, row)))) {
          check(std::binary_search(rows.begin(), rows.end(), row),
                stays ? "the window is not whole" : "a protected token is gone");
        }
      }
      check(adaptive || rows.size() == std::min(capacity(cache.layer, head, shown), shown[head]),
            "not as many rows as the budget says");
      total += rows.size();
      all += shown[head];
    }
    check(!adaptive || total == std::min(capacity(cache.layer, 0, shown) * sizes_.kv_heads, all),
          "not as many rows as the budget says");
  }
  void expect_choice(const Cache& cache, const Selection& selection,
                     const std::vector<std::size_t>& shown) const {
    std::vector<Rows> choice;
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      choice.emplace_back(selection.rows(head).begin(), selection.rows(head).end());
    }
    expect_choice(cache, choice, shown);
  }

  /// The rows that the compressor says it has left of a layer.
  std::vector<Rows> left(const Cache& cache) const {
    std::vector<Rows> choice(sizes_.kv_heads);
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      const std::vector<Row>& rows = cache.rows[head];
      std::size_t row = 0;
      for (const std::uint32_t position : compressor_.retained(cache.layer).positions(head)) {
        while (row < rows.size() && rows[row].position < position) {
          ++row;
        }
        check(row < rows.size() && rows[row].position == position, "a row was invented");
        choice[head].push_back(static_cast<std::uint32_t>(row));
      }
    }
    return choice;
  }
  /// What the engine does after a layer's rows have moved.
  void keep(Cache& cache, const std::vector<Rows>& choice) {
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      std::vector<Row> rows;
      for (const std::uint32_t row : choice[head]) {
        rows.push_back(cache.rows[head][row]);
      }
      cache.rows[head] = std::move(rows);
    }
    cache.known = next_;
    cache.show_all();
  }
  void took(std::size_t l) {
    const std::vector<Rows> choice = left(caches_[l]);
    expect_choice(caches_[l], choice, caches_[l].lengths);
    keep(caches_[l], choice);
  }

  // Calls.

  void one_call() {
    const std::size_t layer = data_.ConsumeIntegralInRange<std::size_t>(0, sizes_.layers);  // one too many
    const std::size_t in_model = std::min(layer, sizes_.layers - 1);
    switch (data_.ConsumeIntegralInRange(0, 15)) {
      case 0:
        begin();
        break;
      case 1:
        append(data_.ConsumeIntegralInRange<std::size_t>(1, 20));
        break;
      case 2:
      case 3:
        begin_turn();
        break;
      case 4:
        truncate();
        break;
      case 5:
        compact(layer, in_model);
        break;
      case 6:
        gather(layer, in_model);
        break;
      case 7:
        for (std::size_t l = layer == sizes_.layers ? 0 : layer; l <= in_model; ++l) {
          rerotate(l);
        }
        break;
      case 8:
        look(layer, in_model);
        break;
      case 9:
        if constexpr (!reads_rows(S::needs) && !reads_values<S> && S::needs != Needs::window_queries) {
          look_at_attention(layer, in_model);
        }
        break;
      case 10:
        spoil(in_model);
        break;
      case 11:
        compressor_ = C(compressor_);  // a beam
        break;
      case 12: {
        Cache& cache = caches_[in_model];
        const std::int32_t block = cache.table[data_.ConsumeIntegralInRange<std::size_t>(0, 7)];
        std::int32_t& count = cache.references[static_cast<std::size_t>(block)];
        count = 3 - count;
        break;
      }
      case 13:
      case 14:  // what an engine does each turn
        begin_turn();
        for (std::size_t l = 0; l < sizes_.layers; ++l) {
          shrink(l, l);
        }
        break;
      default:
        shrink(layer, in_model);
    }
  }

  void shrink(std::size_t layer, std::size_t in_model) {
    if constexpr (own_layer) {
      compress(layer, in_model);
    } else {
      arrive(data_.ConsumeIntegralInRange(0, 7) == 7 ? layer : arrived_);
      if constexpr (P::reach == Reach::all_layers) {
        if (arrived_ == sizes_.layers || data_.ConsumeIntegralInRange(0, 7) == 7) {
          finish();
        }
      }
    }
  }

  void compress(std::size_t layer, std::size_t in_model) {
    Cache& cache = caches_[in_model];
    Due due = success_if(layer == in_model && !misshow(cache) && right_to_score(cache));
    if (due == Due::success && shrinks(layer, cache.lengths)) {
      due = !fits(cache) ? Due::refusal : cache.shares() ? Due::either : Due::success;
    }
    if (attempt("compress", due, [&] {
          with_view(in_model, [&](const auto& kv) { compressor_.compress(layer, kv, observation()); });
        })) {
      took(in_model);
    }
  }

  /// Layers that only look on until a later one arrives.
  std::size_t waiting() const {
    if constexpr (P::reach == Reach::all_layers) {
      return sizes_.layers;
    } else if constexpr (carries) {
      return std::min(plan_.scorer().hold_layers(), sizes_.layers - 1);
    }
    return 0;
  }

  /// What must come of the arrival of a layer, `wrong` the one whose view is wrong.
  Due due_of_arrival(std::size_t layer, std::size_t wrong) const {
    if (layer != arrived_ || layer >= sizes_.layers || over_ || layer == wrong ||
        !right_to_arrive(caches_[layer])) {
      return Due::refusal;
    }
    if (layer < waiting()) {
      return Due::success;
    }
    if (cascades &&
        fixed_rows(caches_[layer]) + std::accumulate(least_.begin(), least_.end(), std::size_t{0}) >
            mean_ * sizes_.layers) {
      return Due::refusal;
    }
    Due due = carries && turned_ ? Due::either : Due::success;
    for (std::size_t l = cascades || layer == waiting() ? 0 : layer; l <= layer; ++l) {
      if (!right_to_arrive(caches_[l]) || (!cascades && !fits(caches_[l])) || l == wrong) {
        return cascades ? Due::either : Due::refusal;
      }
      due = caches_[l].shares() ? Due::either : due;
    }
    return due;
  }

  void arrive(std::size_t layer) {
    const std::size_t asked = layer < sizes_.layers ? data_.ConsumeIntegralInRange<std::size_t>(0, layer) : 0;
    const std::size_t wrong = misshow(caches_[asked], true) ? asked : sizes_.layers;
    std::vector<std::size_t> changed;
    const Due due = due_of_arrival(layer, wrong);
    const bool through = attempt("arrive", due, [&] {
      with_views(caches_, [&](const auto& views) {
        const auto list = compressor_.arrive(layer, views, observation());
        changed.assign(list.begin(), list.end());
      });
    });
    if (!through) {
      return;
    }
    if (cascades) {
      least_.push_back(fixed_rows(caches_[layer]));
    }
    ++arrived_;
    over_ = P::reach == Reach::earlier_layers && arrived_ == sizes_.layers;
    check(std::is_sorted(changed.begin(), changed.end()), "layers that changed do not ascend");
    check(changed.empty() == (layer < waiting()), "a layer that arrived was not asked to shrink");
    for (const std::size_t l : changed) {
      check(l != wrong, "a layer shrank whose view was wrong");
      took(l);
    }
    if (cascades) {
      const auto capacities = compressor_.capacities().first(arrived_);
      check(std::accumulate(capacities.begin(), capacities.end(), std::size_t{0}) <= mean_ * sizes_.layers,
            "layers share out more than the budget");
    }
  }

  void finish() {
    const std::size_t asked = data_.ConsumeIntegralInRange<std::size_t>(0, sizes_.layers - 1);
    bool is_right = !misshow(caches_[asked], true) && arrived_ == sizes_.layers && !over_;
    bool shared = carries && turned_;
    for (const Cache& cache : caches_) {
      is_right = is_right && right_to_arrive(cache) && fits(cache);
      shared = shared || cache.shares();
    }
    std::vector<std::size_t> changed;
    if (attempt("finish", is_right && shared ? Due::either : success_if(is_right), [&] {
          with_views(caches_, [&](const auto& views) {
            const auto list = compressor_.finish(views);
            changed.assign(list.begin(), list.end());
          });
        })) {
      over_ = true;
      check(changed.size() == sizes_.layers, "finish did not shrink all layers");
      for (const std::size_t l : changed) {
        took(l);
      }
    }
  }

  Selection some_selection(const Cache& cache) {
    const auto list = [&](std::size_t rows) {
      Rows out;
      for (std::uint32_t row = data_.ConsumeIntegralInRange<std::uint32_t>(0, 5);
           row < rows + 1 && out.size() <= room; row += data_.ConsumeIntegralInRange<std::uint32_t>(
                                                     data_.ConsumeIntegralInRange(0, 20) == 20 ? 0 : 1, 9)) {
        out.push_back(row);
      }
      return out;
    };
    if (data_.ConsumeBool()) {
      return Selection::shared_by_heads(list(*std::min_element(cache.lengths.begin(), cache.lengths.end())));
    }
    std::vector<Rows> heads;
    for (const std::size_t rows : cache.lengths) {
      heads.push_back(list(rows));
    }
    return Selection::per_head(heads);
  }

  /// The lists of a selection, none where it is not one of the layer's rows.
  std::vector<Rows> lists_of(const Selection& selection, const Cache& cache) const {
    std::vector<Rows> choice;
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      const Rows rows(selection.rows(head).begin(), selection.rows(head).end());
      if (rows.empty() || rows.back() >= cache.lengths[head] ||
          std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) != rows.end()) {
        return {};
      }
      choice.push_back(rows);
    }
    return choice;
  }

  /// Whether a layer's rows may be moved from outside: a cascade may come back to them.
  bool settled(std::size_t layer) const { return !cascades || over_ || layer >= arrived_; }

  void compact(std::size_t layer, std::size_t in_model) {
    Cache& cache = caches_[in_model];
    const Selection selection = some_selection(cache);
    const std::vector<Rows> choice = lists_of(selection, cache);
    bool is_right = layer == in_model && settled(layer) && !choice.empty() && right(cache);
    for (const Rows& rows : choice) {
      const std::size_t moved = detail::first_moved(rows);
      is_right = is_right && cache.writable(moved, rows.size());
    }
    is_right = !misshow(cache) && is_right;
    if (attempt("compact", success_if(is_right), [&] {
          with_view(in_model, [&](const auto& kv) { compressor_.compact(layer, kv, selection); });
        })) {
      check(left(cache) == choice, "compact kept other rows than it was told");
      keep(cache, choice);
    }
  }

  void gather(std::size_t layer, std::size_t in_model) {
    Cache& cache = caches_[in_model];
    const Selection selection = some_selection(cache);
    const std::vector<Rows> choice = lists_of(selection, cache);
    std::vector<Cache> target(1, cache);
    Cache& to = target[0];
    std::fill(to.keys.begin(), to.keys.end(), untouched);
    to.values = to.keys;
    std::fill(to.references.begin(), to.references.end(), 1);
    std::fill(to.lengths.begin(), to.lengths.end(), data_.ConsumeIntegralInRange<std::size_t>(1, room));
    to.most = 0;
    bool is_right = layer == in_model && settled(layer) && !choice.empty() && right(cache);
    for (const Rows& rows : choice) {
      is_right = is_right && rows.size() <= to.lengths[0];
      to.most = std::max(to.most, rows.size());
    }
    is_right = !misshow(cache) && is_right;
    const bool through = attempt("gather", success_if(is_right), [&] {
      with_views(caches_, [&](const auto& views) {
        with_views(target, [&](const auto& targets) {
          if constexpr (std::same_as<decltype(views(0)), decltype(targets(0))>) {
            compressor_.gather(layer, views(in_model), selection, targets(0));
          }
        });
      });
    });
    if (!through) {
      check(std::all_of(to.keys.begin(), to.keys.end(), [](float x) { return x == untouched; }),
            "an error wrote the target");
      return;
    }
    check(cache.keys == before_[2 * in_model] && cache.values == before_[2 * in_model + 1],
          "gather wrote its source");
    check(left(cache) == choice, "gather kept other rows than it was told");
    cache = to;
    keep(cache, choice);
  }

  void rerotate(std::size_t layer) {
    Cache& cache = caches_[layer];
    const bool awaited = carries && arrived_ > 0 && !over_ && !(layer < arrived_ && arrived_ > waiting());
    bool is_right = right(cache) && cache.even() && !awaited && cache.writable(0, cache.longest());
    is_right = !misshow(cache) && is_right;
    if (!attempt("rerotate", success_if(is_right), [&] {
          with_view(layer, [&](const auto& kv) { compressor_.rerotate(layer, kv, kernel::Rotary{}); });
        })) {
      return;
    }
    turned_ = true;
    cache.turned_lately = true;
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      for (std::size_t row = 0; row < cache.rows[head].size(); ++row) {
        turn(cache, head, row);
      }
    }
    cache.known = next_;
    cache.shift = next_ - cache.rows[0].size();
  }

  /// A key that stood at another position than its row is turned by the difference, and its row notes it.
  void turn(Cache& cache, std::size_t head, std::size_t at) {
    Row& row = cache.rows[head][at];
    if (row.position == at) {
      return;
    }
    const std::size_t turned = cache.turned.size();
    const std::size_t pairs = sizes_.head_dim / 2;
    cache.turned.resize(turned + sizes_.head_dim);
    const double distance = static_cast<double>(at) - static_cast<double>(row.position);
    const float* const key = cache.keys.data() + cache.at(head, at);
    for (std::size_t j = 0; j < pairs; ++j) {
      const double angle = distance * std::pow(10000.0, -static_cast<double>(j) / static_cast<double>(pairs));
      const double x = cache.key_of(head, row, j);
      const double y = cache.key_of(head, row, j + pairs);
      const float new_x = key[j * cache.step()];
      const float new_y = key[(j + pairs) * cache.step()];
      check(std::abs(x * std::cos(angle) - y * std::sin(angle) - new_x) < 1e-5 &&
                std::abs(x * std::sin(angle) + y * std::cos(angle) - new_y) < 1e-5,
            "a key was not turned to its row");
      cache.turned[turned + j] = new_x;
      cache.turned[turned + j + pairs] = new_y;
    }
    row.turned = turned;
    row.position = static_cast<std::uint32_t>(at);
  }

  /// Scores and selections that nothing comes of.
  void look(std::size_t layer, std::size_t in_model) {
    Cache& cache = caches_[in_model];
    const bool is_right = layer == in_model && !misshow(cache) && right_to_score(cache);
    std::optional<Scores<S::granularity>> scores;
    if (!attempt("score", success_if(is_right), [&] {
          with_view(in_model, [&](const auto& kv) { scores = compressor_.score(layer, kv, observation()); });
        })) {
      return;
    }
    const bool spoilt = data_.ConsumeIntegralInRange(0, 5) == 5 && !scores->values().empty();
    if (spoilt) {
      scores->values().back() = std::numeric_limits<float>::quiet_NaN();
    }
    attempt("select", success_if(!spoilt && fits(cache)),
            [&] { expect_choice(cache, compressor_.select(layer, *scores), cache.lengths); });
  }

  /// The same from attention alone, of as many tokens as it likes.
  void look_at_attention(std::size_t layer, std::size_t in_model) {
    static const std::vector<float> weights = [] {
      std::vector<float> numbers = noises(most_heads * room * room);
      std::transform(numbers.begin(), numbers.end(), numbers.begin(), [](float x) { return std::abs(x); });
      return numbers;
    }();
    const Cache& cache = caches_[in_model];
    const bool any = data_.ConsumeBool();
    const std::size_t tokens =
        any ? data_.ConsumeIntegralInRange<std::size_t>(1, room) : std::max<std::size_t>(cache.lengths[0], 1);
    Due due = success_if(layer == in_model && begun());
    std::size_t queries = std::min(sizes_.window, tokens);
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      const std::size_t kept = cache.kept(head, next_);
      if (tokens > kept + announced_ - cache.known) {
        due = Due::refusal;
      }
      if (S::needs == Needs::all_queries) {
        const bool whole = kept == cache.known - cache.shift;
        queries = std::max(queries, tokens - (whole ? 0 : std::min(tokens, kept)));
        if (due == Due::success && ((!whole && kept > tokens) || kept != cache.kept(0, next_))) {
          due = Due::either;  // which queries are those that were not seen is not to be told
        }
      }
    }
    const AttentionShape shape{.query_heads = sizes_.query_heads(), .queries = queries, .tokens = tokens};
    if (std::same_as<S, score::Cake> || data_.ConsumeBool()) {
      look_at(AttentionMatrix<float>(weights.data(), shape), layer, cache, due);
    } else {
      if constexpr (!std::same_as<S, score::Cake>) {
        look_at(AttentionSums(weights.data(), shape), layer, cache, due);
      }
    }
  }

  template <class O>
  void look_at(const O& attention, std::size_t layer, const Cache& cache, Due due) {
    attempt("score of attention", due, [&] { compressor_.score(layer, attention); });
    const std::vector<std::size_t> shown(sizes_.kv_heads, attention.tokens());
    if (due != Due::refusal && shrinks(layer, shown) && !fits(cache, shown)) {
      due = Due::refusal;
    }
    attempt("select from attention", due,
            [&] { expect_choice(cache, compressor_.select(layer, attention), shown); });
  }

  /// A key that is no number: an error, or not looked at, which is tried on a copy.
  void spoil(std::size_t layer) {
    const std::size_t head = data_.ConsumeIntegralInRange<std::size_t>(0, sizes_.kv_heads - 1);
    if (caches_[layer].rows[head].empty()) {
      return;
    }
    const std::size_t row =
        data_.ConsumeIntegralInRange<std::size_t>(0, caches_[layer].rows[head].size() - 1);
    const std::size_t at = caches_[layer].at(head, row);
    std::vector<Cache> caches = caches_;
    caches[layer].keys[at] = std::numeric_limits<float>::infinity();
    C asked(compressor_);
    try {
      with_views(caches, [&](const auto& views) {
        if constexpr (own_layer) {
          asked.compress(layer, views(layer), observation());
        } else {
          asked.arrive(arrived_, views, observation());
        }
      });
    } catch (const Error&) {
      check(outcome(asked) == outcome(compressor_), "an error changed what comes after it");
      caches[layer].keys[at] = caches_[layer].keys[at];
      for (const Cache& cache : caches_) {
        check(caches[cache.layer].keys == cache.keys && caches[cache.layer].values == cache.values,
              "an error changed a cache");
      }
    }
  }

  void expect_consistent() const {
    if (!begun()) {
      return;
    }
    std::optional<Held> held;
    try {
      held = compressor_.held(next_ - caches_[0].shift);
    } catch (const Error&) {
      check(!agree(), "what is held was refused");
    }
    check(held.has_value() == agree(), "what is held was told of layers that do not agree");
    for (const Cache& cache : caches_) {
      const Retained& retained = compressor_.retained(cache.layer);
      check(retained.next_position() == cache.known - cache.shift, "a layer goes on at another position");
      cache.expect_contents();
      for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
        Retained::Cursor positions = retained.cursor(head);
        for (std::size_t row = 0; row < cache.rows[head].size(); ++row) {
          check(positions.seek(row) == cache.rows[head][row].position,
                "a row stands at another position than the compressor says");
        }
        check(!held || held->rows(cache.layer, head) == cache.rows[head].size(),
              "held() does not say how many rows there are");
      }
    }
  }

  const P& plan_;
  Sizes sizes_;
  FuzzedDataProvider& data_;
  C compressor_;
  std::vector<Cache> caches_;
  std::vector<float> queries_;
  std::vector<std::vector<float>> before_;  // keys and values of each layer before a call
  Rows protected_;
  std::size_t keep_first_ = 0;
  std::size_t keep_from_ = 0;
  std::size_t mean_ = 0;            // rows a layer that the budget says
  std::size_t next_ = 0;            // tokens so far
  std::size_t announced_ = 0;       // tokens that the compressor was told of
  std::size_t arrived_ = 0;         // layers
  bool over_ = false;               // all of them, or the turn was cut short
  bool turned_ = false;             // keys, in this sequence
  std::vector<std::size_t> least_;  // [layer that has arrived], rows that it cannot lose, where that matters
};

/// Of heads that all differ a little, whose queries are all alike.
QueryStatistics statistics_of(const Sizes& sizes) {
  std::vector<QueryStatistics::Head> heads;
  for (std::size_t i = 0; i < sizes.layers * sizes.query_heads(); ++i) {
    QueryStatistics::Head head{.count = 1};
    for (std::size_t e = 0; e < sizes.head_dim; ++e) {
      head.mean.push_back(noise(i, 0, 0, e));
    }
    for (std::size_t j = 0; j < sizes.head_dim / 2; ++j) {
      head.modulus.push_back(std::hypot(head.mean[j], head.mean[j + sizes.head_dim / 2]));
    }
    head.covariance.assign(QueryStatistics::triangle(sizes.head_dim), 0.0F);
    heads.push_back(std::move(head));
  }
  return {sizes.layers, sizes.query_heads(), sizes.head_dim, {}, std::move(heads)};
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  FuzzedDataProvider data(bytes, size);
  const Sizes sizes{.layers = data.ConsumeIntegralInRange<std::size_t>(1, 4),
                    .kv_heads = data.ConsumeIntegralInRange<std::size_t>(1, 3),
                    .group = data.ConsumeIntegralInRange<std::size_t>(1, 3),
                    .head_dim = data.PickValueInArray<std::size_t>({2, 4, 8, 20}),
                    .window = data.ConsumeIntegralInRange<std::size_t>(1, 9),
                    .layout = std::min<std::size_t>(data.ConsumeIntegralInRange<std::size_t>(0, 5), 3)};
  // Those that reach over layers every second time: most can go wrong there.
  const Method method = data.ConsumeBool()
                            ? data.PickValueInArray({Method::cake, Method::carried, Method::model_wide,
                                                     Method::blend, Method::blend_carried})
                            : methods[data.ConsumeIntegralInRange<std::size_t>(1, methods.size() - 1)].method;
  const std::size_t heads = sizes.kv_heads * sizes.group;
  std::vector<std::vector<std::uint32_t>> ranking(sizes.layers, std::vector<std::uint32_t>(heads));
  std::vector<std::vector<double>> runs;
  std::vector<double> errors;
  for (auto& layer : ranking) {
    std::iota(layer.begin(), layer.end(), 0U);
    std::rotate(layer.begin(),
                layer.begin() +
                    data.ConsumeIntegralInRange<std::ptrdiff_t>(0, static_cast<std::ptrdiff_t>(heads) - 1),
                layer.end());
    errors.push_back(1.0 + data.ConsumeIntegralInRange(0, 50));
    for (std::size_t i = 0; i < heads; ++i) {
      runs.push_back({data.ConsumeIntegralInRange(0, 100) / 100.0});
    }
  }
  const std::vector<float> outputs = reference::random_outputs(1, sizes.shape());
  const bool by_share = data.ConsumeBool();
  const auto amount = data.ConsumeIntegralInRange<std::size_t>(1, 60);
  MethodSettings settings{
      .budget = by_share ? Budget::kept_ratio(static_cast<double>(amount) / 60.0)
                         : Budget::tokens_per_layer(amount),
      .heads = HeadRanking(ranking),
      .scores = HeadScores(sizes.layers, heads, runs),
      .statistics = statistics_of(sizes),
      .output_weights =
          OutputWeights(std::vector<const float*>(sizes.layers, outputs.data()),
                        {.hidden = reference::output_rows, .query_heads = heads, .head_dim = sizes.head_dim}),
      .kv_scores = HeadScores(
          sizes.layers, sizes.kv_heads,
          {runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(sizes.layers * sizes.kv_heads)}),
      .window = sizes.window};
  if (data.ConsumeBool()) {
    settings.errors = LayerErrors(errors, {});
  }
  settings.heads_per_layer = data.ConsumeIntegralInRange<std::size_t>(1, heads);
  settings.model_heads = data.ConsumeIntegralInRange<std::size_t>(1, heads * sizes.layers);
  settings.hold_layers = data.ConsumeIntegralInRange<std::size_t>(0, 2);
  settings.pool_width = data.PickValueInArray<std::size_t>({1, 3, 5, 9});
  settings.pool = static_cast<kernel::Pool>(data.ConsumeIntegralInRange(0, 2));
  settings.model_share = data.ConsumeIntegralInRange(0, 10) / 10.0;
  settings.sinks = data.ConsumeIntegralInRange<std::size_t>(0, 6);
  settings.lag = data.ConsumeIntegralInRange<std::size_t>(2, 12);
  settings.block = data.ConsumeIntegralInRange<std::size_t>(1, 20);
  settings.chunk = data.ConsumeIntegralInRange<std::size_t>(1, 20);
  settings.head_sinks = data.ConsumeIntegralInRange<std::size_t>(0, 6);
  settings.head_recent = data.ConsumeIntegralInRange<std::size_t>(0, 20);
  try {
    reference::with_arriving_method(method, settings, [&](auto scorer, auto selector, auto allocator) {
      const Plan plan{sizes.shape(), scorer, selector, allocator};
      Sizes own = sizes;
      own.window = plan.scorer().window();
      Driver(plan, own, data).run();
    });
  } catch (const Error&) {  // the budget cannot hold the window
  }
  return 0;
}
