#pragma once

#include <array>
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "reference/cache.hpp"
#include "reference/random.hpp"
#include "reference/scores.hpp"

namespace compresskv::reference {

using SemanticPlan = Plan<score::SemanticRetrieval, select::SharedTopK, budget::Uniform>;

/// One layer to compress: sizes alone, the contents follow from `seed`.
struct LayerCase {
  std::size_t group = 1;
  std::size_t kv_heads = 1;
  std::size_t head_dim = 8;
  std::size_t rows = 64;
  std::size_t window = 8;
  std::size_t capacity = 16;  ///< at least the window
  std::size_t heads_per_layer = 1;
  std::size_t extra_queries = 0;  ///< queries shown before the window
  std::size_t extra_rows = 0;     ///< allocated behind those in use
  std::size_t pool_width = 5;
  kernel::Pool pool = kernel::Pool::average;
  Arrangement arrangement = Arrangement::head_token_dim;
  std::uint64_t seed = 1;

  std::size_t query_heads() const { return group * kv_heads; }
  /// Queries that observe: a short prompt has no more than its tokens.
  std::size_t observed() const { return std::min(window, rows); }

  friend std::ostream& operator<<(std::ostream& out, const LayerCase& c) {
    return out << "H " << c.query_heads() << " G " << c.group << " d " << c.head_dim << " S " << c.rows
               << " w " << c.window << " capacity " << c.capacity << " k " << c.heads_per_layer << " pool "
               << std::array{"average ", "max ", "trailing "}[static_cast<std::size_t>(c.pool)]
               << c.pool_width << " arrangement " << static_cast<int>(c.arrangement) << " extra queries "
               << c.extra_queries << " extra rows " << c.extra_rows << " seed " << c.seed;
  }
};

/// The corners first, then `random_cases` drawn at random.
inline std::vector<LayerCase> layer_cases(std::size_t random_cases, std::uint64_t seed) {
  std::vector<LayerCase> cases{
      {.rows = 1, .window = 1, .capacity = 1},                  // one token
      {.rows = 1, .window = 8, .capacity = 8},                  // one token, less than the window
      {.rows = 5, .window = 8, .capacity = 8},                  // S < w
      {.rows = 8, .window = 8, .capacity = 8},                  // S = w
      {.rows = 9, .window = 8, .capacity = 8},                  // capacity = w, one evictable
      {.rows = 64, .window = 8, .capacity = 8},                 // capacity = w
      {.rows = 64, .window = 8, .capacity = 64},                // S = capacity
      {.rows = 64, .window = 8, .capacity = 63},                // S = capacity + 1
      {.rows = 64, .window = 8, .capacity = 100},               // S < capacity
      {.rows = 17, .window = 16, .capacity = 16},               // shorter than the pool
      {.head_dim = 1, .rows = 40, .window = 1, .capacity = 5},  // one element
      {.group = 9, .head_dim = 64, .rows = 333, .capacity = 40, .heads_per_layer = 4},  // G = 9
      {.group = 3, .kv_heads = 3, .head_dim = 64, .rows = 500, .capacity = 60, .heads_per_layer = 4},
      {.group = 4, .kv_heads = 8, .head_dim = 128, .rows = 700, .capacity = 64, .heads_per_layer = 4},
      {.group = 1, .kv_heads = 32, .head_dim = 20, .rows = 100, .capacity = 30, .heads_per_layer = 4},
      // More than one tile of 1024 tokens, and a last one that holds the window alone.
      {.group = 2, .kv_heads = 1, .head_dim = 20, .rows = 2053, .capacity = 100, .heads_per_layer = 2},
  };
  struct Heads {
    std::size_t group;
    std::size_t kv_heads;
  };
  const std::vector<Heads> heads{{1, 1}, {1, 2}, {1, 4}, {4, 1}, {1, 9}, {3, 3}, {9, 1}, {4, 8}, {1, 32}};
  const std::vector<std::size_t> dims{1, 8, 20, 64, 128};
  const std::vector<std::size_t> lengths{1, 2, 7, 8, 9, 16, 17, 31, 64, 100, 255, 333, 700};
  Random random(seed);
  for (std::size_t i = 0; i < random_cases; ++i) {
    LayerCase c;
    const Heads shape = random.pick(heads);
    c.group = shape.group;
    c.kv_heads = shape.kv_heads;
    c.head_dim = random.pick(dims);
    c.rows = random.pick(lengths);
    if (c.kv_heads >= 8 && c.rows > 400) {
      c.rows = 150;
    }
    c.window = random.pick(std::vector<std::size_t>{1, 2, 8, 8, 13});
    c.capacity = random.between(c.window, std::max(c.window, c.rows) + 2);
    c.heads_per_layer = random.between(1, std::min<std::size_t>(4, c.query_heads()));
    c.extra_queries = random.pick(std::vector<std::size_t>{0, 0, 5});
    c.extra_rows = random.pick(std::vector<std::size_t>{0, 0, 7});
    c.pool_width = random.pick(std::vector<std::size_t>{1, 3, 5, 5, 7});
    c.pool = static_cast<kernel::Pool>(random.between(0, 2));
    c.arrangement = random.pick(all_arrangements);
    c.seed = random.bits();
    cases.push_back(c);
  }
  return cases;
}

/// Cases small enough to have many layers of each.
inline std::vector<LayerCase> model_cases(std::size_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<LayerCase> out;
  for (std::size_t i = 0; i < count; ++i) {
    LayerCase c;
    c.group = random.between(1, 3);
    c.kv_heads = random.between(1, 3);
    c.head_dim = 16;
    c.rows = random.between(20, 150);
    c.window = random.pick(std::vector<std::size_t>{2, 8});
    c.capacity = random.between(c.window, c.rows);
    c.seed = random.bits();
    out.push_back(c);
  }
  return out;
}

/// The contents of a case: keys, values, queries, a ranking, and what the method makes of them in double.
template <Element T>
struct Layer {
  LayerCase sizes;
  ModelShape shape;
  Cache<T> cache;
  std::vector<T> queries;  // [query_head][extra_queries + window][dim]
  std::vector<std::vector<std::uint32_t>> ranking;
  SemanticPlan plan;

  explicit Layer(const LayerCase& c) : Layer(c, Random(c.seed)) {}

  QueryWindow<T> observation() const {
    return {queries.data(),
            {.query_heads = shape.query_heads, .queries = shown(), .head_dim = shape.head_dim}};
  }

  std::size_t shown() const { return sizes.extra_queries + sizes.observed(); }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(shape.head_dim)); }

  double key(std::size_t head, std::size_t row, std::size_t dim) const {
    return static_cast<double>(to_float(cache.keys[cache.at(head, row, dim)]));
  }
  double value(std::size_t head, std::size_t row, std::size_t dim) const {
    return static_cast<double>(to_float(cache.values[cache.at(head, row, dim)]));
  }
  /// Query `i` of the window.
  double query(std::size_t head, std::size_t i, std::size_t dim) const {
    const std::size_t index = (head * shown() + sizes.extra_queries + i) * shape.head_dim + dim;
    return static_cast<double>(to_float(queries[index]));
  }

  WindowAttention attention(std::size_t query_head) const {
    const std::size_t head = query_head / sizes.group;
    return reference::window_attention(
        [&](std::size_t row, std::size_t dim) { return key(head, row, dim); },
        [&](std::size_t i, std::size_t dim) { return query(query_head, i, dim); }, sizes.rows,
        sizes.observed(), shape.head_dim, scale());
  }

  struct Scores {
    std::vector<double> values;  // [evictable token]
    double relative_tolerance = 0.0;
  };

  Scores scores() const {
    std::vector<std::vector<double>> sums;
    double mass = 0.0;
    for (std::size_t i = 0; i < sizes.heads_per_layer; ++i) {
      const WindowAttention seen = attention(ranking[0][i]);
      sums.push_back(window_sums(seen.weights));
      mass = std::max(mass, seen.largest_logit_mass);
    }
    return {layer_scores(sums, sizes.pool, sizes.pool_width),
            score_tolerance(shape.head_dim, sizes.rows, sizes.observed(), sizes.pool_width,
                            sizes.heads_per_layer, mass)};
  }

  static SemanticPlan plan_of(const LayerCase& c, const ModelShape& model,
                              std::vector<std::vector<std::uint32_t>> heads) {
    return {model,
            score::SemanticRetrieval{HeadRanking{std::move(heads)},
                                     {.heads_per_layer = c.heads_per_layer,
                                      .window = c.window,
                                      .pool = c.pool,
                                      .pool_width = c.pool_width}},
            select::SharedTopK{}, budget::Uniform{Budget::tokens_per_layer(c.capacity)}};
  }

 private:
  Layer(const LayerCase& c, Random random)
      : sizes(c),
        shape{.layers = 1, .query_heads = c.query_heads(), .kv_heads = c.kv_heads, .head_dim = c.head_dim},
        cache({.kv_heads = c.kv_heads,
               .rows = c.rows,
               .head_dim = c.head_dim,
               .allocated_rows = c.rows + c.extra_rows},
              c.arrangement),
        ranking{shuffled_heads(c.query_heads(), random)},
        plan(plan_of(c, shape, ranking)) {
    // Logits of standard deviation 1.5 and more: sharp enough to have winners, flat enough to have all.
    cache.fill(random, 1.5F);
    queries.resize(shape.query_heads * shown() * shape.head_dim);
    for (T& element : queries) {
      element = static_cast<T>(random.gaussian());
    }
  }

  static std::vector<std::uint32_t> shuffled_heads(std::size_t count, Random& random) {
    std::vector<std::uint32_t> heads;
    for (std::uint32_t head = 0; head < count; ++head) {
      heads.insert(heads.begin() + static_cast<std::ptrdiff_t>(random.below(heads.size() + 1)), head);
    }
    return heads;
  }
};

}  // namespace compresskv::reference
