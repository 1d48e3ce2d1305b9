#include "run.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <compresskv/io/calibration_files.hpp>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "compress.hpp"
#include "engine/error.hpp"
#include "repeat.hpp"
#include "terminal.hpp"

namespace ckv {
namespace {

using Positions = std::vector<std::vector<std::uint32_t>>;  // [list][row]

/// What compresses a sequence, and shows it how the last tokens looked at the cache.
struct Compressing {
  std::unique_ptr<PromptCompressor> compressor;  ///< none: the full cache
  std::optional<RecentQueries> recent;           ///< where queries of several chunks or steps count
};

/// Reads the prompt and fills what `result` says about it; the position where the sequence goes on.
std::size_t prefill(const LoadedModel& loaded, engine::Sequence& sequence, std::span<const TokenId> prompt,
                    const Compression& how, const RunOptions& options, Compressing& compressing,
                    RunResult& result) {
  const engine::ModelConfig& config = loaded.model.config();
  const auto start = Clock::now();
  std::size_t next_position = prompt.size();
  std::size_t layers_done = 0;
  const auto layer_done = [&] {
    ++layers_done;
    if (options.on_layer) {
      options.on_layer(layers_done);
    }
    check_interrupt();
  };
  const auto for_chunks = [&](const auto& read) {
    const std::size_t most = options.prefill_chunk == 0 ? prompt.size() : options.prefill_chunk;
    std::size_t tokens = 0;
    do {  // an empty prompt too is for the engine to refuse
      const std::size_t count = std::min(most, prompt.size() - tokens);
      read(prompt.subspan(tokens, count), tokens + count);
      tokens += count;
    } while (tokens < prompt.size());
  };
  if (how.method == Method::full) {
    for_chunks([&](std::span<const TokenId> chunk, std::size_t) {
      sequence.prefill(chunk, {.on_layer = [&](const engine::LayerView&) { layer_done(); }, .on_logits = {}});
    });
    Positions all(1, std::vector<std::uint32_t>(prompt.size()));
    std::iota(all[0].begin(), all[0].end(), 0U);
    result.kept.assign(static_cast<std::size_t>(config.layers), all);
  } else {
    const bool whole = options.prefill_chunk == 0 || options.prefill_chunk >= prompt.size();
    const bool all_queries = wants_all_queries(how.method);
    const std::size_t observers = all_queries ? prompt.size() : window_of(how);
    // A compaction has seen the queries before it: what then observes are those of the chunk.
    const bool chunk_alone = (whole && options.decode_every == 0) || (all_queries && how.working_rows > 0);
    auto& compressor = compressing.compressor;
    auto& recent = compressing.recent;
    compressor = make_compressor(how, shape_of(config, options.kv_type), loaded.model.pool(), prompt.size());
    if (!chunk_alone) {
      recent.emplace(config, observers);
    }
    std::optional<HeldStates> states;
    if (wants_hidden_states(how.method)) {
      states.emplace(config);
    }
    bool begun = false;
    for_chunks([&](std::span<const TokenId> chunk, std::size_t tokens) {
      const bool last = tokens == prompt.size();
      const bool compress = last || how.working_rows > 0;
      auto began = Clock::now();
      if (compress && begun) {
        compressor->begin_turn(tokens);
      } else if (compress) {
        compressor->begin(tokens);
        begun = true;
      }
      result.compress_ms += milliseconds_since(began);
      const auto on_layer = [&](engine::LayerView& layer) {
        began = Clock::now();
        const compresskv::QueryWindow<float> queries = recent ? recent->add(layer) : queries_of(layer);
        if (states) {
          const compresskv::HiddenStates<float> shown = states->add(layer);
          if (compress) {
            compressor->compress(layer, {.queries = queries, .hidden_states = &shown});
            // What a threshold has judged need not be shown again; a budget judges all rows.
            states->keep(layer.layer, last ? 0 : how.score_threshold ? window_of(how) : tokens);
          }
        } else if (compress && !compressor->repeats()) {
          compressor->compress(layer, {.queries = queries});
        }
        result.compress_ms += milliseconds_since(began);
        layer_done();
      };
      sequence.prefill(
          chunk,
          {.window = observers, .hidden_states = states.has_value(), .on_layer = on_layer, .on_logits = {}});
    });
    if (compressor->repeats()) {
      const auto began = Clock::now();
      PromptCompressor* const only = compressor.get();
      repeat_context(loaded, sequence, prompt, {&only, 1});
      sequence.revisit([&](engine::LayerView& layer) { compressor->finish(layer); });
      result.compress_ms += milliseconds_since(began);
    }
    for (std::size_t layer = 0; layer < static_cast<std::size_t>(config.layers); ++layer) {
      const compresskv::Retained& kept = compressor->retained(layer);
      next_position = kept.next_position();
      result.kept.push_back(positions_of(kept));
    }
    result.compress_ms += sequence.shrink_time().count();
  }
  result.prefill_ms = milliseconds_since(start);
  return next_position;
}

}  // namespace

std::vector<std::vector<std::uint32_t>> positions_of(const compresskv::Retained& kept) {
  Positions lists(kept.lists());
  for (std::size_t head = 0; head < lists.size(); ++head) {
    const auto& positions = kept.positions(head);
    lists[head].assign(positions.begin(), positions.end());
  }
  return lists;
}

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

LoadedModel load_model(const std::filesystem::path& path, int threads) {
  return {path, engine::GgufFile::open(path), threads};
}

LoadedModel::LoadedModel(std::filesystem::path model_path, engine::GgufFile model_file, int threads)
    : path(std::move(model_path)),
      file(std::move(model_file)),
      model(file, {.threads = threads}),
      tokenizer(engine::tokenizer_spec(file)) {}

compresskv::ModelShape LoadedModel::shape(engine::KvType type) const {
  return shape_of(model.config(), type);
}

std::optional<compresskv::OutputWeights> LoadedModel::output_weights() const {
  const engine::ModelConfig& config = model.config();
  std::vector<const float*> layers;
  for (std::size_t layer = 0; layer < this->layers(); ++layer) {
    if (layer == output_rows_.size()) {
      const engine::PackedMatrix& output = model.layers()[layer].output;
      std::vector<float>& rows = output_rows_.emplace_back();
      rows.reserve(static_cast<std::size_t>(output.outputs() * output.inputs()));
      for (std::ptrdiff_t row = 0; row < output.outputs(); ++row) {
        for (std::ptrdiff_t input = 0; input < output.inputs(); ++input) {
          rows.push_back(output(row, input));
        }
      }
    }
    layers.push_back(output_rows_[layer].data());
  }
  return compresskv::OutputWeights(layers, {.hidden = static_cast<std::size_t>(config.embedding),
                                            .query_heads = static_cast<std::size_t>(config.heads),
                                            .head_dim = static_cast<std::size_t>(config.head_dim)});
}

engine::PromptText LoadedModel::lay_out(std::span<const engine::ChatMessage> messages) const {
  return engine::ChatTemplate{tokenizer}.lay_out(messages);
}

std::vector<TokenId> LoadedModel::encode(const engine::PromptText& prompt) const {
  return tokenizer.encode(prompt);
}

std::vector<TokenId> LoadedModel::encode(std::string_view text, bool parse_special) const {
  return tokenizer.encode(text, {.add_bos = false, .parse_special = parse_special});
}

std::optional<TokenId> LoadedModel::bos() const {
  return tokenizer.adds_bos() ? tokenizer.bos() : std::nullopt;
}

RunResult LoadedModel::run(std::span<const TokenId> prompt, const Compression& how,
                           const RunOptions& options) const {
  return ckv::run(*this, prompt, how, options);
}

std::string LoadedModel::answer(std::span<const TokenId> prompt, std::size_t max_new_tokens,
                                const AnswerSteps& steps) const {
  engine::Sequence sequence{model};
  sequence.hooks().attention = [&](int layer, int head, std::span<const float> row) {
    steps.on_attention(static_cast<std::size_t>(layer), static_cast<std::size_t>(head), row);
  };
  sequence.prefill(prompt);
  std::vector<TokenId> tokens;
  decode_greedily(*this, sequence, max_new_tokens, [&](TokenId token) {
    steps.on_token(token);
    tokens.push_back(token);
  });
  return tokenizer.decode(tokens, {.skip_special = true});
}

void decode_greedily(const LoadedModel& loaded, engine::Sequence& sequence, std::size_t max_new_tokens,
                     const std::function<void(TokenId)>& picked) {
  for (std::size_t step = 0;
       step < max_new_tokens && sequence.next_position() < loaded.model.config().context; ++step) {
    const TokenId token = engine::greedy(sequence.logits());
    if (loaded.tokenizer.is_end_of_generation(token)) {
      return;
    }
    picked(token);
    sequence.decode(token, sequence.next_position());
  }
}

compresskv::ModelShape shape_of(const engine::ModelConfig& config, engine::KvType type) {
  const auto head_dim = static_cast<std::size_t>(config.head_dim);
  return {.layers = static_cast<std::size_t>(config.layers),
          .query_heads = static_cast<std::size_t>(config.heads),
          .kv_heads = static_cast<std::size_t>(config.kv_heads),
          .head_dim = head_dim,
          .kv_row_bytes = 2 * head_dim * engine::kv_element_bytes(type)};
}

void check_calibration(const std::filesystem::path& heads, const std::filesystem::path& errors,
                       const compresskv::ModelShape& shape) {
  if (!heads.empty()) {
    compresskv::io::load_head_ranking(heads, shape);
  }
  if (!errors.empty()) {
    compresskv::io::load_layer_errors(errors, shape);
  }
}

compresskv::AnyKv any_view_of(const engine::LayerView& layer) {
  return engine::with_kv_type(layer.type,
                              [&]<typename T>(T*) { return compresskv::AnyKv(view_of<T>(layer)); });
}

compresskv::QueryWindow<float> queries_of(const engine::LayerView& layer) {
  return {layer.queries, compresskv::QueryShape{.query_heads = static_cast<std::size_t>(layer.heads),
                                                .queries = layer.window,
                                                .head_dim = static_cast<std::size_t>(layer.head_dim)}};
}

RecentQueries::RecentQueries(const engine::ModelConfig& config, std::size_t window)
    : layers_(static_cast<std::size_t>(config.layers),
              compresskv::RecentQueries<float>{{.query_heads = static_cast<std::size_t>(config.heads),
                                                .queries = window,
                                                .head_dim = static_cast<std::size_t>(config.head_dim)}}) {}

compresskv::QueryWindow<float> RecentQueries::add(const engine::LayerView& layer) {
  compresskv::RecentQueries<float>& recent = layers_[static_cast<std::size_t>(layer.layer)];
  const auto head_dim = static_cast<std::size_t>(layer.head_dim);
  recent.append(layer.queries, layer.window, {.head = layer.window * head_dim, .query = head_dim});
  return recent.view();
}

void RecentQueries::add(int layer, std::span<const float> queries) {
  compresskv::RecentQueries<float>& recent = layers_[static_cast<std::size_t>(layer)];
  const std::size_t head_dim = recent.shape().head_dim;
  recent.append(queries.data(), 1, {.head = head_dim, .query = head_dim});
}

compresskv::QueryWindow<float> RecentQueries::view(int layer) const {
  return layers_[static_cast<std::size_t>(layer)].view();
}

HeldStates::HeldStates(const engine::ModelConfig& config)
    : hidden_size_(static_cast<std::size_t>(config.embedding)),
      layers_(static_cast<std::size_t>(config.layers)) {}

compresskv::HiddenStates<float> HeldStates::add(const engine::LayerView& layer) {
  std::vector<float>& held = layers_[static_cast<std::size_t>(layer.layer)];
  held.insert(held.end(), layer.hidden_states, layer.hidden_states + layer.tokens * hidden_size_);
  return view(layer.layer);
}

void HeldStates::keep(int layer, std::size_t tokens) {
  std::vector<float>& held = layers_[static_cast<std::size_t>(layer)];
  const std::size_t kept = std::min(tokens * hidden_size_, held.size());
  held = std::vector<float>(held.end() - static_cast<std::ptrdiff_t>(kept), held.end());
}

compresskv::HiddenStates<float> HeldStates::view(int layer) const {
  const std::vector<float>& held = layers_[static_cast<std::size_t>(layer)];
  return {held.data(),
          compresskv::HiddenShape{.tokens = held.size() / hidden_size_, .hidden_size = hidden_size_}};
}

void give_back(engine::LayerView& layer, const compresskv::Retained& kept) {
  std::vector<std::size_t> rows(static_cast<std::size_t>(layer.kv_heads));
  for (std::size_t head = 0; head < rows.size(); ++head) {
    rows[head] = kept.rows(head);
  }
  layer.shrink(rows);
}

std::string message_text(std::string_view text, std::string_view question) {
  return question.empty() ? std::string(text) : fmt::format("{}\n\n{}", text, question);
}

std::string checked_text(std::string text, std::string_view from) {
  if (text.starts_with("\xFF\xFE") || text.starts_with("\xFE\xFF")) {
    throw engine::Error(
        fmt::format("{} is UTF-16, by its byte-order mark; give UTF-8: iconv -f UTF-16 -t UTF-8", from));
  }
  if (const std::size_t nul = text.find('\0'); nul != std::string::npos) {
    throw engine::Error(
        fmt::format("{} holds a NUL, its byte {}; give text in UTF-8, and what is UTF-16 through iconv -f "
                    "UTF-16 -t UTF-8",
                    from, nul + 1));
  }
  if (text.starts_with("\xEF\xBB\xBF")) {
    text.erase(0, 3);
  }
  return text;
}

std::vector<TokenId> next_turn(const ModelEngine& loaded, const std::string& message) {
  const std::array<engine::ChatMessage, 3> messages = {{{.role = "user", .content = "?"},
                                                        {.role = "assistant", .content = "!"},
                                                        {.role = "user", .content = message}}};
  const std::string asked = loaded.lay_out(std::span(messages).first(1)).text();
  const engine::PromptText all = loaded.lay_out(messages);
  // Some templates write an answer with a blank before it.
  const std::size_t answer = all.text().find('!', asked.size());
  const bool goes_on = all.text().starts_with(asked) && answer != std::string::npos &&
                       all.text().find_first_not_of(" \n", asked.size()) == answer;
  if (!goes_on) {
    throw engine::Error(
        "the model's chat template writes a turn otherwise once there is another one; a task of two turns "
        "needs "
        "one that goes on");
  }
  return encode_prompt(loaded, all.substr(answer + 1));
}

namespace {

/// Decodes from `position` on, and fills what `result` says about it and the cache of `tokens` tokens.
void decode(const LoadedModel& loaded, engine::Sequence& sequence, std::size_t tokens, std::size_t position,
            PromptCompressor* compressor, std::optional<RecentQueries>& recent, const RunOptions& options,
            RunResult& result) {
  const engine::ModelConfig& config = loaded.model.config();
  const std::size_t every = compressor != nullptr ? options.decode_every : 0;
  if (every > 0) {
    sequence.hooks().queries = [&](int layer, std::span<const float> queries) {
      recent->add(layer, queries);
    };
  }
  const auto compress_again = [&] {
    const auto began = Clock::now();
    compressor->begin_turn(position);
    sequence.revisit([&](engine::LayerView& layer) {
      compressor->compress(layer, {.queries = recent->view(layer.layer)});
    });
    result.compress_ms += milliseconds_since(began);
  };

  const std::uint64_t row_bytes = shape_of(config, options.kv_type).kv_row_bytes;
  for (int layer = 0; layer < config.layers; ++layer) {
    for (int head = 0; head < config.kv_heads; ++head) {
      result.kv_bytes_kept += row_bytes * sequence.rows(layer, head);
    }
  }
  result.kv_bytes_full = engine::Sequence::full_cache_bytes(config, options.kv_type, tokens);
  result.kv_bytes_peak = sequence.prefill_peak_cache_bytes();

  engine::Sampler sampler{options.sampling};
  engine::StreamDecoder text{loaded.tokenizer};
  const auto say = [&](const std::string& part) {
    result.answer += part;
    if (options.on_text && !part.empty()) {
      options.on_text(part);
    }
  };
  std::span<const float> logits = sequence.logits();
  const auto start = Clock::now();
  while (result.tokens.size() < options.max_new_tokens) {
    if (options.on_logits) {
      options.on_logits(logits);
    }
    const TokenId token = sampler.next(logits);
    if (loaded.tokenizer.is_end_of_generation(token)) {
      break;
    }
    result.tokens.push_back(token);
    say(text.push(token));
    // The last token asked for is not fed: its logits would go unread. Nor does a full context go on.
    if (result.tokens.size() == options.max_new_tokens || position == config.context) {
      break;
    }
    logits = sequence.decode(token, position++);
    ++result.decode_steps;
    for (int layer = 0; layer < config.layers; ++layer) {
      result.rows_peak = std::max(result.rows_peak, std::ranges::max(sequence.cache(layer).rows()));
    }
    if (every > 0 && result.decode_steps % every == 0) {
      compress_again();
    }
    check_interrupt();
  }
  result.decode_ms = milliseconds_since(start);
  say(text.finish());
}

}  // namespace

RunResult run(const LoadedModel& loaded, std::span<const TokenId> prompt, const Compression& how,
              const RunOptions& options) {
  engine::Sequence sequence{loaded.model, {.kv_type = options.kv_type}};
  RunResult result;
  Compressing compressing;
  const std::size_t position = prefill(loaded, sequence, prompt, how, options, compressing, result);
  decode(loaded, sequence, prompt.size(), position, compressing.compressor.get(), compressing.recent, options,
         result);
  return result;
}

Context::Context(engine::Sequence of, std::span<const TokenId> read)
    : sequence(std::move(of)), tokens(read.begin(), read.end()) {}
Context::Context(Context&&) noexcept = default;
Context::~Context() = default;

std::vector<TokenId> context_tokens(const ModelEngine& loaded, const std::string& text) {
  constexpr std::string_view blanks = " \t\r\n";
  if (text.find_first_not_of(blanks) == std::string::npos) {
    throw engine::Error("the text is blank; give one that is asked about");
  }
  const engine::PromptText chat = loaded.chat_prompt(message_text(text, "?"));
  std::size_t question = chat.size();
  while (question > 0 && !(chat.is_outside(question - 1) && chat.text()[question - 1] == '?')) {
    --question;
  }
  const std::size_t last =
      question < 2 ? std::string::npos : chat.text().find_last_not_of(blanks, question - 2);
  if (last == std::string::npos) {
    throw engine::Error("the model's chat template does not write what the user says as it is");
  }
  std::vector<TokenId> tokens = encode_prompt(loaded, chat.substr(0, last + 1));
  // A token may reach over the end of the text: there the context ends before it.
  const std::vector<TokenId> whole = encode_prompt(loaded, chat);
  tokens.erase(std::ranges::mismatch(tokens, whole).in1, tokens.end());
  if (tokens.empty()) {
    throw engine::Error("no token of the text is the same whatever follows it; give a longer one");
  }
  return tokens;
}

std::vector<TokenId> rest_of_chat(const ModelEngine& loaded, const std::string& text,
                                  std::span<const TokenId> context, const std::string& question) {
  const std::vector<TokenId> whole = encode_prompt(loaded, chat_prompt(loaded, message_text(text, question)));
  if (whole.size() <= context.size() ||
      !std::ranges::equal(context, std::span(whole).first(context.size()))) {
    throw engine::Error(
        "with this question the text before it has other tokens than those that were read; begin it with a "
        "word");
  }
  return {whole.begin() + static_cast<std::ptrdiff_t>(context.size()), whole.end()};
}

Context read_context(const LoadedModel& loaded, std::span<const TokenId> tokens, const Compression& how,
                     const RunOptions& options) {
  Context context{engine::Sequence{loaded.model, {.kv_type = options.kv_type}}, tokens};
  RunOptions reading = options;
  reading.decode_every = 0;
  Compressing compressing;
  prefill(loaded, context.sequence, context.tokens, how, reading, compressing, context.result);
  context.compressor = std::move(compressing.compressor);
  return context;
}

RunResult ask(const LoadedModel& loaded, Context& context, std::span<const TokenId> rest,
              const Compression& how, const RunOptions& options) {
  RunResult result = std::move(context.result);
  const auto start = Clock::now();
  // A later compression is observed by what was read and said since: other queries are not kept.
  std::optional<RecentQueries> recent;
  engine::PrefillOptions reading;
  if (options.decode_every > 0) {
    recent.emplace(loaded.model.config(), window_of(how));
    reading.window = window_of(how);
    reading.on_layer = [&](const engine::LayerView& layer) { recent->add(layer); };
  }
  context.sequence.prefill(rest, reading);
  check_interrupt();
  const std::size_t position = context.sequence.next_position();
  for (Positions& lists : result.kept) {
    for (std::vector<std::uint32_t>& list : lists) {
      for (std::size_t at = context.tokens.size(); at < position; ++at) {
        list.push_back(static_cast<std::uint32_t>(at));
      }
    }
  }
  result.prefill_ms += milliseconds_since(start);
  decode(loaded, context.sequence, position, position, context.compressor.get(), recent, options, result);
  return result;
}

}  // namespace ckv
