// What tools/compare_kvpress.py asks of the library: scores, kept rows and budgets of a method on given
// tensors.
//
//   score_probe METHOD LAYERS QUERY_HEADS KV_HEADS TOKENS HEAD_DIM WINDOW CAPACITY LAG CHUNK FOLDER
//
// FOLDER holds files of float32: `keys` and `values`, [KV head][token][dim]; `queries`, [query
// head][token][dim], a query for every token; and `calibration`, as many queries before rotary embedding,
// whose statistics (but for the first 4 tokens) are those of the model. Prints a line "capacities", one
// "scores" a row of scores (evictable tokens), and one "rows" a KV head. Of a method that has the context
// repeated the last quarter of the tokens repeats the others.
#include <compresskv/calibrate/query_statistics_accumulator.hpp>
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

namespace ckv = compresskv;

std::vector<float> floats_of(const std::string& path, std::size_t count) {
  std::vector<float> values(count);
  std::ifstream file{path, std::ios::binary};
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(float)));
  if (!file || file.peek() != std::ifstream::traits_type::eof()) {
    throw std::runtime_error(path + " does not hold " + std::to_string(count) + " floats");
  }
  return values;
}

template <class Values>
void print(std::string_view name, const Values& values) {
  std::cout << name;
  for (const auto value : values) {
    std::cout << ' ' << value;
  }
  std::cout << '\n';
}

ckv::QueryStatistics statistics_of(const std::vector<float>& queries, const ckv::ModelShape& shape,
                                   std::size_t tokens) {
  ckv::calibrate::QueryStatisticsAccumulator accumulator(shape.layers, shape.query_heads, shape.head_dim, {});
  for (std::size_t head = 0; head < shape.query_heads; ++head) {
    for (std::size_t t = 4; t < tokens; ++t) {
      accumulator.add_plain(0, head,
                            std::span(queries).subspan((head * tokens + t) * shape.head_dim, shape.head_dim));
    }
  }
  return accumulator.statistics();
}

/// What a plan makes of the tensors.
struct Probe {
  ckv::ModelShape shape;
  std::size_t tokens;
  std::vector<float> keys;
  std::vector<float> values;
  std::vector<float> queries;

  ckv::StridedKv<float> view(std::size_t rows) {
    return {
        keys.data(), values.data(),
        ckv::KvShape{
            .kv_heads = shape.kv_heads, .rows = rows, .head_dim = shape.head_dim, .allocated_rows = tokens},
        ckv::layout::head_token_dim};
  }
  ckv::QueryWindow<float> last(std::size_t count) const {
    return {queries.data() + (tokens - count) * shape.head_dim,
            {.query_heads = shape.query_heads, .queries = count, .head_dim = shape.head_dim},
            {.head = tokens * shape.head_dim, .query = shape.head_dim}};
  }

  template <class P>
  void arrives(const P& plan) {
    ckv::Compressor compressor{plan};
    compressor.begin(tokens);
    print("capacities", compressor.capacities());
    const auto scores = compressor.score(0, view(tokens), last(tokens));
    for (std::size_t row = 0; row < scores.rows(); ++row) {
      print("scores", scores.row(row));
    }
    const ckv::Selection& selection = compressor.select(0, scores);
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      print("rows", selection.rows(head));
    }
  }

  template <class P>
  void repeats(const P& plan) {
    const std::size_t fed = tokens / 4;
    const std::size_t context = tokens - fed;
    ckv::Compressor compressor{plan};
    compressor.begin(context);
    print("capacities", compressor.capacities());
    compressor.observe(0, view(tokens), {.first = 0, .last = context}, last(fed));
    compressor.finish([&](std::size_t) { return view(context); });
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      print("rows", compressor.retained(0).positions(head));
    }
  }
};

void run(const std::vector<std::string>& args) {
  if (args.size() != 11) {
    throw std::runtime_error("give eleven arguments; see the head of score_probe.cpp");
  }
  const auto number = [&](std::size_t i) { return static_cast<std::size_t>(std::stoull(args[i])); };
  const ckv::ModelShape shape{
      .layers = number(1), .query_heads = number(2), .kv_heads = number(3), .head_dim = number(5)};
  const std::size_t tokens = number(4);
  const auto floats = [&](const char* name, std::size_t heads) {
    return floats_of(args[10] + "/" + name, heads * tokens * shape.head_dim);
  };
  Probe probe{.shape = shape,
              .tokens = tokens,
              .keys = floats("keys", shape.kv_heads),
              .values = floats("values", shape.kv_heads),
              .queries = floats("queries", shape.query_heads)};
  const ckv::MethodInfo& method = ckv::method_named(args[0]);
  ckv::MethodSettings settings{.budget = ckv::Budget::tokens_per_layer(number(7)),
                               .window = number(6),
                               .lag = number(8),
                               .chunk = number(9)};
  if (method.needs_statistics) {
    settings.statistics = statistics_of(floats("calibration", shape.query_heads), shape, tokens);
  }

  std::cout.precision(std::numeric_limits<float>::max_digits10);
  ckv::with_method(method.method, settings,
                   [&](const auto& scorer, const auto& selector, const auto& allocator) {
                     const ckv::Plan plan{shape, scorer, selector, allocator};
                     constexpr ckv::Needs needs = std::remove_cvref_t<decltype(scorer)>::needs;
                     if constexpr (needs == ckv::Needs::repeats) {
                       probe.repeats(plan);
                     } else if constexpr (needs != ckv::Needs::hidden_states) {
                       probe.arrives(plan);
                     }
                   });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "score_probe: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
