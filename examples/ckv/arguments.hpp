// Options that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "engine/kv_cache.hpp"
#include "method.hpp"
#include "model_engine.hpp"

namespace ckv {

constexpr std::uint64_t any_number = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint64_t most_tokens = std::numeric_limits<std::uint32_t>::max();  ///< positions have 32 bits

/// What is wrong with a count, with its bounds; nothing, and `text` as CLI11 reads it, where it is one: 010
/// is ten.
std::string check_count(std::string& text, std::uint64_t least, std::uint64_t most);

/// Has every number that the subcommands take checked as it is written, whichever option it belongs to: CLI11
/// alone takes -1 for 2^64 - 1, what is above 2^64 for that, 010 for 8, and nan for a share. Also that what
/// is named for reading is a file. Wrong usage otherwise, which names the option, the value and its bound.
void check_values(CLI::App& app);

/// What is wrong at sight with the first file that was named for reading, where something is: it is not
/// there, or is no JSON where that is wanted.
std::optional<std::string> wrong_input(const CLI::App& app);

/// A validator of an amount of bytes, a whole number and perhaps a unit: 2MiB, 500kB.
CLI::Validator byte_count();

/// A validator of a number from 0 to 1.
CLI::Validator share();

struct ModelArguments {
  std::filesystem::path model{};
  std::string engine{small_engine};
  int threads = 0;

  void add_to(CLI::App& command);
  bool is_llama_cpp() const { return engine == llama_cpp_engine; }
};

/// Adds `--engine`.
void add_engine_option(CLI::App& command, std::string& engine);

/// An option, and whether it was given.
using GivenOption = std::pair<std::string, bool>;

/// Throws UsageError, naming the option and what to do, where one was given.
void refuse_with_llama_cpp(std::initializer_list<GivenOption> options);

/// Throws UsageError: the option asks for what llama.cpp does not show.
[[noreturn]] void needs_small_engine(const std::string& option, std::string_view not_shown);

/// "avg, max or trailing".
std::string pool_names();
std::optional<compresskv::kernel::Pool> pool_named(std::string_view name);

/// How a cache is observed, and what it is made of.
struct CacheArguments {
  std::optional<std::size_t> window = std::nullopt;  ///< absent: the method's own
  std::size_t heads_per_layer = 4;
  std::string pool = {};  ///< of `pool_names()`; empty: the method's own
  std::string kv_type = "f32";

  void add_to(CLI::App& command, bool with_kv_type = true);

  /// What was not given becomes the method's own.
  void fill(Method method);
  /// Sets what these options say; the rest of `how` is left.
  void apply_to(Compression& how) const;
  engine::KvType type() const { return engine::parse_kv_type(kv_type); }
};

/// What `ckv calibrate` has made for a model.
struct CalibrationFiles {
  std::filesystem::path heads;
  std::filesystem::path errors;
  std::filesystem::path scores = {};      ///< raw, of each head
  std::filesystem::path statistics = {};  ///< of queries; empty where they were not measured
  std::filesystem::path kv_heads = {};    ///< scores of KV heads; likewise
  std::filesystem::path surrogate = {};   ///< of scores; empty where none was fitted
};

/// A file of a calibration that is there only where it was asked for: an empty path where it was not.
struct MeasuredWhenAsked {
  bool MethodInfo::*needed;                       ///< by methods with this
  std::filesystem::path CalibrationFiles::*file;  ///< where it is
  /// What is left to say where a method needs it and it is not there: who makes it.
  std::string_view missing;
};

inline constexpr std::array<MeasuredWhenAsked, 3> measured_when_asked = {{
    {&MethodInfo::needs_statistics, &CalibrationFiles::statistics,
     "needs --statistics: no query statistics of this model in '{}'; `ckv calibrate --model {} --out DIR "
     "--statistics` makes them"},
    {&MethodInfo::needs_kv_scores, &CalibrationFiles::kv_heads,
     "needs --kv-heads: no scores of KV heads of this model in '{}'; `ckv calibrate --model {} --out DIR "
     "--kv-heads` makes them"},
    {&MethodInfo::needs_surrogate, &CalibrationFiles::surrogate,
     "needs --surrogate: none of this model in '{}'; `ckv calibrate --model {} --out DIR --surrogate` makes "
     "one"},
}};

/// Throws UsageError where a method needs what is not there. `asked_by`: the option and its value.
void check_measured(const CalibrationFiles& files, const MethodInfo& method, const std::string& asked_by,
                    const std::filesystem::path& models_dir, const std::filesystem::path& model);

/// The calibration of this very file among the folders of `models`, told by its digest. Records that cannot
/// be read are passed over, and named on stderr where no other is the one.
std::optional<CalibrationFiles> find_calibration(const std::filesystem::path& models,
                                                 const std::string& sha256);

/// The bytes of a file or a pipe. Throws compresskv::FileError naming it and the system's reason; Interrupted
/// where a pipe keeps it waiting and a signal comes.
std::string read_text_file(const std::filesystem::path& path);

/// Writes a file as the library does, whole or not at all; what is there and no file, such as /dev/stdout, is
/// written to as it is. Throws compresskv::FileError naming it and the system's reason.
void write_text_file(const std::filesystem::path& path, const std::string& text);

/// Throws UsageError, naming the option, where `write_text_file` could not even begin: before hours of work.
void check_writable(const char* option, const std::filesystem::path& path);

}  // namespace ckv
