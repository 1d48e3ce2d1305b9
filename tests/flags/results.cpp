// One line a result: its name and a hash of its bits. Built with many compilers and flags, all must print the
// same; tests/flags/compare.cmake compares them. Inputs are made of integers, so that no flag reaches them.
#include <array>
#include <bit>
#include <compresskv/calibrate/eviction_error_accumulator.hpp>
#include <compresskv/calibrate/head_score_accumulator.hpp>
#include <compresskv/calibrate/query_statistics_accumulator.hpp>
#include <compresskv/compresskv.hpp>
#include <compresskv/kernel/decode_attention.hpp>
#include <compresskv/kernel/rotary.hpp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace ckv = compresskv;

namespace {

constexpr std::size_t query_heads = 6;
constexpr std::size_t kv_heads = 2;
constexpr std::size_t layers = 2;
constexpr std::size_t queries = 8;

class Hash {
 public:
  template <class T>
  void add(std::span<const T> values) {
    for (const T& value : values) {
      std::array<unsigned char, sizeof(T)> bytes;
      std::memcpy(bytes.data(), &value, sizeof(T));
      for (const unsigned char byte : bytes) {
        state_ = (state_ ^ byte) * 1099511628211U;
      }
    }
  }
  void print(const std::string& name) const {
    std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(state_));
  }

 private:
  std::uint64_t state_ = 1469598103934665603U;
};

/// Numbers between -2 and 2 by their bits, times 2^`power`; as `T` where that is shorter.
template <class T>
std::vector<T> numbers(std::size_t count, std::uint64_t seed, int power = 0) {
  std::vector<T> values(count);
  for (T& value : values) {
    seed = seed * 6364136223846793005U + 1442695040888963407U;
    const auto random = static_cast<std::uint32_t>(seed >> 32U);
    const auto exponent = static_cast<std::uint32_t>(static_cast<int>(124U + random % 4U) + power);
    const std::uint32_t bits = (random & 0x80000000U) | exponent << 23U | (random >> 3U & 0x7FFFFFU);
    if constexpr (std::is_same_v<T, float>) {
      value = std::bit_cast<float>(bits);
    } else if constexpr (std::is_same_v<T, ckv::bfloat16>) {
      value = std::bit_cast<T>(static_cast<std::uint16_t>(bits >> 16U));
    } else {
      value = std::bit_cast<T>(static_cast<std::uint16_t>((random & 0x8000U) | (exponent - 112U) << 10U |
                                                          (random >> 3U & 0x3FFU)));
    }
  }
  return values;
}

struct Case {
  const char* name;
  std::size_t rows;
  std::size_t head_dim;
  float scale = 0.0F;
  float soft_cap = 0.0F;
  std::size_t sliding_window = 0;
  bool sinks = false;
  int power = 0;  // of the keys
};

// A scale of 8 makes weights that are denormal; keys of 2^-140 are denormal themselves.
constexpr std::array cases{Case{"plain", 1100, 64}, Case{"odd", 77, 30}, Case{"sharp", 300, 64, 8.0F},
                           Case{"all", 333, 16, 0.25F, 3.0F, 200, true},
                           Case{"tiny", 60, 16, 0.25F, 0.0F, 0, false, -124}};

template <class Scorer, class Selector, class Kv, class Observed>
void score(const std::string& name, const Scorer& scorer, const Selector& selector,
           const ckv::ModelShape& shape, std::size_t rows, const Kv& kv, const Observed& observed) {
  const ckv::Plan plan{shape, scorer, selector,
                       ckv::budget::Uniform{ckv::Budget::tokens_per_layer(rows / 3)}};
  ckv::Compressor compressor{plan};
  compressor.begin(rows);
  const auto scores = compressor.score(0, kv, observed);
  Hash hash;
  hash.add(std::span<const float>(scores.values()));
  const ckv::Selection& kept = compressor.select(0, scores);
  for (std::size_t list = 0; list < kept.lists(); ++list) {
    hash.add(kept.rows(list));
  }
  hash.print(name);
}

ckv::HeadScores head_scores() {
  std::vector<std::vector<double>> runs;
  for (std::size_t i = 0; i < layers * query_heads; ++i) {
    const std::vector<float> own = numbers<float>(7, i);
    runs.emplace_back(own.begin(), own.end());
  }
  return ckv::HeadScores(layers, query_heads, std::move(runs));
}

/// Of a few queries a head, as an engine would measure them.
ckv::QueryStatistics query_statistics(const ckv::ModelShape& shape) {
  ckv::calibrate::QueryStatisticsAccumulator accumulator(shape.layers, shape.query_heads, shape.head_dim,
                                                         {.base = 5000.0, .position_scale = 0.5});
  for (std::size_t i = 0; i < shape.layers * shape.query_heads * 3; ++i) {
    accumulator.add_rotated(i / 3 / shape.query_heads, i / 3 % shape.query_heads,
                            numbers<float>(shape.head_dim, 50 + i), 100 * i);
  }
  return accumulator.statistics();
}

template <class T>
void all_methods(const std::string& prefix, const Case& c) {
  const std::vector<T> keys =
      numbers<T>(kv_heads * c.rows * c.head_dim, 1, std::is_same_v<T, float> ? c.power : 0);
  std::vector<T> values = numbers<T>(keys.size(), 2);
  const std::vector<T> asked = numbers<T>(query_heads * c.rows * c.head_dim, 3);
  const std::vector<float> sinks = numbers<float>(query_heads, 4);
  const ckv::ModelShape shape{
      .layers = layers, .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = c.head_dim};
  std::vector<T> own = keys;
  const ckv::StridedKv kv{own.data(), values.data(),
                          ckv::KvShape{.kv_heads = kv_heads, .rows = c.rows, .head_dim = c.head_dim},
                          ckv::layout::head_token_dim};
  ckv::QueryShape query_shape{.query_heads = query_heads,
                              .queries = c.rows,
                              .head_dim = c.head_dim,
                              .scale = c.scale,
                              .soft_cap = c.soft_cap,
                              .sliding_window = c.sliding_window};
  if (c.sinks) {
    query_shape.sinks = sinks;
  }
  const ckv::QueryWindow window{asked.data(), query_shape};
  const ckv::HeadScores heads = head_scores();
  const ckv::select::SharedTopK shared;
  const ckv::select::GroupedTopK grouped;
  const auto run = [&](const char* name, const auto& scorer, const auto& selector) {
    score(prefix + " " + name, scorer, selector, shape, c.rows, kv, window);
  };
  run("compresskv", ckv::score::SemanticRetrieval{heads, {}}, shared);
  run("grouped", ckv::score::GroupedRetrieval{heads, {.pool = ckv::kernel::Pool::max}}, grouped);
  run("snapkv", ckv::score::SnapKv{{.pool_width = 3}}, ckv::select::Adaptive{});
  run("keydiff", ckv::score::KeyDiff{}, grouped);
  run("knorm", ckv::score::Knorm{}, grouped);
  run("rkv", ckv::score::RKv{}, grouped);
  run("cake", ckv::score::Cake{}, grouped);
  run("lagkv", ckv::score::LagKv{{.lag = 8, .ranked = false}}, grouped);
  run("lagkv by ranks", ckv::score::LagKv{{.lag = 8}}, grouped);
  run("cur", ckv::score::Cur{}, grouped);
  run("chunkkv", ckv::score::ChunkKv{ckv::score::SnapKv{}}, grouped);
  constexpr std::size_t hidden = 20;
  const std::vector<float> outputs = numbers<float>(hidden * query_heads * c.head_dim, 9);
  const ckv::OutputWeights weights(std::vector<const float*>(layers, outputs.data()),
                                   {.hidden = hidden, .query_heads = query_heads, .head_dim = c.head_dim});
  run("criticalkv", ckv::score::CriticalKv{ckv::score::SnapKv{}, weights}, grouped);
  run("means of heads", ckv::score::HeadMean{ckv::score::Knorm{}}, shared);
  const ckv::QueryStatistics statistics = query_statistics(shape);
  run("expected attention", ckv::score::ExpectedAttention{statistics}, grouped);
  run("q-filter", ckv::score::QFilter{statistics}, grouped);
  run("triattention", ckv::score::TriAttention{statistics, {.normalise = true}}, grouped);
  if constexpr (std::is_same_v<T, float>) {
    run("h2o", ckv::score::H2O{}, grouped);
    run("tova", ckv::score::Tova{}, shared);
    run("random", ckv::score::Random{}, grouped);
    run("carried", ckv::score::Carried{heads, {}}, shared);

    // One query at a time.
    std::vector<float> scratch(2 * ckv::kernel::round_up_to_lanes(c.head_dim));
    std::vector<float> attention(c.rows);
    std::vector<float> out(c.head_dim);
    ckv::kernel::decode_attention(kv, 1, asked.data(), 0.125F, scratch, attention, out.data());
    Hash decoded;
    decoded.add(std::span<const float>(attention));
    decoded.add(std::span<const float>(out));
    decoded.print(prefix + " decode");

    // What CAKE's budgets go by: logarithms of all weights.
    const std::vector<std::size_t> rows(kv_heads, c.rows);
    const ckv::Retained whole;
    const ckv::kernel::LayerInput<ckv::StridedKv<T>, ckv::QueryWindow<T>> input{
        .shape = shape, .rows = rows, .window = queries, .retained = whole, .kv = kv, .observation = window};
    ckv::Workspace workspace;
    ckv::SerialExecutor executor;
    Hash preference;
    preference.add(std::span<const double>(
        std::array{ckv::budget::Cake{ckv::Budget::tokens_per_layer(8), {.tau1 = 1.6, .tau2 = 0.4}}.preference(
            input, workspace, executor)}));
    preference.print(prefix + " preference");

    ckv::calibrate::HeadScoreAccumulator found(1, query_heads);
    const std::vector<ckv::calibrate::TokenId> prompt(c.rows, 5);
    found.begin_run(prompt, {.first = 3, .last = 11});
    found.add_queries(0, kv, window);
    found.add_token(5);
    found.end_run(true);
    Hash retrieval;
    retrieval.add(std::span<const double>(found.runs().at(0).once_per_occurrence));
    retrieval.print(prefix + " retrieval");
  }
  Hash rotated;
  std::vector<float> buffer(c.head_dim);
  for (std::size_t row = 0; row < 8; ++row) {
    ckv::kernel::rotate_row(kv.key_run(0, 0), row, c.head_dim, ckv::kernel::Rotary{},
                            -3.0 - 17.0 * static_cast<double>(row), buffer.data());
  }
  rotated.add(std::span<const T>(own));
  rotated.print(prefix + " rotated");
}

void matrix(const std::string& prefix) {
  constexpr std::size_t tokens = 90;
  std::vector<float> weights = numbers<float>(query_heads * queries * tokens, 6, -7);
  for (float& weight : weights) {
    weight = std::bit_cast<float>(std::bit_cast<std::uint32_t>(weight) & 0x7FFFFFFFU);
  }
  const ckv::AttentionMatrix given{weights.data(), ckv::AttentionShape{query_heads, queries, tokens}};
  const ckv::ModelShape shape{
      .layers = layers, .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = 8};
  const ckv::Plan plan{shape, ckv::score::Cake{}, ckv::select::Adaptive{},
                       ckv::budget::Uniform{ckv::Budget::tokens_per_layer(20)}};
  ckv::Compressor compressor{plan};
  compressor.begin(tokens);
  Hash hash;
  hash.add(std::span<const float>(compressor.score(0, given).values()));
  hash.print(prefix + " matrix");
}

/// Errors and shares of 2^`power`.
void budgets(int power) {
  constexpr std::size_t count = 33;
  std::vector<double> errors;
  for (const float error : numbers<float>(count, 9)) {
    const std::uint64_t up = static_cast<std::uint64_t>(static_cast<std::int64_t>(power)) << 52U;
    errors.push_back(
        std::bit_cast<double>((std::bit_cast<std::uint64_t>(static_cast<double>(error)) << 1U >> 1U) + up));
  }
  const ckv::LayerErrors found(
      {{.name = "a", .errors = errors}, {.name = "b", .errors = std::vector<double>(count, 1.0)}});
  Hash hash;
  hash.add(found.average());
  std::vector<std::size_t> capacities(count, 900);
  std::vector<std::size_t> most(count);
  const std::vector<std::size_t> least(count, 8);
  const ckv::budget::Allowance allowance{.per_layer = 211, .window = 8, .tokens = 1000};
  const ckv::Budget budget = ckv::Budget::kept_ratio(0.29);
  hash.add(
      std::span<const std::size_t>(std::array{budget.resolve(100, 8, {}), budget.resolve(12345, 8, {})}));
  ckv::budget::Cake{budget}.cascade(errors, least, 211 * count, capacities, most);
  hash.add(std::span<const std::size_t>(capacities));
  ckv::budget::ErrorAware{found, budget}.allocate(allowance, capacities);
  hash.add(std::span<const std::size_t>(capacities));
  ckv::budget::Pyramid{budget, {.beta = 7.3}}.allocate(allowance, capacities);
  hash.add(std::span<const std::size_t>(capacities));
  ckv::calibrate::EvictionErrorAccumulator measured(1);
  measured.begin_run("a", 0);
  measured.add(0, numbers<float>(1000, 11), numbers<float>(1000, 12));
  measured.end_run();
  hash.add(std::span<const double>(measured.step_errors()));
  hash.print("budgets " + std::to_string(power));
}

}  // namespace

int main() {
  for (const ckv::kernel::CodePath path : ckv::kernel::all_code_paths) {
    if (path == ckv::kernel::CodePath::avx512_bf16 || !ckv::kernel::supported(path)) {
      continue;  // the former has bits of its own
    }
    ckv::kernel::force_code_path(path);
    const std::string name(ckv::kernel::name(path));
    for (const Case& c : cases) {
      all_methods<float>(name + " float " + c.name, c);
      if (c.scale != 8.0F && c.power == 0) {
        all_methods<ckv::half>(name + " half " + c.name, c);
        all_methods<ckv::bfloat16>(name + " bfloat16 " + c.name, c);
      }
    }
    matrix(name);
  }
  for (const int power : {0, -900, -1020, 1000, 1021}) {
    budgets(power);
  }
}
