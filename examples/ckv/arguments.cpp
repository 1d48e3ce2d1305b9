#include "arguments.hpp"

#include <fmt/core.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <system_error>

#include "engine/error.hpp"

namespace ckv {

void ModelArguments::add_to(CLI::App& command) {
  command.add_option("--model", model, "GGUF file of a model of the LLaMA architecture")
      ->required()
      ->type_name("M.gguf");
  command.add_option("--threads", threads, "Threads to use; 0: as many as the machine has")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
}

void CacheArguments::add_to(CLI::App& command, bool with_kv_type) {
  command.add_option("--window", window, "Last tokens of the prompt that observe; they are always kept")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--heads-per-layer", heads_per_layer, "Semantic retrieval heads that choose in each layer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--pool", pool, "How neighbouring tokens share scores, 5 at a time: avg or max")
      ->check(CLI::IsMember({"avg", "max"}))
      ->capture_default_str();
  if (with_kv_type) {
    command.add_option("--kv-type", kv_type, "Element type of the cache: f32, f16 or bf16")
        ->check(CLI::IsMember({"f32", "f16", "bf16"}))
        ->capture_default_str();
  }
}

void CacheArguments::apply_to(Compression& how) const {
  how.window = window;
  how.heads_per_layer = heads_per_layer;
  how.pool = pool == "max" ? compresskv::kernel::Pool::max : compresskv::kernel::Pool::average;
}

std::optional<CalibrationFiles> find_calibration(const std::filesystem::path& models,
                                                 const std::string& sha256) {
  std::error_code failure;
  for (const auto& folder : std::filesystem::directory_iterator{models, failure}) {
    const std::filesystem::path record_file = folder.path() / "calibration.json";
    if (!std::filesystem::exists(record_file, failure)) {
      continue;
    }
    const auto record = nlohmann::json::parse(read_text_file(record_file), nullptr, false);
    if (record.is_object() && record.value("model_sha256", "") == sha256) {
      const std::string name = record.value("model", "");
      return CalibrationFiles{.heads = folder.path() / (name + "_head_idx.json"),
                              .errors = folder.path() / (name + "_layer_score.jsonl"),
                              .scores = folder.path() / (name + "_head_scores.json")};
    }
  }
  return std::nullopt;
}

std::string read_text_file(const std::filesystem::path& path) {
  std::ifstream in{path, std::ios::binary};
  std::string text{std::istreambuf_iterator<char>{in}, {}};
  if (!in.good() && !in.eof()) {
    throw engine::Error(fmt::format("cannot read '{}': check the path and its permissions", path.string()));
  }
  return text;
}

void write_text_file(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::path partial = path;
  partial += ".partial";
  std::ofstream out{partial, std::ios::binary};
  out << text;
  out.close();
  std::error_code failure;
  if (out) {
    std::filesystem::rename(partial, path, failure);
  }
  if (!out || failure) {
    std::error_code ignored;
    std::filesystem::remove(partial, ignored);
    throw engine::Error(
        fmt::format("cannot write '{}': check that its folder exists and has room", path.string()));
  }
}

}  // namespace ckv
