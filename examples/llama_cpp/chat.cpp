// A chat in llama.cpp whose cache never holds more than ROWS rows a layer when an answer begins:
//
//     llama_cpp_chat MODEL.gguf [ROWS] [METHOD]     # 256 rows, snapkv
//
// Each line is a message; "@FILE question" puts a file before the question.
#include <llama.h>

#include <algorithm>
#include <array>
#include <compresskv/adapt/llama_cpp.hpp>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace ckv = compresskv;

namespace {

struct Free {
  void operator()(llama_model* model) const { llama_model_free(model); }
  void operator()(llama_context* context) const { llama_free(context); }
};

std::vector<llama_token> tokens_of(const llama_vocab* vocab, const std::string& text) {
  const auto size = static_cast<std::int32_t>(text.size());
  std::vector<llama_token> tokens(text.size() + 1);
  tokens.resize(static_cast<std::size_t>(
      (std::max)(llama_tokenize(vocab, text.data(), size, tokens.data(), size + 1, false, true), 0)));
  return tokens;
}

/// The message as the model's template has it, ready for the answer.
std::string prompt_of(const llama_model* model, const std::string& message) {
  const llama_chat_message user{.role = "user", .content = message.c_str()};
  std::string text(message.size() + 1024, '\0');
  const std::int32_t size =
      llama_chat_apply_template(llama_model_chat_template(model, nullptr), &user, 1, true, text.data(),
                                static_cast<std::int32_t>(text.size()));
  text.resize(static_cast<std::size_t>((std::max)(size, 0)));
  return text;
}

std::string message_of(const std::string& line) {
  if (line.front() != '@') {
    return line;
  }
  const std::size_t space = (std::min)(line.find(' '), line.size());
  std::ostringstream text;
  text << std::ifstream(line.substr(1, space - 1)).rdbuf() << '\n' << line.substr(space);
  return text.str();
}

void chat(const char* path, std::size_t rows, const char* method) {
  const std::unique_ptr<llama_model, Free> model{
      llama_model_load_from_file(path, llama_model_default_params())};
  if (!model) throw std::runtime_error(std::string("cannot load ") + path);

  // 1. What to do: once a model. Methods with retrieval heads want `heads`: see ckv calibrate.
  const ckv::AnyPlan plan{
      ckv::llama_cpp::model_shape(model.get()), method, {.budget = ckv::Budget::tokens_per_layer(rows)}};
  // 2. Who looks at the queries: before the context is made, and as long as it lives.
  ckv::llama_cpp::Observer observer{plan.shape(), plan.window()};
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 8192;
  observer.attach(params);
  const std::unique_ptr<llama_context, Free> context{llama_init_from_model(model.get(), params)};
  if (!context) throw std::runtime_error("cannot make a context");
  // 3. One a sequence.
  ckv::llama_cpp::Sequence sequence{plan, observer, {.context = context.get()}};

  const llama_vocab* vocab = llama_model_get_vocab(model.get());
  const std::unique_ptr<llama_sampler, void (*)(llama_sampler*)> sampler{llama_sampler_init_greedy(),
                                                                         llama_sampler_free};
  for (std::string line; std::printf("> ") > 0 && std::fflush(stdout) == 0 && std::getline(std::cin, line);) {
    if (line.empty()) continue;
    // 4. The turn is read, then the cache shrinks. The logits of its last token are still there.
    sequence.read(tokens_of(vocab, prompt_of(model.get(), message_of(line))));
    llama_token token = llama_sampler_sample(sampler.get(), context.get(), -1);
    const ckv::llama_cpp::Compressed done = sequence.compress();
    std::printf("[%zu rows, %.1f MiB; were %zu, %.1f MiB]\n", done.rows_after,
                static_cast<double>(done.bytes_after) / 1048576, done.rows_before,
                static_cast<double>(done.bytes_before) / 1048576);
    // 5. From here on it is llama.cpp as ever. The end token stays in the cache, for the next turn.
    for (int length = 0; length < 400; ++length) {
      std::array<char, 256> piece{};
      const bool ends = llama_vocab_is_eog(vocab, token);
      const std::int32_t size = llama_token_to_piece(vocab, token, piece.data(), 256, 0, false);
      std::printf("%.*s", ends ? 0 : size, piece.data());
      std::fflush(stdout);
      if (llama_decode(context.get(), llama_batch_get_one(&token, 1)) != 0 || ends) break;
      token = llama_sampler_sample(sampler.get(), context.get(), -1);
    }
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s MODEL.gguf [ROWS] [METHOD]\n", argv[0]);
    return 2;
  }
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  chat(argv[1], argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 256, argc > 3 ? argv[3] : "snapkv");
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
