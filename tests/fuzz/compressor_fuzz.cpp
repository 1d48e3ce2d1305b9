// Any calls of a compressor in any order, over random methods, shapes and caches, beside a model of what the
// caches hold: token by token, as each value row names its own.
//
// After every call: the window and what is protected are there, rows ascend, each row is the token that the
// compressor says, nothing outside the rows in use was written. A call that throws has changed nothing, and
// only the library's own errors are thrown.

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
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
constexpr float untouched = 7777.0F;

struct Sizes {
  std::size_t layers;
  std::size_t kv_heads;
  std::size_t group;
  std::size_t head_dim;
  std::size_t window;
  std::size_t layout;  // 0, 1, 2: strided; 3: paged

  ModelShape shape() const {
    return {.layers = layers, .query_heads = kv_heads * group, .kv_heads = kv_heads, .head_dim = head_dim};
  }
};

/// A number that follows from what it is for: contents repeat whatever was done before.
float noise(std::size_t layer, std::size_t head, std::size_t token, std::size_t element) {
  std::uint64_t x = ((layer * 31 + head) * 1021 + token) * 257 + element + 1;
  x = (x ^ (x >> 31U)) * 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 29U)) * 0xbf58476d1ce4e5b9U;
  return static_cast<float>(static_cast<std::int64_t>(x >> 40U)) / 8388608.0F - 1.0F;
}

/// One layer: exactly the memory that its rows reach, and the tokens that stand in them.
struct Cache {
  Sizes sizes;
  std::vector<float> keys;
  std::vector<float> values;
  std::vector<Rows> tokens;          // [kv_head][row]
  std::vector<std::size_t> lengths;  // what a view shows
  std::vector<std::int32_t> table;   // of a paged cache
  std::vector<std::int32_t> references;

  explicit Cache(const Sizes& s) : sizes(s), tokens(s.kv_heads), lengths(s.kv_heads, 0) {
    keys.assign(room * s.kv_heads * s.head_dim, untouched);
    values = keys;
    for (std::size_t i = 0; i < room / block_rows; ++i) {
      table.push_back(static_cast<std::int32_t>((i * 7 + 3) % (room / block_rows)));
      references.push_back(1);
    }
  }

  layout::Strides strides() const {
    const layout::Extents extents{
        .kv_heads = sizes.kv_heads, .rows = sizes.layout == 3 ? block_rows : room, .units = sizes.head_dim};
    switch (sizes.layout) {
      case 0:
        return layout::head_token_dim(extents);
      case 1:
        return layout::head_dim_token(extents);
      default:
        return layout::token_head_dim(extents);
    }
  }
  std::size_t at(std::size_t head, std::size_t row, std::size_t element) const {
    std::size_t block = 0;
    if (sizes.layout == 3) {
      block =
          static_cast<std::size_t>(table[row / block_rows]) * block_rows * sizes.kv_heads * sizes.head_dim;
      row %= block_rows;
    }
    const layout::Strides s = strides();
    const std::size_t chunk = s.chunk == 0 ? sizes.head_dim : s.chunk;
    return block + head * s.head + row * s.row + element / chunk * s.chunk_stride + element % chunk;
  }

  void append(std::size_t layer, std::uint32_t token) {
    for (std::size_t head = 0; head < sizes.kv_heads; ++head) {
      const std::size_t row = tokens[head].size();
      for (std::size_t e = 0; e < sizes.head_dim; ++e) {
        keys[at(head, row, e)] = noise(layer, head, token, e);
        values[at(head, row, e)] = static_cast<float>(token) + static_cast<float>(e) * 0.001F;
      }
      tokens[head].push_back(token);
      lengths[head] = tokens[head].size();
    }
  }
  std::size_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }

  StridedKv<float> strided() {
    return {std::span(keys), std::span(values),
            KvShape{.kv_heads = sizes.kv_heads,
                    .head_dim = sizes.head_dim,
                    .allocated_rows = room,
                    .head_rows = lengths},
            strides()};
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
            strides(),
            references};
  }

  /// Every row in use is the token that stands in it, rows that never were in use are as they were.
  void expect_values(std::size_t head, std::size_t most_rows) const {
    for (std::size_t row = 0; row < tokens[head].size(); ++row) {
      for (std::size_t e = 0; e < sizes.head_dim; ++e) {
        check(values[at(head, row, e)] ==
                  static_cast<float>(tokens[head][row]) + static_cast<float>(e) * 0.001F,
              "a value row is not that of its token");
      }
    }
    for (std::size_t row = most_rows; row < room; ++row) {
      for (std::size_t e = 0; e < sizes.head_dim; ++e) {
        check(values[at(head, row, e)] == untouched && keys[at(head, row, e)] == untouched,
              "memory behind the rows was written");
      }
    }
  }
  void expect_keys(std::size_t layer, std::size_t head) const {
    for (std::size_t row = 0; row < tokens[head].size(); ++row) {
      for (std::size_t e = 0; e < sizes.head_dim; ++e) {
        check(keys[at(head, row, e)] == noise(layer, head, tokens[head][row], e),
              "a key row is not that of its token");
      }
    }
  }
};

template <class P>
class Driver {
 public:
  Driver(const P& plan, const Sizes& sizes, FuzzedDataProvider& data)
      : sizes_(sizes), data_(data), compressor_(plan), caches_(sizes.layers, Cache(sizes)) {
    queries_.resize(sizes.kv_heads * sizes.group * room * sizes.head_dim);
    for (std::size_t i = 0; i < queries_.size(); ++i) {
      queries_[i] = 2.0F * noise(77, 0, i, 0);
    }
    most_.assign(sizes.layers, 0);
  }

  void run() {
    guarded([&] { begin(); });
    for (int step = 0; step < 40 && data_.remaining_bytes() > 0; ++step) {
      one_call();
      expect_consistent();
    }
  }

 private:
  using C = Compressor<P>;

  /// Runs a call that may throw an Error; nothing may then have changed. Whether it got through.
  template <class Call>
  bool guarded(Call&& call) {
    std::vector<Cache> before = caches_;
    const std::string told = state();
    try {
      call();
      return true;
    } catch (const Error& error) {
      check(std::string(error.what()).size() < 2000, "a message is endless");
      for (std::size_t l = 0; l < caches_.size(); ++l) {
        check(caches_[l].keys == before[l].keys && caches_[l].values == before[l].values,
              "an error changed a cache");
      }
      check(state() == told, "an error changed the compressor");
      for (std::size_t l = 0; l < caches_.size(); ++l) {
        caches_[l].lengths = before[l].lengths;
      }
      return false;
    }
  }

  std::string state() const {
    std::string text;
    for (const std::size_t rows : compressor_.capacities()) {
      text += std::to_string(rows) + ",";
    }
    for (std::size_t l = 0; l < (compressor_.capacities().empty() ? 0 : sizes_.layers); ++l) {
      const Retained& kept = compressor_.retained(l);
      text += "|" + std::to_string(kept.next_position()) + ":";
      for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
        for (const std::uint32_t position : kept.positions(head)) {
          text += std::to_string(position) + " ";
        }
        text += ";";
      }
    }
    return text;
  }

  void begin() {
    const auto tokens = data_.ConsumeIntegralInRange<std::size_t>(1, 90);
    Rows listed;
    const Protection protection = some_protection(tokens, listed);
    const bool right = compressor_.capacities().empty() || data_.ConsumeIntegralInRange(0, 9) > 0;
    compressor_.begin(right ? tokens : tokens + 1, protection);
    started(protection, listed, right ? tokens : tokens + 1);
    caches_.assign(sizes_.layers, Cache(sizes_));
    most_.assign(sizes_.layers, 0);
    turned_ = false;
    next_ = 0;
    append(tokens);
    arrived_ = 0;
  }

  Protection some_protection(std::size_t tokens, Rows& listed) {
    Protection protection;
    if (data_.ConsumeIntegralInRange(0, 3) == 0) {
      protection.keep_first = data_.ConsumeIntegralInRange<std::size_t>(0, 6);
      protection.keep_last = data_.ConsumeIntegralInRange<std::size_t>(0, 12);
      for (auto position = data_.ConsumeIntegralInRange<std::uint32_t>(0, 30);
           position < tokens && listed.size() < 5;
           position += data_.ConsumeIntegralInRange<std::uint32_t>(1, 20)) {
        listed.push_back(position);
      }
      protection.positions = listed;
    }
    return protection;
  }
  void started(const Protection& protection, const Rows& listed, std::size_t total) {
    protected_ = listed;
    keep_first_ = protection.keep_first;
    keep_from_ = protection.keep_last == 0 ? room : total - std::min(total, protection.keep_last);
  }

  void append(std::size_t count) {
    for (std::size_t i = 0; i < count && caches_[0].longest() < room && next_ < 2000; ++i, ++next_) {
      for (std::size_t l = 0; l < sizes_.layers; ++l) {
        if (caches_[l].longest() >= room) {
          return;  // a layer that did not shrink is full: the engine stops
        }
      }
      for (std::size_t l = 0; l < sizes_.layers; ++l) {
        caches_[l].append(l, static_cast<std::uint32_t>(next_));
        most_[l] = std::max(most_[l], caches_[l].longest());
      }
    }
  }

  QueryWindow<float> observation() const {
    const std::size_t shown = std::max<std::size_t>(std::min(next_, room), 1);
    return {queries_.data(), QueryShape{.query_heads = sizes_.kv_heads * sizes_.group,
                                        .queries = shown,
                                        .head_dim = sizes_.head_dim}};
  }

  template <class F>
  void with_view(std::size_t layer, F&& f) {
    if (sizes_.layout == 3) {
      f(caches_[layer].paged());
    } else {
      f(caches_[layer].strided());
    }
  }

  /// What the engine does after a layer's rows have moved, and what it then must find.
  void took(std::size_t layer, bool whole_window) {
    const Retained& kept = compressor_.retained(layer);
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      Rows& tokens = caches_[layer].tokens[head];
      Rows left;
      if (turned_) {
        // Positions count rows now: what stays is told by the values.
        for (std::size_t row = 0; row < kept.rows(head); ++row) {
          left.push_back(static_cast<std::uint32_t>(caches_[layer].values[caches_[layer].at(head, row, 0)]));
        }
      } else {
        left.assign(kept.positions(head).begin(), kept.positions(head).end());
      }
      check(std::is_sorted(left.begin(), left.end()) &&
                std::adjacent_find(left.begin(), left.end()) == left.end(),
            "rows do not ascend");
      check(std::includes(tokens.begin(), tokens.end(), left.begin(), left.end()), "a row was invented");
      if (whole_window) {
        const std::size_t window = std::min(sizes_.window, tokens.size());
        check(std::includes(left.begin(), left.end(), tokens.end() - static_cast<std::ptrdiff_t>(window),
                            tokens.end()),
              "the window is not whole");
        if (!turned_) {
          for (const std::uint32_t token : tokens) {
            const bool stays = token < keep_first_ || token >= keep_from_ ||
                               std::binary_search(protected_.begin(), protected_.end(), token);
            check(!stays || std::binary_search(left.begin(), left.end(), token), "a protected token is gone");
          }
        }
      }
      tokens = left;
      caches_[layer].lengths[head] = left.size();
    }
  }

  void one_call() {
    const std::size_t layer = data_.ConsumeIntegralInRange<std::size_t>(0, sizes_.layers);  // one too many
    const std::size_t in_model = std::min(layer, sizes_.layers - 1);
    switch (data_.ConsumeIntegralInRange(0, 15)) {
      case 0:
        guarded([&] { begin(); });
        break;
      case 1:
      case 2: {
        append(data_.ConsumeIntegralInRange<std::size_t>(1, 20));
        break;
      }
      case 3:
      case 4: {
        if (turned_) {
          break;  // what a sequence counts then is for each layer to say
        }
        Rows listed;
        const Protection protection = some_protection(next_, listed);
        const std::size_t total = next_ + (data_.ConsumeIntegralInRange(0, 9) == 0 ? 3 : 0);
        guarded([&] {
          compressor_.begin_turn(total, protection);
          started(protection, listed, total);
          arrived_ = 0;
        });
        break;
      }
      case 5:
        if (!turned_) {
          truncate();
        }
        break;
      case 6:
        compact(layer, in_model);
        break;
      case 7:
        gather(in_model);
        break;
      case 8:
        rerotate(in_model);
        break;
      case 9:
        look(layer, in_model);
        break;
      case 10:
        spoil(in_model);
        break;
      case 11:
        compressor_ = C(compressor_);  // a beam
        break;
      case 12:
        for (std::int32_t& count : caches_[in_model].references) {
          count = data_.ConsumeBool() ? 1 : 2;
        }
        break;
      default:
        shrink(layer, in_model);
    }
  }

  void shrink(std::size_t layer, std::size_t in_model) {
    if constexpr (P::reach == Reach::own_layer) {
      // Now and then a cache that was not shortened.
      const std::size_t stale = data_.ConsumeIntegralInRange(0, 9) == 0 ? 2 : 0;
      if (stale > 0 && caches_[in_model].longest() + stale <= room) {
        for (std::size_t& length : caches_[in_model].lengths) {
          length += stale;
        }
      }
      bool through = false;
      with_view(in_model, [&](const auto& kv) {
        through = guarded([&] { compressor_.compress(layer, kv, observation()); });
      });
      if (through) {
        check(stale == 0 || caches_[in_model].longest() + stale > room, "rows that are not there were taken");
        took(in_model, true);
      } else {
        restore_lengths(in_model);
      }
    } else {
      const std::size_t next = data_.ConsumeIntegralInRange(0, 7) == 0 ? layer : arrived_;
      std::vector<std::size_t> changed;
      const auto arrive = [&](auto views) {
        return guarded([&] {
          const auto list = compressor_.arrive(next, views, observation());
          changed.assign(list.begin(), list.end());
        });
      };
      bool through = sizes_.layout == 3 ? arrive([&](std::size_t l) { return caches_[l].paged(); })
                                        : arrive([&](std::size_t l) { return caches_[l].strided(); });
      if (through) {
        ++arrived_;
        for (const std::size_t l : changed) {
          took(l, true);
        }
      }
      if constexpr (P::reach == Reach::all_layers) {
        const auto finish = [&](auto views) {
          return guarded([&] {
            const auto list = compressor_.finish(views);
            changed.assign(list.begin(), list.end());
          });
        };
        changed.clear();
        through = sizes_.layout == 3 ? finish([&](std::size_t l) { return caches_[l].paged(); })
                                     : finish([&](std::size_t l) { return caches_[l].strided(); });
        for (const std::size_t l : changed) {
          took(l, true);
        }
      }
    }
  }

  void restore_lengths(std::size_t layer) {
    for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
      caches_[layer].lengths[head] = caches_[layer].tokens[head].size();
    }
  }

  void truncate() {
    const std::size_t position = data_.ConsumeIntegralInRange<std::size_t>(0, next_);
    std::optional<Held> held;
    if (!guarded([&] { held = compressor_.truncate(position); })) {
      check(position == 0, "truncate refused");
      return;
    }
    for (std::size_t l = 0; l < sizes_.layers; ++l) {
      for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
        Rows& tokens = caches_[l].tokens[head];
        const auto left = static_cast<std::size_t>(std::lower_bound(tokens.begin(), tokens.end(), position) -
                                                   tokens.begin());
        check(held->rows(l, head) == left, "truncate does not say what is left");
        tokens.resize(left);
        caches_[l].lengths[head] = left;
      }
    }
    next_ = position;
    arrived_ = sizes_.layers;  // where a turn was under way it is over
  }

  Selection some_selection(std::size_t layer) {
    const auto list = [&](std::size_t rows) {
      Rows out;
      for (std::uint32_t row = data_.ConsumeIntegralInRange<std::uint32_t>(0, 5); row < rows + 1;
           row +=
           data_.ConsumeIntegralInRange<std::uint32_t>(data_.ConsumeIntegralInRange(0, 20) == 0 ? 0 : 1, 9)) {
        out.push_back(row);
        if (out.size() > room) {
          break;
        }
      }
      return out;
    };
    if (data_.ConsumeBool()) {
      return Selection::shared_by_heads(
          list(*std::min_element(caches_[layer].lengths.begin(), caches_[layer].lengths.end())));
    }
    std::vector<Rows> heads;
    for (const std::size_t rows : caches_[layer].lengths) {
      heads.push_back(list(rows));
    }
    return Selection::per_head(heads);
  }

  void compact(std::size_t layer, std::size_t in_model) {
    const Selection selection = some_selection(in_model);
    with_view(in_model, [&](const auto& kv) {
      if (guarded([&] { compressor_.compact(layer, kv, selection); })) {
        took(in_model, false);
      }
    });
  }

  void gather(std::size_t layer) {
    const Selection selection = some_selection(layer);
    Cache target(sizes_);
    std::fill(target.lengths.begin(), target.lengths.end(),
              data_.ConsumeIntegralInRange<std::size_t>(1, room));
    const Cache source = caches_[layer];
    bool through = false;
    if (sizes_.layout == 3) {
      through =
          guarded([&] { compressor_.gather(layer, caches_[layer].paged(), selection, target.paged()); });
    } else {
      through =
          guarded([&] { compressor_.gather(layer, caches_[layer].strided(), selection, target.strided()); });
    }
    if (!through) {
      check(std::all_of(target.keys.begin(), target.keys.end(), [](float x) { return x == untouched; }),
            "an error wrote the target");
      return;
    }
    check(caches_[layer].keys == source.keys && caches_[layer].values == source.values,
          "gather wrote its source");
    target.tokens = caches_[layer].tokens;
    caches_[layer] = target;
    most_[layer] = target.lengths[0];
    took(layer, false);
  }

  void rerotate(std::size_t layer) {
    with_view(layer, [&](const auto& kv) {
      if (guarded([&] { compressor_.rerotate(layer, kv, kernel::Rotary{}); })) {
        turned_ = true;
        check(compressor_.retained(layer).next_position() == caches_[layer].tokens[0].size(),
              "a turned layer goes on at its row count");
      }
    });
  }

  /// Scores and selections that nothing comes of.
  void look(std::size_t layer, std::size_t in_model) {
    with_view(in_model, [&](const auto& kv) {
      guarded([&] {
        const auto scores = compressor_.score(layer, kv, observation());
        if (data_.ConsumeIntegralInRange(0, 5) == 0 && !scores.values().empty()) {
          scores.values()[0] = std::numeric_limits<float>::quiet_NaN();
        }
        const Selection& selection = compressor_.select(layer, scores);
        for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
          check(!selection.rows(head).empty() && selection.rows(head).back() < kv.rows(head),
                "a row that is not there was selected");
        }
      });
    });
  }

  /// NaN in a key: an error, or not looked at.
  void spoil(std::size_t layer) {
    Cache& cache = caches_[layer];
    const std::size_t head = data_.ConsumeIntegralInRange<std::size_t>(0, sizes_.kv_heads - 1);
    if (cache.tokens[head].empty()) {
      return;
    }
    const std::size_t at =
        cache.at(head, data_.ConsumeIntegralInRange<std::size_t>(0, cache.tokens[head].size() - 1), 0);
    const float good = std::exchange(cache.keys[at], std::numeric_limits<float>::infinity());
    with_view(layer, [&](const auto& kv) {
      try {
        compressor_.score(layer, kv, observation());
      } catch (const Error&) {  // said
      }
    });
    cache.keys[at] = good;
  }

  void expect_consistent() const {
    if (compressor_.capacities().empty()) {
      return;
    }
    for (std::size_t l = 0; l < sizes_.layers; ++l) {
      for (std::size_t head = 0; head < sizes_.kv_heads; ++head) {
        caches_[l].expect_values(head, most_[l]);
        if (turned_) {
          continue;
        }
        caches_[l].expect_keys(l, head);
        for (std::size_t row = 0; row < caches_[l].tokens[head].size(); ++row) {
          check(compressor_.retained(l).position(row, head) == caches_[l].tokens[head][row],
                "a row stands at another position than the compressor says");
        }
        check(compressor_.held(next_).rows(l, head) == caches_[l].tokens[head].size(),
              "held() does not say how many rows there are");
      }
    }
  }

  Sizes sizes_;
  FuzzedDataProvider& data_;
  C compressor_;
  std::vector<Cache> caches_;
  std::vector<float> queries_;
  std::vector<std::size_t> most_;  // [layer], rows that have been in use
  Rows protected_;
  std::size_t keep_first_ = 0;
  std::size_t keep_from_ = room;
  std::size_t next_ = 0;
  std::size_t arrived_ = 0;
  bool turned_ = false;  // positions are no longer those of the tokens
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  FuzzedDataProvider data(bytes, size);
  const Sizes sizes{.layers = data.ConsumeIntegralInRange<std::size_t>(1, 4),
                    .kv_heads = data.ConsumeIntegralInRange<std::size_t>(1, 3),
                    .group = data.ConsumeIntegralInRange<std::size_t>(1, 3),
                    .head_dim = data.PickValueInArray<std::size_t>({2, 4, 8, 20}),
                    .window = data.ConsumeIntegralInRange<std::size_t>(1, 9),
                    .layout = data.ConsumeIntegralInRange<std::size_t>(0, 3)};
  const auto method = methods[data.ConsumeIntegralInRange<std::size_t>(1, methods.size() - 1)].method;
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
  const bool by_share = data.ConsumeBool();
  const auto amount = data.ConsumeIntegralInRange<std::size_t>(1, 60);
  MethodSettings settings{.budget = by_share ? Budget::kept_ratio(static_cast<double>(amount) / 60.0)
                                             : Budget::tokens_per_layer(amount),
                          .heads = HeadRanking(ranking),
                          .scores = HeadScores(sizes.layers, heads, runs),
                          .window = sizes.window};
  if (data.ConsumeBool()) {
    settings.errors = LayerErrors(errors, {});
  }
  settings.heads_per_layer = data.ConsumeIntegralInRange<std::size_t>(1, heads);
  settings.model_heads = data.ConsumeIntegralInRange<std::size_t>(1, heads * sizes.layers);
  settings.hold_layers = data.ConsumeIntegralInRange<std::size_t>(0, 2);
  settings.pool_width = data.PickValueInArray<std::size_t>({1, 3, 5, 9});
  try {
    with_method(method, settings, [&](auto scorer, auto selector, auto allocator) {
      const Plan plan{sizes.shape(), scorer, selector, allocator};
      Sizes own = sizes;
      own.window = plan.scorer().window();
      Driver(plan, own, data).run();
    });
  } catch (const Error&) {  // the budget cannot hold the window
  }
  return 0;
}
