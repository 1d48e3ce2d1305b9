// Calibrates an engine of your own: which heads retrieve, and what evicting from each layer costs.
//
//     find_heads       one needle prompt: the attention of each decode step, and the token that it gave
//     measure_errors   one prompt: each layer's output from the full cache and from a compressed one
//     share_out        two workers share the prompts and merge: the same to the last bit as one worker
//     main             saves the files, loads them and makes a plan of them
//
// are what to copy; toy_engine.hpp stands for the engine, and its right calibration is known.
//
//     calibrate_your_engine [FOLDER]    # writes toy_head_idx.json, toy_head_scores.json,
//     toy_layer_score.jsonl

#include <compresskv/calibrate/eviction_error_accumulator.hpp>
#include <compresskv/calibrate/head_score_accumulator.hpp>
#include <compresskv/calibrate/rouge1_recall.hpp>
#include <compresskv/compresskv.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <cstdio>
#include <filesystem>
#include <future>

#include "toy_engine.hpp"

namespace ckv = compresskv;
using ckv::calibrate::EvictionErrorAccumulator, ckv::calibrate::HeadScoreAccumulator;

ckv::QueryWindow<float> last_query(const Row& queries) {
  return {queries.data(), {.query_heads = model.query_heads, .queries = 1, .head_dim = model.head_dim}};
}

void find_heads(std::size_t number, HeadScoreAccumulator& heads) {
  const Prompt prompt = prompt_of(number);
  std::vector<Cache> caches = prefill(prompt);
  heads.begin_run(number, prompt.tokens, prompt.answer);
  for (const TokenId token : prompt.reply) {
    for (std::size_t layer = 0; layer < model.layers; ++layer) {
      const Row queries = queries_of(layer, token);
      // An engine that has attention rows gives those: heads.add_attention(layer, head, row) for every head.
      heads.add_queries(layer, caches[layer].view(), last_query(queries));
      caches[layer].append(token);
    }
    heads.add_token(token);
  }
  heads.end_run(ckv::calibrate::answered(text_of(prompt.reply), text_of(prompt.needle)));
}

template <class Plan>
void measure_errors(std::size_t number, const Plan& plan, EvictionErrorAccumulator& errors) {
  const Prompt prompt = prompt_of(number);
  std::vector<Cache> full = prefill(prompt), compressed = full;
  ckv::Compressor compressor{plan};
  compressor.begin(prompt.tokens.size());
  for (std::size_t layer = 0; layer < model.layers; ++layer) {
    const Row queries = queries_of(layer, prompt.reply[0]);
    const auto& kept = compressor.compress(layer, compressed[layer].view(), last_query(queries));
    compressed[layer].shorten(kept.rows());
  }
  errors.begin_run("toy", number);
  for (const TokenId token : prompt.reply) {
    for (std::size_t layer = 0; layer < model.layers; ++layer) {
      const Row queries = queries_of(layer, token);  // of the full model: its output is what goes on
      errors.add(layer, attend(full[layer], queries), attend(compressed[layer], queries));
      full[layer].append(token);
      compressed[layer].append(token);
    }
  }
  errors.end_run();
}

constexpr std::size_t prompts = 8;

/// Processes do the same: each writes down its runs, and one takes them all with `add_run`.
template <class Accumulator, class Feed>
Accumulator share_out(Accumulator even, const Feed& feed) {
  auto odd = std::async(std::launch::async, [&feed, own = even]() mutable {
    for (std::size_t number = 1; number < prompts; number += 2) feed(number, own);
    return own;
  });
  for (std::size_t number = 0; number < prompts; number += 2) feed(number, even);
  even.merge(odd.get());
  return even;
}

int main(int argc, char** argv) {
  const std::filesystem::path folder = argc > 1 ? argv[1] : ".";
  const auto heads = share_out(HeadScoreAccumulator{model.layers, model.query_heads}, find_heads);
  ckv::io::save_head_scores(folder / "toy_head_scores.json", heads.scores());
  ckv::io::save_head_ranking(folder / "toy_head_idx.json", heads.scores().ranking());

  const ckv::score::SemanticRetrieval::Options options{.heads_per_layer = 1, .window = 1};  // often 4 and 8
  const ckv::Plan equal{model, ckv::score::SemanticRetrieval{heads.scores().ranking(), options},
                        ckv::select::SharedTopK{}, ckv::budget::Uniform{ckv::Budget::tokens_per_layer(32)}};
  const auto errors = share_out(EvictionErrorAccumulator{model.layers},
                                [&](std::size_t number, auto& own) { measure_errors(number, equal, own); });
  ckv::io::save_layer_errors(folder / "toy_layer_score.jsonl", errors.errors());

  // From here on as at every start of the engine.
  const ckv::HeadRanking ranking = ckv::io::load_head_ranking(folder / "toy_head_idx.json");
  const ckv::LayerErrors costs = ckv::io::load_layer_errors(folder / "toy_layer_score.jsonl");
  const ckv::Plan plan{model, ckv::score::SemanticRetrieval{ranking, options}, ckv::select::SharedTopK{},
                       ckv::budget::ErrorAware{costs, ckv::Budget::tokens_per_layer(64)}};
  ckv::Compressor compressor{plan};
  compressor.begin(1000);

  const auto classic = heads.scores(ckv::calibrate::HeadScoreKind::classic).ranking();
  bool as_planted = heads.counted_runs() == prompts - 1;
  std::printf("%zu of %zu prompts counted\n", heads.counted_runs(), heads.ended_runs());
  for (std::size_t layer = 0; layer < model.layers; ++layer) {
    std::printf("layer %zu: best head %u (classic score: %u), error %.3f, keeps %zu rows of 1000\n", layer,
                ranking.heads(layer)[0], classic.heads(layer)[0], costs.average()[layer],
                compressor.capacities()[layer]);
    as_planted = as_planted && ranking.heads(layer)[0] == whole_answer_head(layer) &&
                 classic.heads(layer)[0] == next_token_head(layer) &&
                 compressor.capacities()[layer] <= compressor.capacities().back();
  }
  std::puts(as_planted ? "as planted" : "not what was planted");
  return as_planted ? 0 : 1;
}
