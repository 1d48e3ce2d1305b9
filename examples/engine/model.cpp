#include "model.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <set>
#include <thread>

#include "dequantise.hpp"

namespace engine {
namespace {

// Sizes are ints in the config: what they multiply to is computed as std::size_t.
constexpr int largest_size = 1 << 24;

int positive(const GgufFile& file, const std::string& key) {
  const auto value = file.get<std::int64_t>(key);
  if (value < 1 || value > largest_size) {
    throw Error(fmt::format("{}: metadata \"{}\" is {}; it must be from 1 to {}", file.name(), key, value,
                            largest_size));
  }
  return static_cast<int>(value);
}

int positive_or(const GgufFile& file, const std::string& key, int otherwise) {
  return file.has(key) ? positive(file, key) : otherwise;
}

double positive_real_or(const GgufFile& file, const std::string& key, double otherwise) {
  const double value = file.find<double>(key).value_or(otherwise);
  if (!(value > 0.0) || !std::isfinite(value)) {
    throw Error(
        fmt::format("{}: metadata \"{}\" is {}; it must be above 0 and finite", file.name(), key, value));
  }
  return value;
}

// The first file of a split model holds all metadata and some tensors, and can look like a smaller model.
void refuse_parts(const GgufFile& file) {
  const auto parts = file.find<std::uint64_t>("split.count").value_or(1);
  if (parts > 1) {
    throw Error(fmt::format(
        "{}: this is part {} of a model split into {} files (split.count); merge them into one first: "
        "llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        file.name(), file.find<std::uint64_t>("split.no").value_or(0) + 1, parts));
  }
  const auto tensors = file.find<std::uint64_t>("split.tensors.count").value_or(file.tensors().size());
  if (tensors != file.tensors().size()) {
    throw Error(
        fmt::format("{}: split.tensors.count says {} tensors, the file has {}; parts of it are missing",
                    file.name(), tensors, file.tensors().size()));
  }
  if (const auto type = file.find<std::string>("general.type").value_or("model"); type != "model") {
    throw Error(
        fmt::format("{}: general.type is \"{}\"; give the file of the model itself", file.name(), type));
  }
}

// What this engine reads, and what changes nothing.
constexpr std::string_view known_keys[] = {"block_count",
                                           "context_length",
                                           "embedding_length",
                                           "feed_forward_length",
                                           "vocab_size",
                                           "attention.head_count",
                                           "attention.head_count_kv",
                                           "attention.key_length",
                                           "attention.value_length",
                                           "attention.layer_norm_rms_epsilon",
                                           "attention.layer_norm_epsilon",
                                           "rope.dimension_count",
                                           "rope.freq_base",
                                           "rope.scale_linear",
                                           "rope.scaling.type",
                                           "rope.scaling.factor",
                                           "rope.scaling.original_context_length",
                                           "rope.scaling.finetuned",
                                           "rope.scaling.attn_factor",
                                           "rope.scaling.yarn_attn_factor",
                                           "rope.scaling.yarn_ext_factor",
                                           "rope.scaling.yarn_beta_fast",
                                           "rope.scaling.yarn_beta_slow",
                                           "tensor_data_layout"};

// Whether the value says "not used": 0, false, an empty text or list.
bool is_off(const MetadataValue& value) {
  return std::visit(
      [](const auto& held) {
        using Held = std::remove_cvref_t<decltype(held)>;
        if constexpr (std::same_as<Held, MetadataArray>) {
          return std::visit([](const auto& items) { return items.empty(); }, held);
        } else if constexpr (std::same_as<Held, std::string>) {
          return held.empty();
        } else {
          return held == Held{};
        }
      },
      value);
}

// Metadata that may change what the model computes and that this engine does not implement. A key that nobody
// here has heard of is among it: ignored, it would give wrong answers without a word.
void refuse_unsupported(const GgufFile& file) {
  constexpr std::string_view prefix = "llama.";
  for (const MetadataEntry& entry : file.metadata()) {
    if (!entry.key.starts_with(prefix)) continue;
    const std::string_view key = std::string_view{entry.key}.substr(prefix.size());
    if (std::ranges::find(known_keys, key) != std::end(known_keys)) continue;
    // On, not off, is what every model of this kind has.
    const bool is_causal = key == "attention.causal" && entry.value == MetadataValue{true};
    if (is_causal || (key != "attention.causal" && is_off(entry.value))) continue;
    throw Error(fmt::format(
        "{}: metadata \"{}\" is {}; models with it are not supported, only dense llama models with full "
        "attention and without further scalings are",
        file.name(), entry.key, value_text(entry.value)));
  }
  const auto quantisation = file.find<std::uint64_t>("general.quantization_version").value_or(2);
  if (quantisation != 2) {
    throw Error(
        fmt::format("{}: general.quantization_version is {}; version 2 is supported: convert the model "
                    "again",
                    file.name(), quantisation));
  }
}

// One row of the embedding, and of the output, a token.
void check_vocabulary(const GgufFile& file, const ModelConfig& config) {
  const auto compare = [&](std::uint64_t tokens, std::string_view what) {
    if (tokens == static_cast<std::uint64_t>(config.vocabulary)) return;
    throw Error(
        fmt::format("{}: token_embd.weight has {} rows, but {} {}; the model and the vocabulary do not "
                    "belong together, or "
                    "the file was converted wrongly: convert it again",
                    file.name(), config.vocabulary, what, tokens));
  };
  if (const auto tokens = file.array_size("tokenizer.ggml.tokens")) {
    compare(*tokens, "the tokens of the vocabulary (tokenizer.ggml.tokens) are");
  }
  if (const auto tokens = file.find<std::uint64_t>("llama.vocab_size"))
    compare(*tokens, "llama.vocab_size is");
}

void read_rope(const GgufFile& file, ModelConfig& config) {
  config.rope_dimensions = positive_or(file, "llama.rope.dimension_count", config.head_dim);
  if (config.rope_dimensions > config.head_dim || config.rope_dimensions % 2 != 0) {
    throw Error(
        fmt::format("{}: llama.rope.dimension_count is {}; it must be even and at most the head dimension {}",
                    file.name(), config.rope_dimensions, config.head_dim));
  }
  config.rope_base = positive_real_or(file, "llama.rope.freq_base", 10000.0);
  // Older files have another key for the factor; a factor without a type scales linearly. 0: none.
  const char* factor =
      file.has("llama.rope.scaling.factor") ? "llama.rope.scaling.factor" : "llama.rope.scale_linear";
  const bool has_factor = file.has(factor) && file.get<double>(factor) != 0.0;
  config.rope_factor = has_factor ? positive_real_or(file, factor, 1.0) : 1.0;
  config.rope_scaling =
      file.find<std::string>("llama.rope.scaling.type").value_or(has_factor ? "linear" : "none");
  config.rope_magnitude = positive_real_or(file, "llama.rope.scaling.attn_factor", 1.0) *
                          positive_real_or(file, "llama.rope.scaling.yarn_attn_factor", 1.0);
  // Below 0: what the type has by itself.
  config.yarn_extrapolation = file.find<double>("llama.rope.scaling.yarn_ext_factor").value_or(-1.0);
  if (config.yarn_extrapolation < 0.0) config.yarn_extrapolation = config.rope_scaling == "yarn" ? 1.0 : 0.0;
  config.yarn_fast = positive_real_or(file, "llama.rope.scaling.yarn_beta_fast", config.yarn_fast);
  config.yarn_slow = positive_real_or(file, "llama.rope.scaling.yarn_beta_slow", config.yarn_slow);
  if (!(config.yarn_extrapolation >= 0.0 && config.yarn_extrapolation <= 1.0)) {
    throw Error(fmt::format("{}: llama.rope.scaling.yarn_ext_factor is {}; it must be from 0 to 1",
                            file.name(), config.yarn_extrapolation));
  }
  if (config.yarn_extrapolation > 0.0 && config.rope_scaling != "yarn") {
    throw Error(
        fmt::format("{}: llama.rope.scaling.yarn_ext_factor is {} but the scaling's type is \"{}\"; "
                    "only yarn has one",
                    file.name(), config.yarn_extrapolation, config.rope_scaling));
  }
  if (config.rope_scaling == "none") {
    config.rope_factor = 1.0;
  } else if (config.rope_scaling == "yarn") {
    config.rope_original_context = file.get<std::size_t>("llama.rope.scaling.original_context_length");
    if (config.rope_original_context == 0) {
      throw Error(
          fmt::format("{}: llama.rope.scaling.original_context_length is 0; yarn needs it", file.name()));
    }
  } else if (config.rope_scaling != "linear") {
    throw Error(fmt::format("{}: llama.rope.scaling.type is \"{}\"; supported are none, linear and yarn",
                            file.name(), config.rope_scaling));
  }
}

// Reads tensors by name with the shape they must have, and remembers which, so that what is left over can be
// refused.
class TensorReader {
 public:
  TensorReader(const GgufFile& file, ThreadPool& pool) : file_{file}, pool_{pool} {}

  bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

  PackedMatrix matrix(const std::string& name, int outputs, int inputs) {
    const Tensor& tensor =
        find(name, {static_cast<std::uint64_t>(inputs), static_cast<std::uint64_t>(outputs)});
    const std::vector<std::byte> data = file_.read(tensor);
    PackedMatrix out(outputs, inputs);
    const BlockShape block = block_shape(tensor.type);
    const std::size_t row_bytes = static_cast<std::size_t>(inputs) / block.elements * block.bytes;
    pool_.parallel_for(static_cast<std::size_t>(out.panels()), [&](std::size_t p) {
      Vector row(inputs);
      const auto first = static_cast<int>(p) * static_cast<int>(PackedMatrix::panel);
      for (int o = first; o < std::min(outputs, first + static_cast<int>(PackedMatrix::panel)); ++o) {
        dequantise(tensor.type, std::span{data}.subspan(static_cast<std::size_t>(o) * row_bytes, row_bytes),
                   {row.data(), static_cast<std::size_t>(inputs)});
        for (int i = 0; i < inputs; ++i) out(o, i) = row[i];
      }
    });
    return out;
  }

  Vector vector(const std::string& name, int elements) {
    const Tensor& tensor = find(name, {static_cast<std::uint64_t>(elements)});
    Vector out(elements);
    dequantise(tensor.type, file_.read(tensor), {out.data(), static_cast<std::size_t>(elements)});
    return out;
  }

  // A tensor that is not read changes what the model should compute: silence would be wrong answers.
  void refuse_rest() const {
    for (const Tensor& tensor : file_.tensors()) {
      if (!seen_.contains(tensor.name)) {
        throw Error(fmt::format(
            "{}: tensor \"{}\" of shape {} has no place in a llama model as this engine knows it; "
            "biases, experts and adapters are not supported",
            file_.name(), tensor.name, shape_text(tensor.shape)));
      }
    }
  }

  void ignore(const std::string& name) { seen_.insert(name); }

 private:
  const Tensor& find(const std::string& name, const std::vector<std::uint64_t>& shape) {
    const Tensor* tensor = file_.find_tensor(name);
    if (tensor == nullptr) {
      throw Error(
          fmt::format("{}: tensor \"{}\" of shape {} is missing; the file is not a complete llama model",
                      file_.name(), name, shape_text(shape)));
    }
    // Trailing dimensions of 1 say nothing.
    std::vector<std::uint64_t> found = tensor->shape;
    while (found.size() > shape.size() && found.back() == 1) found.pop_back();
    if (found != shape) {
      throw Error(fmt::format("{}: tensor \"{}\" has shape {}, but the metadata asks for {}", file_.name(),
                              name, shape_text(tensor->shape), shape_text(shape)));
    }
    seen_.insert(name);
    return *tensor;
  }

  const GgufFile& file_;
  ThreadPool& pool_;
  std::set<std::string, std::less<>> seen_;
};

// YaRN (arXiv 2309.00071): pairs that turn more than `yarn_fast` times over the original context keep their
// frequency, those that turn less than `yarn_slow` times are slowed down by the factor, those between are
// blended.
void apply_yarn(const ModelConfig& config, std::vector<double>& frequencies, double& magnitude) {
  const double context = static_cast<double>(config.rope_original_context);
  const auto pair_that_turns = [&](double times) {
    return config.rope_dimensions * std::log(context / (times * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(config.rope_base));
  };
  const double low = std::max(std::floor(pair_that_turns(config.yarn_fast)), 0.0);
  const double high = std::min(std::ceil(pair_that_turns(config.yarn_slow)), config.rope_dimensions - 1.0);
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / std::max(high - low, 1e-3), 0.0, 1.0);
    const double slow = 1.0 - (1.0 - ramp) * config.yarn_extrapolation;
    frequencies[i] *= (1.0 - slow) + slow / config.rope_factor;
  }
  if (config.rope_factor > 1.0 && config.yarn_extrapolation > 0.0) {
    magnitude *= 0.1 * std::log(config.rope_factor) + 1.0;
  }
}

}  // namespace

ModelConfig read_config(const GgufFile& file) {
  refuse_parts(file);
  const auto architecture = file.get<std::string>("general.architecture");
  if (architecture != "llama") {
    throw Error(fmt::format("{}: general.architecture is \"{}\"; this engine runs \"llama\" models alone",
                            file.name(), architecture));
  }
  refuse_unsupported(file);

  ModelConfig config;
  config.name = file.find<std::string>("general.name").value_or("");
  config.layers = positive(file, "llama.block_count");
  config.context = static_cast<std::size_t>(positive(file, "llama.context_length"));
  config.embedding = positive(file, "llama.embedding_length");
  config.feed_forward = positive(file, "llama.feed_forward_length");
  config.heads = positive(file, "llama.attention.head_count");
  config.kv_heads = positive_or(file, "llama.attention.head_count_kv", config.heads);
  if (config.heads % config.kv_heads != 0) {
    throw Error(fmt::format(
        "{}: {} query heads cannot be shared out over {} KV heads; the first must be a multiple of "
        "the second",
        file.name(), config.heads, config.kv_heads));
  }
  if (file.has("llama.attention.key_length")) {
    config.head_dim = positive(file, "llama.attention.key_length");
  } else if (config.embedding % config.heads == 0) {
    config.head_dim = config.embedding / config.heads;
  } else {
    throw Error(fmt::format(
        "{}: llama.attention.key_length is absent and the embedding length {} is no multiple of the "
        "{} heads",
        file.name(), config.embedding, config.heads));
  }
  if (const int value_dim = positive_or(file, "llama.attention.value_length", config.head_dim);
      value_dim != config.head_dim) {
    throw Error(fmt::format("{}: keys have {} dimensions and values {}; both must be the same", file.name(),
                            config.head_dim, value_dim));
  }
  if (config.heads > largest_size / config.head_dim) {
    throw Error(fmt::format("{}: {} heads of {} dimensions are too many", file.name(), config.heads,
                            config.head_dim));
  }
  const double epsilon = file.get<double>("llama.attention.layer_norm_rms_epsilon");
  if (!(epsilon >= 0.0 && epsilon < 1.0)) {
    throw Error(fmt::format("{}: llama.attention.layer_norm_rms_epsilon is {}; it must be from 0 to 1",
                            file.name(), epsilon));
  }
  config.rms_epsilon = static_cast<float>(epsilon);
  read_rope(file, config);

  const Tensor* embedding = file.find_tensor("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2 ||
      embedding->shape[1] > std::uint64_t{largest_size}) {
    throw Error(fmt::format(
        "{}: tensor \"token_embd.weight\" of shape [{}, vocabulary] is missing or has another shape",
        file.name(), config.embedding));
  }
  config.vocabulary = static_cast<int>(embedding->shape[1]);
  check_vocabulary(file, config);
  config.tied_output = file.find_tensor("output.weight") == nullptr;
  return config;
}

Model::Model(const GgufFile& file, ModelOptions options) : config_{read_config(file)} {
  if (options.threads < 0 || options.threads > 1024) {
    throw Error(
        fmt::format("threads is {}; give 1 to 1024, or 0 for as many as the machine has", options.threads));
  }
  const int processors = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  pool_ = std::make_unique<ThreadPool>(options.threads == 0 ? processors : options.threads);

  const ModelConfig& c = config_;
  const int query_width = c.heads * c.head_dim;
  const int kv_width = c.kv_heads * c.head_dim;
  TensorReader read{file, *pool_};
  embedding_ = read.matrix("token_embd.weight", c.vocabulary, c.embedding);
  for (int l = 0; l < c.layers; ++l) {
    const auto name = [l](const char* part) { return fmt::format("blk.{}.{}.weight", l, part); };
    layers_.push_back({.attention_norm = read.vector(name("attn_norm"), c.embedding),
                       .query = read.matrix(name("attn_q"), query_width, c.embedding),
                       .key = read.matrix(name("attn_k"), kv_width, c.embedding),
                       .value = read.matrix(name("attn_v"), kv_width, c.embedding),
                       .output = read.matrix(name("attn_output"), c.embedding, query_width),
                       .feed_forward_norm = read.vector(name("ffn_norm"), c.embedding),
                       .gate = read.matrix(name("ffn_gate"), c.feed_forward, c.embedding),
                       .up = read.matrix(name("ffn_up"), c.feed_forward, c.embedding),
                       .down = read.matrix(name("ffn_down"), c.embedding, c.feed_forward)});
    // Very old files carry the rotation's frequencies once a layer; they can be computed.
    read.ignore(fmt::format("blk.{}.attn_rot_embd", l));
  }
  output_norm_ = read.vector("output_norm.weight", c.embedding);
  if (!c.tied_output) output_ = read.matrix("output.weight", c.vocabulary, c.embedding);

  for (int i = 0; i < c.rope_dimensions / 2; ++i) {
    rope_frequencies_.push_back(std::pow(c.rope_base, -2.0 * i / c.rope_dimensions));
  }
  if (c.rope_scaling == "linear") {
    for (double& frequency : rope_frequencies_) frequency /= c.rope_factor;
  }
  rope_magnitude_ = c.rope_magnitude;
  if (c.rope_scaling == "yarn") {
    apply_yarn(c, rope_frequencies_, rope_magnitude_);
  }
  // Llama 3.1 and later: a divisor for each pair, computed by the converter.
  if (read.has("rope_freqs.weight")) {
    const Vector divisors = read.vector("rope_freqs.weight", c.rope_dimensions / 2);
    for (std::size_t i = 0; i < rope_frequencies_.size(); ++i) {
      const double divisor = divisors[static_cast<Eigen::Index>(i)];
      if (!(divisor > 0.0) || !std::isfinite(divisor)) {
        throw Error(
            fmt::format("{}: rope_freqs.weight holds {} for pair {}; divisors must be above 0 and finite",
                        file.name(), divisor, i));
      }
      rope_frequencies_[i] /= divisor;
    }
  }
  read.refuse_rest();
}

}  // namespace engine
