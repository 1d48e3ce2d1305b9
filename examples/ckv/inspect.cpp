// ckv inspect: what a model file holds, and what a budget saves.

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "arguments.hpp"
#include "commands.hpp"
#include "engine/chat_template.hpp"
#include "engine/error.hpp"
#include "engine/gguf.hpp"
#include "engine/sha256.hpp"
#include "engine/tokenizer.hpp"
#include "llama_cpp/load.hpp"
#include "run.hpp"
#include "terminal.hpp"

namespace ckv {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array kv_types = {engine::KvType::f32, engine::KvType::f16, engine::KvType::bf16};
constexpr std::array shares = {0.25, 0.12, 0.06, 0.03};
constexpr double mebibyte = 1024.0 * 1024.0;

struct InspectArguments {
  std::filesystem::path model;
  std::string engine{small_engine};
  std::vector<std::size_t> lengths = {2048, 8192, 32768};
  std::string kv_type = "f32";
  bool json = false;
};

struct TypeCount {
  std::size_t tensors = 0;
  std::uint64_t elements = 0;
};

/// A short file may hold no vocabulary or template that we know; that is worth a line, not a failure.
std::string chat_family(const engine::Tokenizer& tokenizer) {
  try {
    return std::string(engine::name(engine::ChatTemplate{tokenizer}.family()));
  } catch (const engine::Error& error) {
    return fmt::format("none ({})", error.what());
  }
}

/// Rows a layer that a share keeps of a prompt, as the library resolves it.
std::size_t rows_kept(const compresskv::ModelShape& shape, double share, std::size_t length) {
  const std::size_t window = compresskv::score::SemanticRetrieval::Options{}.window;
  return compresskv::Budget::kept_ratio(share).resolve(length, window, shape);
}

/// Bytes of keys and values of so many tokens.
std::uint64_t cache_bytes(const compresskv::ModelShape& shape, std::size_t tokens) {
  return std::uint64_t{tokens} * shape.layers * shape.kv_heads * shape.kv_row_bytes;
}

Json savings_json(const InspectArguments& arguments, const compresskv::ModelShape& shape) {
  Json savings = Json::array();
  for (const std::size_t length : arguments.lengths) {
    for (const double share : shares) {
      const std::size_t rows = rows_kept(shape, share, length);
      savings.push_back({{"tokens", length},
                         {"kv_type", arguments.kv_type},
                         {"kept", share},
                         {"rows", rows},
                         {"kv_bytes_full", cache_bytes(shape, length)},
                         {"kv_bytes_kept", cache_bytes(shape, rows)}});
    }
  }
  return savings;
}

Json inspect_json(const InspectArguments& arguments, const engine::GgufFile& file,
                  const engine::ModelConfig& config, const engine::Tokenizer& tokenizer,
                  const std::map<std::string, TypeCount>& types) {
  Json out;
  out["file"] = arguments.model.string();
  out["file_bytes"] = file.file_bytes();
  out["gguf_version"] = file.version();
  out["model_sha256"] = engine::sha256_of_file(arguments.model);
  out["name"] = config.name;
  out["architecture"] = file.get<std::string>("general.architecture");
  out["layers"] = config.layers;
  out["query_heads"] = config.heads;
  out["kv_heads"] = config.kv_heads;
  out["head_dim"] = config.head_dim;
  out["embedding"] = config.embedding;
  out["feed_forward"] = config.feed_forward;
  out["vocabulary"] = config.vocabulary;
  out["context"] = config.context;
  out["rope_base"] = config.rope_base;
  out["rope_scaling"] = config.rope_scaling;
  out["tied_output"] = config.tied_output;
  out["tokenizer"] = {{"model", file.get<std::string>("tokenizer.ggml.model")},
                      {"pre", file.find<std::string>("tokenizer.ggml.pre").value_or("")},
                      {"tokens", tokenizer.size()},
                      {"chat", chat_family(tokenizer)}};
  for (const auto& [name, count] : types) {
    out["tensors"][name] = {{"tensors", count.tensors}, {"elements", count.elements}};
  }
  for (const engine::KvType type : kv_types) {
    out["kv_bytes_per_token"][std::string(engine::kv_type_name(type))] =
        engine::Sequence::full_cache_bytes(config, type, 1);
  }
  out["savings"] = savings_json(arguments, shape_of(config, engine::parse_kv_type(arguments.kv_type)));
  return out;
}

void print_savings(const InspectArguments& arguments, const compresskv::ModelShape& shape,
                   std::size_t context) {
  const auto mib = [&](std::size_t tokens) {
    return static_cast<double>(cache_bytes(shape, tokens)) / mebibyte;
  };
  fmt::print("\nKV cache of one sequence in {}, MiB\n", arguments.kv_type);
  std::vector<Table::Column> columns = {{.title = "tokens", .width = 10}, {.title = "full", .width = 11}};
  for (const double share : shares) {
    columns.push_back({.title = fmt::format("{:.0f} %", 100.0 * share), .width = 11});
  }
  columns.push_back({.title = "saved at 12 %", .width = 15});
  columns.push_back({.title = "", .width = 30, .left = true});
  const Table table{columns};
  for (const std::size_t length : arguments.lengths) {
    std::vector<std::string> cells = {std::to_string(length), fmt::format("{:.1f}", mib(length))};
    for (const double share : shares) {
      cells.push_back(fmt::format("{:.1f}", mib(rows_kept(shape, share, length))));
    }
    cells.push_back(fmt::format("{:.1f}", mib(length) - mib(rows_kept(shape, 0.12, length))));
    cells.emplace_back(length > context ? "  beyond the model's context" : "");
    table.row(cells);
  }
}

/// The model's shape without the layers that slide: they hold a window, however long the prompt.
compresskv::ModelShape compressed_shape(const LlamaFacts& facts, engine::KvType type) {
  compresskv::ModelShape shape = facts.model->shape(type);
  shape.layers -= facts.sliding_layers.size();
  return shape;
}

std::string compression_of(const LlamaFacts& facts) {
  if (!facts.why_not.empty()) {
    return fmt::format("no: {}", facts.why_not);
  }
  if (facts.sliding_layers.empty()) {
    return "yes, with equal rows in all layers";
  }
  return fmt::format("yes, with equal rows in {} layers; {} slide over {} tokens and stay whole: {}",
                     facts.model->layers() - facts.sliding_layers.size(), facts.sliding_layers.size(),
                     facts.sliding_window, fmt::join(facts.sliding_layers, " "));
}

Json inspect_json(const InspectArguments& arguments, const LlamaFacts& facts) {
  const ModelEngine& model = *facts.model;
  Json out;
  out["file"] = arguments.model.string();
  out["file_bytes"] = std::filesystem::file_size(arguments.model);
  out["model_sha256"] = engine::sha256_of_file(arguments.model);
  out["engine"] = model.engine_name();
  out["name"] = facts.name;
  out["architecture"] = facts.architecture;
  out["description"] = facts.description;
  out["parameters"] = facts.parameters;
  out["layers"] = model.layers();
  out["query_heads"] = facts.query_heads;
  out["kv_heads"] = facts.kv_heads;
  out["embedding"] = facts.embedding;
  out["vocabulary"] = facts.vocabulary;
  out["context"] = model.context();
  out["chat"] = facts.why_no_chat.empty();
  out["compresses"] = facts.why_not.empty();
  out["why_not"] = facts.why_not.empty() ? Json() : Json(facts.why_not);
  if (facts.why_not.empty()) {
    out["head_dim"] = model.shape(engine::KvType::f32).head_dim;
    out["sliding_layers"] = facts.sliding_layers;
    out["sliding_window"] = facts.sliding_layers.empty() ? Json() : Json(facts.sliding_window);
    for (const engine::KvType type : kv_types) {
      out["kv_bytes_per_token"][std::string(engine::kv_type_name(type))] =
          cache_bytes(compressed_shape(facts, type), 1);
    }
    out["savings"] =
        savings_json(arguments, compressed_shape(facts, engine::parse_kv_type(arguments.kv_type)));
  }
  return out;
}

/// What llama.cpp says of a model, and whether its cache can be compressed there.
void inspect_in_llama_cpp(const InspectArguments& arguments) {
  const LlamaFacts facts = inspect_llama_cpp(arguments.model);
  const ModelEngine& model = *facts.model;
  check_interrupt();
  if (arguments.json) {
    const Json out = inspect_json(arguments, facts);
    check_interrupt();
    fmt::print("{}\n", out.dump(-1, ' ', false, Json::error_handler_t::replace));
    return;
  }
  const auto line = [](const char* what, const std::string& value) { print_entry(what, value, 14); };
  line("file", fmt::format("{} ({:.1f} MiB)", arguments.model.string(),
                           static_cast<double>(std::filesystem::file_size(arguments.model)) / mebibyte));
  line("model",
       fmt::format("{}, architecture {} ({}), {:.1f} million parameters", facts.name, facts.architecture,
                   facts.description, static_cast<double>(facts.parameters) / 1e6));
  line("shape",
       fmt::format("{} layers of {} query heads and {} KV heads, embedding {}, vocabulary {}", model.layers(),
                   facts.query_heads, facts.kv_heads, facts.embedding, facts.vocabulary));
  line("context", fmt::format("{} tokens", model.context()));
  line("chat", facts.why_no_chat.empty() ? facts.chat : fmt::format("none ({})", facts.why_no_chat));
  line("compression", compression_of(facts));
  if (facts.why_not.empty()) {
    for (const engine::KvType type : kv_types) {
      line("KV a token", fmt::format("{:<5} {:>7} bytes", engine::kv_type_name(type),
                                     cache_bytes(compressed_shape(facts, type), 1)));
    }
    print_savings(arguments, compressed_shape(facts, engine::parse_kv_type(arguments.kv_type)),
                  model.context());
  }
}

void inspect(const InspectArguments& arguments) {
  check_engine(arguments.engine);
  if (arguments.engine == llama_cpp_engine) {
    inspect_in_llama_cpp(arguments);
    return;
  }
  const engine::GgufFile file = engine::GgufFile::open(arguments.model);
  const engine::ModelConfig config = engine::read_config(file);
  const engine::Tokenizer tokenizer{engine::tokenizer_spec(file)};
  std::map<std::string, TypeCount> types;
  std::uint64_t parameters = 0;
  for (const engine::Tensor& tensor : file.tensors()) {
    TypeCount& count = types[engine::type_name(tensor.type)];
    count.tensors += 1;
    count.elements += tensor.elements;
    parameters += tensor.elements;
  }
  if (arguments.json) {
    const Json out = inspect_json(arguments, file, config, tokenizer, types);
    check_interrupt();  // the digest of a large file takes its time
    fmt::print("{}\n", out.dump(-1, ' ', false, Json::error_handler_t::replace));
    return;
  }

  const auto line = [](const char* what, const std::string& value) { print_entry(what, value, 14); };
  line("file", fmt::format("{} (GGUF v{}, {:.1f} MiB)", arguments.model.string(), file.version(),
                           static_cast<double>(file.file_bytes()) / mebibyte));
  line("model",
       fmt::format("{}, architecture {}, {:.1f} million parameters", config.name,
                   file.get<std::string>("general.architecture"), static_cast<double>(parameters) / 1e6));
  line("shape", fmt::format("{} layers of {} query heads and {} KV heads (groups of {}), head dimension {}",
                            config.layers, config.heads, config.kv_heads, config.group(), config.head_dim));
  line("", fmt::format("embedding {}, feed forward {}, output {}", config.embedding, config.feed_forward,
                       config.tied_output ? "tied to the embedding" : "of its own"));
  line("context", fmt::format("{} tokens, RoPE base {}, scaling {}", config.context, config.rope_base,
                              config.rope_scaling));
  for (const auto& [name, count] : types) {
    line("tensors", fmt::format("{:<5} {:>5} tensors, {:>8.1f} million elements", name, count.tensors,
                                static_cast<double>(count.elements) / 1e6));
  }
  line("tokenizer", fmt::format("{} {}, {} tokens", file.get<std::string>("tokenizer.ggml.model"),
                                file.find<std::string>("tokenizer.ggml.pre").value_or(""), tokenizer.size()));
  line("chat", chat_family(tokenizer));
  for (const engine::KvType type : kv_types) {
    line("KV a token", fmt::format("{:<5} {:>7} bytes", engine::kv_type_name(type),
                                   engine::Sequence::full_cache_bytes(config, type, 1)));
  }
  print_savings(arguments, shape_of(config, engine::parse_kv_type(arguments.kv_type)), config.context);
}

}  // namespace

void add_inspect(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("inspect", "What a model file holds, KV bytes a token, and what a budget saves");
  const auto arguments = std::make_shared<InspectArguments>();
  command->add_option("model", arguments->model, "The GGUF file")->required()->type_name("M.gguf");
  add_engine_option(*command, arguments->engine);
  command
      ->add_option("--length", arguments->lengths,
                   "Lengths, in tokens, at which the saving is shown: 2048,8192")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--kv-type", arguments->kv_type, "Element type of the cache: f32, f16 or bf16")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}))
      ->capture_default_str();
  command->add_flag("--json", arguments->json, "Print one JSON object");
  command->callback([arguments] { inspect(*arguments); });
}

}  // namespace ckv
