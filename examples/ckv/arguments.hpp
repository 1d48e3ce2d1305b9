// Options that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>

#include "engine/kv_cache.hpp"
#include "method.hpp"

namespace ckv {

struct ModelArguments {
  std::filesystem::path model{};
  int threads = 0;

  void add_to(CLI::App& command);
};

/// How a cache is observed, and what it is made of.
struct CacheArguments {
  std::size_t window = 8;
  std::size_t heads_per_layer = 4;
  std::string pool = "avg";
  std::string kv_type = "f32";

  void add_to(CLI::App& command, bool with_kv_type = true);

  /// Sets what these options say; the rest of `how` is left.
  void apply_to(Compression& how) const;
  engine::KvType type() const { return engine::parse_kv_type(kv_type); }
};

/// What `ckv calibrate` has made for a model.
struct CalibrationFiles {
  std::filesystem::path heads;
  std::filesystem::path errors;
  std::filesystem::path scores = {};  ///< raw, of each head
};

/// The calibration of this very file among the folders of `models`, told by its digest.
std::optional<CalibrationFiles> find_calibration(const std::filesystem::path& models,
                                                 const std::string& sha256);

/// A file's bytes. Throws engine::Error naming it.
std::string read_text_file(const std::filesystem::path& path);

/// Writes a file whole or not at all: beside its place first, then renamed. Throws engine::Error naming it.
void write_text_file(const std::filesystem::path& path, const std::string& text);

}  // namespace ckv
