// Other families of models than the real one's, made tiny: which are compressed, and which are refused by
// name. And any further model that COMPRESSKV_TEST_MODEL_2 names.

#include <gtest/gtest.h>

#include <compresskv/adapt/llama_cpp.hpp>
#include <compresskv/core/error.hpp>
#include <initializer_list>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "any_model.hpp"
#include "llama_fixture.hpp"
#include "message_of.hpp"
#include "tiny_model.hpp"

namespace adapt_test {
namespace {

using compresskv::ArgumentError;
using compresskv::test::message_of;
using compresskv::test::says;

struct Family {
  std::string name;
  Tiny tiny;
};

void PrintTo(const Family& family, std::ostream* out) { *out << family.name; }

std::vector<Family> families() {
  return {
      {"biases", {.architecture = "qwen2"}},
      {"head_norms_heads_wider_than_the_model", {.architecture = "qwen3", .kv_heads = 1, .head_dim = 64}},
      {"experts",
       {.architecture = "qwen3moe",
        .counts = {{"expert_count", 4}, {"expert_used_count", 2}, {"expert_feed_forward_length", 64}}}},
      {"experts_llama", {.architecture = "llama", .counts = {{"expert_count", 4}, {"expert_used_count", 2}}}},
      {"tied_embeddings", {.architecture = "gemma", .head_dim = 64}},
      {"fused_qkv", {.architecture = "falcon"}},
      {"fused_qkv_part_of_the_head_is_rotated",
       {.architecture = "gptneox",
        .kv_heads = 4,
        .counts = {{"rope.dimension_count", 16}},
        .flags = {{"use_parallel_residual", true}}}},
      {"no_rotation", {.architecture = "gpt2", .kv_heads = 4}},
      {"a_norm_over_all_heads", {.architecture = "olmo2", .kv_heads = 4}},
      {"scale_of_its_own",
       {.architecture = "granite", .numbers = {{"attention.scale", 0.3F}, {"logit_scale", 1.0F}}}},
      {"rotation_of_neighbours", {.architecture = "command-r", .numbers = {{"logit_scale", 1.0F}}}},
      {"phi3", {.architecture = "phi3"}},
      {"starcoder2", {.architecture = "starcoder2"}},
      {"gemma3_without_windows", {.architecture = "gemma3", .head_dim = 64}},
  };
}

class LlamaCppFamily : public testing::TestWithParam<Family> {};

TEST_P(LlamaCppFamily, NothingIsLostWhereAllIsKept) {
  const Model model = make(GetParam().tiny);
  for (const bool flash_attention : {true, false}) {
    expect_nothing_is_lost_where_all_is_kept(model.get(), {.flash_attention = flash_attention});
  }
  expect_nothing_is_lost_where_all_is_kept(model.get(), {.type_k = GGML_TYPE_Q8_0, .type_v = GGML_TYPE_Q8_0});
}

TEST_P(LlamaCppFamily, ObservedQueriesAreTheGraphs) {
  const Model model = make(GetParam().tiny);
  expect_observed_queries_are_the_graphs(model.get(), GGML_TYPE_F32, {});
}

TEST_P(LlamaCppFamily, DecodingSeesWhatIsKept) {
  const Model model = make(GetParam().tiny);
  for (const bool flash_attention : {true, false}) {
    expect_decoding_sees_what_is_kept(model.get(), {.flash_attention = flash_attention});
  }
}

TEST_P(LlamaCppFamily, MethodsGoOn) {
  const Model model = make(GetParam().tiny);
  expect_methods_go_on(model.get(), {});
}

INSTANTIATE_TEST_SUITE_P(Tiny, LlamaCppFamily, testing::ValuesIn(families()),
                         [](const auto& test) { return test.param.name; });

// ---- quantised keys, which libllama rotates by a Hadamard matrix where it divides the head ----

TEST(LlamaCppQuantisedKeys, MeetQueriesThatAreRotatedAlike) {
  for (const std::uint32_t head_dim : {64U, 32U}) {
    const Model model = make({.architecture = "qwen3", .head_dim = head_dim});
    expect_observed_queries_are_the_graphs(model.get(), GGML_TYPE_Q8_0, {.plain = 0.04});
    expect_observed_queries_are_the_graphs(model.get(), GGML_TYPE_Q4_0, {.plain = 0.04});
  }
}

TEST(LlamaCppQuantisedKeys, GoOn) {
  const Model model = make({.architecture = "qwen3", .head_dim = 64});
  for (const ggml_type type : {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    const ContextOptions options{.type_k = type, .type_v = type};
    expect_nothing_is_lost_where_all_is_kept(model.get(), options);
    expect_decoding_sees_what_is_kept(model.get(), options);
    expect_methods_go_on(model.get(), options);
  }
}

// ---- what is refused ----

struct Refused {
  std::string name;
  Tiny tiny;
  std::vector<std::string> says;
};

void PrintTo(const Refused& refused, std::ostream* out) { *out << refused.name; }

class LlamaCppRefuses : public testing::TestWithParam<Refused> {};

TEST_P(LlamaCppRefuses, ByName) {
  const Model model = make(GetParam().tiny);
  const std::string message = message_of<ArgumentError>([&] { llama_cpp::model_shape(model.get()); });
  for (const std::string& part : GetParam().says) {
    EXPECT_TRUE(says(message, {part}));
  }
}

std::vector<Refused> refused() {
  const std::vector<std::pair<std::string, std::uint32_t>> recurrent = {{"ssm.conv_kernel", 4},
                                                                        {"ssm.inner_size", 256},
                                                                        {"ssm.state_size", 16},
                                                                        {"ssm.time_step_rank", 8},
                                                                        {"ssm.group_count", 1}};
  return {
      {"recurrent", {.architecture = "mamba", .counts = recurrent}, {"recurrent layers"}},
      {"hybrid", {.architecture = "falcon-h1", .counts = recurrent}, {"recurrent layers"}},
      {"alibi_of_the_family", {.architecture = "bloom", .kv_heads = 4}, {"ALiBi"}},
      {"alibi_of_the_metadata",
       {.architecture = "mpt", .kv_heads = 4, .numbers = {{"attention.max_alibi_bias", 8.0F}}},
       {"ALiBi"}},
      {"mla",
       {.architecture = "deepseek2",
        .kv_heads = 1,
        .head_dim = 576,
        .counts = {{"attention.value_length", 512},
                   {"attention.key_length_mla", 192},
                   {"attention.value_length_mla", 128},
                   {"attention.q_lora_rank", 64},
                   {"attention.kv_lora_rank", 512},
                   {"rope.dimension_count", 64},
                   {"leading_dense_block_count", 3},
                   {"expert_count", 2},
                   {"expert_used_count", 1},
                   {"expert_shared_count", 1},
                   {"expert_feed_forward_length", 64}}},
       {"keys have 576 elements a head", "values 512", "MLA"}},
      {"m_rope",
       {.architecture = "qwen2vl", .lists = {{"rope.dimension_sections", {4, 6, 6, 0}}}},
       {"M-RoPE"}},
  };
}

INSTANTIATE_TEST_SUITE_P(Tiny, LlamaCppRefuses, testing::ValuesIn(refused()),
                         [](const auto& test) { return test.param.name; });

TEST(LlamaCppObserver, RefusesAlibiThatOnlyTheGraphShows) {
  const Model model = make({.architecture = "bloom", .kv_heads = 4});
  const ModelShape shape{.layers = 3, .query_heads = 4, .kv_heads = 4, .head_dim = 32};
  for (const bool flash_attention : {true, false}) {
    llama_cpp::Observer observer{shape, window};
    const Context context = make_context(model.get(), &observer, {.flash_attention = flash_attention});
    std::vector<llama_token> tokens = prompt_of(model.get());
    EXPECT_TRUE(says(message_of<ArgumentError>([&] {
                       observer.decode(context.get(), llama_batch_get_one(tokens.data(), prompt_tokens));
                     }),
                     {"ALiBi, max_bias 8", "not compressed here"}));
    EXPECT_EQ(observer.seen({.context = context.get()}, prompt_tokens), 0U);
  }
}

// ---- any further model ----

class LlamaCppSecondModel : public testing::Test {
 protected:
  void SetUp() override {
    if (model_path(variable).empty()) {
      GTEST_SKIP() << variable << " is not set: name any other .gguf file to try it";
    }
  }
  static llama_model* second() {
    static const Model loaded = load(model_path(variable));
    return loaded.get();
  }
  static constexpr const char* variable = "COMPRESSKV_TEST_MODEL_2";
};

TEST_F(LlamaCppSecondModel, NothingIsLostWhereAllIsKept) {
  expect_nothing_is_lost_where_all_is_kept(second(), {});
}

TEST_F(LlamaCppSecondModel, ObservedQueriesAreTheGraphs) {
  // Quantised weights, and many layers of them.
  expect_observed_queries_are_the_graphs(second(), GGML_TYPE_F32, {.plain = 0.05, .flash_attention = 0.5});
}

TEST_F(LlamaCppSecondModel, DecodingSeesWhatIsKept) { expect_decoding_sees_what_is_kept(second(), {}, 0.05); }

TEST_F(LlamaCppSecondModel, MethodsGoOn) { expect_methods_go_on(second(), {}); }

}  // namespace
}  // namespace adapt_test
