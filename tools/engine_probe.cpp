// What the comparison scripts in this folder ask of the engine: logits of given ids, decoding times.
//
//   engine_probe logits MODEL IDS OUT [THREADS] [KV_TYPE]   all logits of the ids as float32
//   [tokens][vocabulary] to OUT engine_probe prefill MODEL IDS THREADS REPEATS          milliseconds of each
//   prefill, one a line engine_probe decode MODEL IDS THREADS TOKENS            tokens a second of greedy
//   decoding after the ids
//
// IDS is a text file of token ids.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "engine/gguf.hpp"
#include "engine/model.hpp"
#include "engine/sequence.hpp"

namespace {

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

int run(const std::vector<std::string>& args) {
  if (args.size() < 4)
    throw engine::Error("give: logits|prefill|decode MODEL IDS ...; see the head of engine_probe.cpp");
  const auto argument = [&](std::size_t i, const char* otherwise) {
    return i < args.size() ? args[i] : otherwise;
  };
  const bool logits = args[0] == "logits";
  const int threads = std::stoi(argument(logits ? 4 : 3, "0"));
  std::ifstream file{args[2]};
  const std::vector<engine::TokenId> ids{std::istream_iterator<engine::TokenId>{file}, {}};

  const engine::Model model{engine::GgufFile::open(args[1]), {.threads = threads}};
  if (logits) {
    std::ofstream out{args[3], std::ios::binary};
    engine::Sequence sequence{model, {.kv_type = engine::parse_kv_type(argument(5, "f32"))}};
    sequence.prefill(ids, {.on_layer = {}, .on_logits = [&](std::size_t, const engine::Matrix& tile) {
                             out.write(reinterpret_cast<const char*>(tile.data()),
                                       static_cast<std::streamsize>(sizeof(float)) * tile.size());
                           }});
  } else if (args[0] == "prefill") {
    for (int i = 0; i < std::stoi(argument(4, "1")); ++i) {
      engine::Sequence sequence{model};
      const auto start = std::chrono::steady_clock::now();
      sequence.prefill(ids);
      fmt::print("{:.1f}\n", milliseconds_since(start));
    }
  } else if (args[0] == "decode") {
    engine::Sequence sequence{model};
    std::span<const float> last = sequence.prefill(ids);
    const int tokens = std::stoi(argument(4, "64"));
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < tokens; ++i) {
      const auto best = static_cast<engine::TokenId>(std::ranges::max_element(last) - last.begin());
      last = sequence.decode(best, sequence.next_position());
    }
    fmt::print("{:.2f}\n", 1000.0 * tokens / milliseconds_since(start));
  } else {
    throw engine::Error(fmt::format("\"{}\" is no command; give logits, prefill or decode", args[0]));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    fmt::print(stderr, "engine_probe: {}\n", error.what());
    return 1;
  }
}
