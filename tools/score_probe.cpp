// What tools/compare_kvpress.py asks of the library: scores, kept rows and budgets of a method on given
// tensors.
//
//   score_probe METHOD LAYERS QUERY_HEADS KV_HEADS TOKENS HEAD_DIM WINDOW CAPACITY KEYS QUERIES
//
// KEYS is a file of float32 [KV head][token][dim], QUERIES of [query head][token][dim], a query for every
// token. Prints a line "capacities", one "scores" a row of scores (evictable tokens), and one "rows" a KV
// head.
#include <compresskv/compresskv.hpp>
#include <compresskv/methods.hpp>
#include <cstddef>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
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

void run(const std::vector<std::string>& args) {
  if (args.size() != 10) {
    throw std::runtime_error("give ten arguments; see the head of score_probe.cpp");
  }
  const auto number = [&](std::size_t i) { return static_cast<std::size_t>(std::stoull(args[i])); };
  const ckv::ModelShape shape{
      .layers = number(1), .query_heads = number(2), .kv_heads = number(3), .head_dim = number(5)};
  const std::size_t tokens = number(4);
  std::vector<float> keys = floats_of(args[8], shape.kv_heads * tokens * shape.head_dim);
  const std::vector<float> queries = floats_of(args[9], shape.query_heads * tokens * shape.head_dim);
  const ckv::StridedKv<float> kv(
      keys.data(), keys.data(),
      ckv::KvShape{.kv_heads = shape.kv_heads, .rows = tokens, .head_dim = shape.head_dim},
      ckv::layout::head_token_dim);
  const ckv::QueryWindow<float> observation(
      queries.data(), {.query_heads = shape.query_heads, .queries = tokens, .head_dim = shape.head_dim});
  const ckv::MethodSettings settings{.budget = ckv::Budget::tokens_per_layer(number(7)), .window = number(6)};

  std::cout.precision(std::numeric_limits<float>::max_digits10);
  ckv::with_method(ckv::method_named(args[0]).method, settings,
                   [&](const auto& scorer, const auto& selector, const auto& allocator) {
                     constexpr ckv::Needs needs = std::remove_cvref_t<decltype(scorer)>::needs;
                     if constexpr (needs != ckv::Needs::repeats && needs != ckv::Needs::hidden_states) {
                       const ckv::Plan plan{shape, scorer, selector, allocator};
                       ckv::Compressor compressor{plan};
                       compressor.begin(tokens);
                       print("capacities", compressor.capacities());
                       const auto scores = compressor.score(0, kv, observation);
                       for (std::size_t row = 0; row < scores.rows(); ++row) {
                         print("scores", scores.row(row));
                       }
                       const ckv::Selection& selection = compressor.select(0, scores);
                       for (std::size_t head = 0; head < shape.kv_heads; ++head) {
                         print("rows", selection.rows(head));
                       }
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
