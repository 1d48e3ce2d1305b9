// The same model, prompt and method in libllama and on our own engine: the same tokens stay.

#include <gtest/gtest.h>

#include <algorithm>
#include <compresskv/core/budget.hpp>
#include <compresskv/io/calibration_files.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "ckv/method.hpp"
#include "ckv/model_fixture.hpp"
#include "ckv/run.hpp"
#include "ckv/runs.hpp"
#include "llama_fixture.hpp"

namespace adapt_test {
namespace {

using compresskv::Budget;
using llama_cpp::Observer;
using llama_cpp::Sequence;
using Kept = std::vector<std::vector<std::vector<std::uint32_t>>>;  // [layer][list][row]

constexpr std::size_t window = 16;
constexpr std::size_t prompts = 10;

class AgainstOwnEngine : public ckv_test::Needles {
 protected:
  /// Prompts of some 500 tokens: each a passage of the haystack with a needle and its question.
  std::vector<std::vector<llama_token>> texts() const {
    std::vector<std::vector<llama_token>> all;
    for (std::size_t i = 0; i < prompts; ++i) {
      const ckv::NeedlePrompt needle = ckv::needle_prompt(
          ckv_test::model(), *haystack_, ckv_test::evaluation_needles[i],
          {.tokens = 500, .depth = 0.1 * static_cast<double>(i), .start = 0.08 * static_cast<double>(i)});
      all.emplace_back(needle.tokens.begin(), needle.tokens.end());
    }
    return all;
  }
};

Kept kept_by(const Sequence& sequence) {
  Kept kept(sequence.plan().shape().layers);
  for (std::size_t layer = 0; layer < kept.size(); ++layer) {
    const compresskv::Retained& retained = sequence.compressor().retained(layer);
    for (std::size_t list = 0; list < retained.lists(); ++list) {
      const auto& positions = retained.positions(list);
      kept[layer].emplace_back(positions.begin(), positions.end());
    }
  }
  return kept;
}

/// Positions that both keep, over those that either keeps, of all layers and heads.
double jaccard(const Kept& a, const Kept& b) {
  std::size_t both = 0;
  std::size_t either = 0;
  for (std::size_t layer = 0; layer < a.size(); ++layer) {
    EXPECT_EQ(a[layer].size(), b[layer].size());
    for (std::size_t list = 0; list < (std::min)(a[layer].size(), b[layer].size()); ++list) {
      std::vector<std::uint32_t> shared;
      std::ranges::set_intersection(a[layer][list], b[layer][list], std::back_inserter(shared));
      both += shared.size();
      either += a[layer][list].size() + b[layer][list].size() - shared.size();
    }
  }
  return static_cast<double>(both) / static_cast<double>(either);
}

TEST_F(AgainstOwnEngine, KeepsTheSameTokens) {
  const ModelShape shape = llama_cpp::model_shape(model(), GGML_TYPE_F32, GGML_TYPE_F32);
  Observer observer{shape, window};
  const auto all = texts();
  for (const auto& [name, method] :
       {std::pair{"compresskv", ckv::Method::compresskv}, std::pair{"snapkv", ckv::Method::snapkv},
        std::pair{"model-wide", ckv::Method::model_wide}}) {
    for (const bool flash_attention : {false, true}) {
      const Context context = make_context(model(), &observer,
                                           {.cells = 1024,
                                            .flash_attention = flash_attention,
                                            .type_k = GGML_TYPE_F32,
                                            .type_v = GGML_TYPE_F32});
      const ckv::Compression how{.method = method,
                                 .budget = Budget::kept_ratio(0.12),
                                 .heads = compresskv::io::load_head_ranking(calibration("_head_idx.json")),
                                 .scores = compresskv::io::load_head_scores(calibration("_head_scores.json")),
                                 .window = window};
      double least = 1.0;
      for (std::size_t i = 0; i < all.size(); ++i) {
        const ckv::RunResult own = ckv::run(ckv_test::model(), all[i], how, {.max_new_tokens = 1});
        Sequence sequence{
            AnyPlan(shape, name,
                    {.budget = *how.budget, .heads = how.heads, .scores = how.scores, .window = window}),
            observer,
            {.context = context.get()}};
        sequence.read(all[i]);
        sequence.compress();
        const double same = jaccard(kept_by(sequence), own.kept);
        least = (std::min)(least, same);
        EXPECT_GE(same, 0.99) << name << ", prompt " << i << ", flash attention " << flash_attention;
        llama_memory_seq_rm(llama_get_memory(context.get()), 0, -1, -1);
      }
      std::printf("  %s, flash attention %s: Jaccard of what is kept at least %.4f over %zu prompts\n", name,
                  flash_attention ? "on" : "off", least, all.size());
    }
  }
}

}  // namespace
}  // namespace adapt_test
