#include "model.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <numeric>
#include <thread>
#include <utility>

#include "../compress.hpp"
#include "../run.hpp"
#include "../terminal.hpp"
#include "attention.hpp"
#include "engine/error.hpp"
#include "engine/utf8.hpp"
#include "load.hpp"

namespace ckv {
namespace {

using compresskv::llama_cpp::Observer;
using compresskv::llama_cpp::Sequence;

ggml_type ggml_type_of(engine::KvType type) {
  switch (type) {
    case engine::KvType::f16:
      return GGML_TYPE_F16;
    case engine::KvType::bf16:
      return GGML_TYPE_BF16;
    case engine::KvType::f32:
      break;
  }
  return GGML_TYPE_F32;
}

int threads_of(int threads) {
  if (threads < 0 || threads > 1024) {
    throw engine::Error(
        fmt::format("threads is {}; give 1 to 1024, or 0 for as many as the machine has", threads));
  }
  return threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

/// Once a process: what libllama has to say is shown where it is an error.
void start_llama() {
  [[maybe_unused]] static const bool started = [] {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
          }
        },
        nullptr);
    llama_backend_init();
    return true;
  }();
}

/// libllama's own threads ask: here no exception may be thrown.
bool wants_end(void*) {
  try {
    check_interrupt();
    return false;
  } catch (...) {
    return true;
  }
}

void check_decoded(std::int32_t status, std::string_view what) {
  if (status != 0) {
    check_interrupt();
    throw engine::Error(
        fmt::format("{}: llama_decode gave {}{}", what, status, status == 1 ? ": no room in the cache" : ""));
  }
}

std::string trimmed(const std::string& text) {
  constexpr std::string_view white = " \t\r\n";
  const std::size_t first = text.find_first_not_of(white);
  return first == std::string::npos ? std::string()
                                    : text.substr(first, text.find_last_not_of(white) + 1 - first);
}

}  // namespace

LlamaModel::LlamaModel(const std::filesystem::path& path, int threads)
    : pool_(std::make_unique<engine::ThreadPool>(threads_of(threads))), path_(path.string()) {
  start_llama();
  model_.reset(llama_model_load_from_file(path_.c_str(), llama_model_default_params()));
  if (!model_) {
    throw engine::Error(
        fmt::format("{}: libllama cannot load it; give a GGUF file of a model that llama.cpp runs", path_));
  }
  if (const char* jinja = llama_model_chat_template(get(), nullptr)) {
    const auto text = [&](llama_token id) {
      return std::string(id == LLAMA_TOKEN_NULL ? "" : llama_vocab_get_text(vocabulary(), id));
    };
    try {
      template_.emplace(jinja, text(llama_vocab_bos(vocabulary())), text(llama_vocab_eos(vocabulary())));
      // What it does not have is found where it gets there.
      const engine::ChatMessage user{.role = "user", .content = "?"};
      template_->lay_out({&user, 1});
    } catch (const engine::Error& error) {
      template_.reset();
      why_not_own_template_ = error.what();
    }
  }
}

void LlamaModel::check_length(std::size_t tokens) const {
  if (tokens == 0) {
    throw engine::Error("the prompt has no tokens: give a text");
  }
  if (tokens > context()) {
    throw engine::Error(fmt::format("the prompt has {} tokens, but the model's context holds {}; shorten it",
                                    tokens, context()));
  }
}

std::size_t LlamaModel::layers() const {
  return static_cast<std::size_t>(llama_model_n_layer(get()) - llama_model_n_layer_nextn(get()));
}

std::size_t LlamaModel::context() const { return static_cast<std::size_t>(llama_model_n_ctx_train(get())); }

compresskv::ModelShape LlamaModel::shape(engine::KvType type) const {
  return compresskv::llama_cpp::model_shape(get(), ggml_type_of(type), ggml_type_of(type));
}

std::vector<std::size_t> LlamaModel::compressed_layers() const {
  if (compressed_.empty()) {
    Observer observer{shape(engine::KvType::f32), 1};
    if (llama_model_n_swa(get()) > 0) {
      // Only a graph shows which layers slide: that of one token will do.
      const LlamaContext context = make_context({.cells = 1, .batch = 1, .observer = &observer});
      llama_token token = 0;
      check_decoded(observer.decode(context.get(), llama_batch_get_one(&token, 1)), "a token");
    }
    const std::span<const std::size_t> layers = observer.global_layers(get());
    compressed_.assign(layers.begin(), layers.end());
  }
  return compressed_;
}

std::size_t LlamaModel::sliding_rows(std::size_t tokens) const {
  return std::min(tokens, static_cast<std::size_t>(llama_model_n_swa(get())));
}

engine::PromptText LlamaModel::lay_out(std::span<const engine::ChatMessage> messages) const {
  if (template_) {
    return template_->lay_out(messages);
  }
  engine::PromptText prompt = lay_out_by_list(messages);
  if (!std::exchange(said_, true)) {
    complain(fmt::format(
        "the chat is laid out by llama.cpp's list of templates, as the model's own is not understood: {}",
        why_not_own_template_));
  }
  return prompt;
}

engine::PromptText LlamaModel::lay_out_by_list(std::span<const engine::ChatMessage> messages) const {
  const char* chat = llama_model_chat_template(get(), nullptr);
  if (chat == nullptr) {
    throw engine::Error("the model has no chat template (tokenizer.chat_template); ask it with raw text");
  }
  // Laid out with words in the messages' places, so that it is known which bytes are the template's.
  std::vector<std::string> words;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    words.push_back(fmt::format(" message-{}-of-ckv ", i));
  }
  std::vector<llama_chat_message> placed;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    placed.push_back({.role = messages[i].role.c_str(), .content = words[i].c_str()});
  }
  constexpr std::int32_t most = 1 << 16;
  std::string text(most, '\0');
  const std::int32_t size =
      llama_chat_apply_template(chat, placed.data(), placed.size(), true, text.data(), most);
  text.resize(static_cast<std::size_t>(std::clamp(size, 0, most)));
  engine::PromptText prompt;
  // The templates of the list leave BOS to who cuts the text into tokens.
  if (const auto begin = bos(); begin && !text.starts_with(piece(*begin, true))) {
    prompt.append({piece(*begin, true), false});
  }
  std::size_t done = 0;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const bool trims = text.find(words[i], done) == std::string::npos;
    const std::string place = trims ? trimmed(words[i]) : words[i];
    const std::size_t at = text.find(place, done);
    if (at == std::string::npos) {
      throw engine::Error(
          fmt::format("the model's chat template is not understood ({}), and llama.cpp knows none like it "
                      "(llama_chat_apply_template); ask it with raw text",
                      why_not_own_template_));
    }
    prompt.append({std::string_view(text).substr(done, at - done), false});
    prompt.append({trims ? trimmed(messages[i].content) : messages[i].content, true});
    done = at + place.size();
  }
  prompt.append({std::string_view(text).substr(done), false});
  return prompt;
}

std::optional<TokenId> LlamaModel::bos() const {
  const llama_token id = llama_vocab_bos(vocabulary());
  return llama_vocab_get_add_bos(vocabulary()) && id != LLAMA_TOKEN_NULL ? std::optional<TokenId>(id)
                                                                         : std::nullopt;
}

std::vector<TokenId> LlamaModel::encode(std::string_view text, bool parse_special) const {
  const auto size = static_cast<std::int32_t>(text.size());
  std::vector<llama_token> tokens(text.size() + 8);
  const std::int32_t count = llama_tokenize(vocabulary(), text.data(), size, tokens.data(),
                                            static_cast<std::int32_t>(tokens.size()), false, parse_special);
  if (count < 0) {
    throw engine::Error("libllama cannot cut the text into tokens");
  }
  return {tokens.begin(), tokens.begin() + count};
}

std::vector<TokenId> LlamaModel::encode(const engine::PromptText& prompt) const {
  std::vector<std::pair<std::string, bool>> parts;  // text, whether it comes from outside
  for (std::size_t at = 0; at < prompt.size(); ++at) {
    if (parts.empty() || parts.back().second != prompt.is_outside(at)) {
      parts.emplace_back(std::string(), prompt.is_outside(at));
    }
    parts.back().first += prompt.text()[at];
  }
  const bool harmless = std::ranges::all_of(parts, [&](const auto& part) {
    return !part.second || encode(part.first, false) == encode(part.first, true);
  });
  std::vector<TokenId> tokens;
  if (harmless) {
    tokens = encode(prompt.text(), true);
  } else {
    // The message holds the text of special tokens, which it must not become.
    for (const auto& [text, outside] : parts) {
      const std::vector<TokenId> some = encode(text, !outside);
      tokens.insert(tokens.end(), some.begin(), some.end());
    }
  }
  return tokens;
}

std::string LlamaModel::piece(TokenId id, bool special) const {
  std::string text(64, '\0');
  const auto write = [&] {
    return llama_token_to_piece(vocabulary(), id, text.data(), static_cast<std::int32_t>(text.size()), 0,
                                special);
  };
  std::int32_t size = write();
  if (size < 0) {
    text.resize(static_cast<std::size_t>(-size));
    size = write();
  }
  text.resize(static_cast<std::size_t>(std::max(size, 0)));
  return text;
}

LlamaContext LlamaModel::make_context(const ContextOptions& options) const {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(options.cells);
  params.n_seq_max = options.sequences;
  params.kv_unified = true;
  params.n_batch = options.batch;
  params.n_ubatch = options.batch;
  params.type_k = ggml_type_of(options.type);
  params.type_v = ggml_type_of(options.type);
  params.n_threads = threads();
  params.n_threads_batch = threads();
  params.abort_callback = &wants_end;
  if (options.observer != nullptr) {
    options.observer->attach(params);
  }
  if (options.attention != nullptr) {
    options.attention->attach(params);
  }
  LlamaContext context{llama_init_from_model(get(), params)};
  if (!context) {
    throw engine::Error(fmt::format("libllama cannot make a context of {} cells in {}", options.cells,
                                    engine::kv_type_name(options.type)));
  }
  return context;
}

void LlamaModel::read(llama_context* context, Observer* observer, std::span<const TokenId> prompt,
                      const std::function<void(std::size_t)>& progress) const {
  std::vector<llama_token> tokens(prompt.begin(), prompt.end());
  const std::size_t most = llama_n_batch(context);
  for (std::size_t first = 0; first < tokens.size(); first += most) {
    const std::size_t count = std::min(most, tokens.size() - first);
    const llama_batch batch = llama_batch_get_one(tokens.data() + first, static_cast<std::int32_t>(count));
    check_decoded(observer != nullptr ? observer->decode(context, batch, tokens.size() - first - count)
                                      : llama_decode(context, batch),
                  "the prompt");
    progress(first + count);
    check_interrupt();
  }
  llama_synchronize(context);
}

std::span<const float> LlamaModel::decode(llama_context* context, TokenId token, Observer* observer) const {
  llama_token one = token;
  const llama_batch batch = llama_batch_get_one(&one, 1);
  check_decoded(observer != nullptr ? observer->decode(context, batch) : llama_decode(context, batch),
                "the answer");
  check_interrupt();
  return logits(context);
}

std::span<const float> LlamaModel::logits(llama_context* context) const {
  return {llama_get_logits_ith(context, -1), static_cast<std::size_t>(llama_vocab_n_tokens(vocabulary()))};
}

std::vector<std::vector<std::vector<std::uint32_t>>> kept_by(const Sequence& sequence) {
  std::vector<std::vector<std::vector<std::uint32_t>>> kept(sequence.compressor().plan().shape().layers);
  for (std::size_t layer = 0; layer < kept.size(); ++layer) {
    const compresskv::Retained& retained = sequence.compressor().retained(layer);
    for (std::size_t list = 0; list < retained.lists(); ++list) {
      const auto positions = retained.positions(list);
      kept[layer].emplace_back(positions.begin(), positions.end());
    }
  }
  return kept;
}

std::string LlamaText::push(TokenId id) {
  waiting_ += model_->piece(id, false);
  const std::size_t ready = waiting_.size() - engine::utf8::unfinished_suffix(waiting_);
  std::string out = waiting_.substr(0, ready);
  waiting_.erase(0, ready);
  return out;
}

std::string LlamaText::finish() { return std::exchange(waiting_, {}); }

RunResult LlamaModel::run(std::span<const TokenId> prompt, const Compression& how,
                          const RunOptions& options) const {
  check_length(prompt.size());
  RunResult result;
  const auto progress = [&](std::size_t tokens) {
    if (options.on_layer) {
      options.on_layer(layers() * tokens / prompt.size());
    }
  };
  // What observes outlives the contexts that it observes.
  std::optional<Observer> observer;
  LlamaContext context;
  engine::PoolExecutor pool = executor();
  std::optional<Sequence> sequence;  // none: the full cache
  std::vector<float> first_logits;
  std::size_t rows = prompt.size();
  const std::size_t every = how.method == Method::full ? 0 : options.decode_every;
  if (how.method == Method::full) {
    context = make_context({.type = options.kv_type, .cells = prompt.size() + options.max_new_tokens});
    const auto start = Clock::now();
    read(context.get(), nullptr, prompt, progress);
    result.prefill_ms = milliseconds_since(start);
    std::vector<std::uint32_t> all(prompt.size());
    std::iota(all.begin(), all.end(), 0U);
    result.kept.assign(layers(), {all});
    // Of any model, also one whose cache is not compressed here.
    result.kv_bytes_full = llama_state_seq_get_size(context.get(), 0);
    result.kv_bytes_kept = result.kv_bytes_full;
    result.kv_bytes_peak = result.kv_bytes_full;
    const std::span<const float> logits = this->logits(context.get());
    first_logits.assign(logits.begin(), logits.end());
  } else {
    compresskv::ModelShape shape = this->shape(options.kv_type);
    const compresskv::AnyPlan plan(shape, how.method, settings_of(how));
    observer.emplace(shape, std::max(plan.window(), std::size_t{1}));
    LlamaContext reading =
        make_context({.type = options.kv_type, .cells = prompt.size(), .observer = &*observer});
    const auto start = Clock::now();
    read(reading.get(), &*observer, prompt, progress);
    const std::span<const float> logits = this->logits(reading.get());
    first_logits.assign(logits.begin(), logits.end());
    const auto began = Clock::now();
    sequence.emplace(plan, *observer, compresskv::llama_cpp::Place{.context = reading.get()}, pool);
    const std::uint64_t layer_bytes = shape.kv_heads * shape.kv_row_bytes;
    const std::size_t sliding_layers = shape.layers - sequence->layers().size();
    shape.layers -= sliding_layers;
    // Decoding needs room for what is kept alone; a share of a longer sequence is more rows. Layers that
    // slide keep their window, in as many cells at most.
    const std::size_t most = prompt.size() + (every > 0 ? options.max_new_tokens : 0);
    rows = std::min(how.budget->resolve(most, plan.window(), shape), most);
    const std::size_t cells = sliding_layers > 0 ? std::max(rows, sliding_rows(most)) : rows;
    context = make_context({.type = options.kv_type,
                            .cells = cells + (every > 0 ? every : options.max_new_tokens),
                            .batch = 32,
                            .observer = every > 0 ? &*observer : nullptr});
    sequence->compress_into({.context = context.get()});
    const std::uint64_t token_bytes = shape.layers * layer_bytes;
    const std::uint64_t sliding_bytes = sliding_layers * layer_bytes;
    result.kept = kept_by(*sequence);
    rows = result.kept.front().front().size();
    result.kv_bytes_full = token_bytes * prompt.size() + sliding_bytes * sliding_rows(prompt.size());
    result.kv_bytes_kept = token_bytes * rows + sliding_bytes * sliding_rows(prompt.size());
    result.kv_bytes_peak =
        (token_bytes + sliding_bytes) * (llama_n_ctx(reading.get()) + llama_n_ctx(context.get()));
    reading.reset();
    result.compress_ms = milliseconds_since(began);
    result.prefill_ms = milliseconds_since(start);
  }

  engine::Sampler sampler{options.sampling};
  LlamaText text{*this};
  const auto say = [&](const std::string& part) {
    result.answer += part;
    if (options.on_text && !part.empty()) {
      options.on_text(part);
    }
  };
  std::size_t position = prompt.size();
  std::span<const float> logits = first_logits;
  const auto start = Clock::now();
  while (result.tokens.size() < options.max_new_tokens) {
    if (options.on_logits) {
      options.on_logits(logits);
    }
    const TokenId token = sampler.next(logits);
    if (llama_vocab_is_eog(vocabulary(), token)) {
      break;
    }
    result.tokens.push_back(token);
    say(text.push(token));
    if (result.tokens.size() == options.max_new_tokens || position == this->context()) {
      break;
    }
    logits = decode(context.get(), token, every > 0 ? &*observer : nullptr);
    ++position;
    ++result.decode_steps;
    result.rows_peak = std::max(result.rows_peak, ++rows);
    if (every > 0 && result.decode_steps % every == 0) {
      const auto began = Clock::now();
      rows = sequence->compress().rows_after;
      result.compress_ms += milliseconds_since(began);
    }
  }
  result.decode_ms = milliseconds_since(start);
  say(text.finish());
  return result;
}

bool has_llama_cpp() { return true; }

std::unique_ptr<ModelEngine> load_llama_cpp(const std::filesystem::path& path, int threads) {
  return std::make_unique<LlamaModel>(path, threads);
}

LlamaFacts inspect_llama_cpp(const std::filesystem::path& path) {
  auto loaded = std::make_unique<LlamaModel>(path, 1);
  const llama_model* model = loaded->get();
  const auto text = [&](const char* key) {
    std::array<char, 256> value{};
    llama_model_meta_val_str(model, key, value.data(), value.size());
    return std::string(value.data());
  };
  std::array<char, 256> description{};
  llama_model_desc(model, description.data(), description.size());
  const auto count = [](std::int32_t number) { return static_cast<std::size_t>(std::max(number, 0)); };
  LlamaFacts facts{.name = text("general.name"),
                   .architecture = text("general.architecture"),
                   .description = description.data(),
                   .parameters = llama_model_n_params(model),
                   .query_heads = count(llama_model_n_head(model)),
                   .kv_heads = count(llama_model_n_head_kv(model)),
                   .embedding = count(llama_model_n_embd(model)),
                   .vocabulary = count(llama_vocab_n_tokens(loaded->vocabulary()))};
  try {
    loaded->chat_prompt("x");
    facts.chat =
        loaded->why_not_own_template().empty() ? "the model's own template" : "llama.cpp's list of templates";
  } catch (const engine::Error& error) {
    facts.why_no_chat = error.what();
  }
  try {
    const std::vector<std::size_t> compressed = loaded->compressed_layers();
    for (std::size_t layer = 0; layer < loaded->layers(); ++layer) {
      if (std::ranges::find(compressed, layer) == compressed.end()) {
        facts.sliding_layers.push_back(layer);
      }
    }
    facts.sliding_window = facts.sliding_layers.empty() ? 0 : count(llama_model_n_swa(model));
  } catch (const compresskv::ArgumentError& error) {
    facts.why_not = error.what();
  }
  facts.model = std::move(loaded);
  return facts;
}

}  // namespace ckv
