#include "arguments.hpp"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <compresskv/io/json_file.hpp>
#include <compresskv/io/text_file.hpp>
#include <cstdint>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <vector>

#include "terminal.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

namespace fs = std::filesystem;
namespace files = compresskv::io::detail;

constexpr std::uint64_t most_threads = 1024;

/// Reads all of `text` as a number; nothing where it is none or out of the type's range.
template <class Number>
std::optional<Number> number_of(std::string_view text) {
  Number number{};
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
  const bool whole = failure == std::errc{} && end == text.data() + text.size();
  return whole ? std::optional(number) : std::nullopt;
}

enum class Sign { any, not_negative, positive };

/// What is wrong with a real number; nothing where it is one. Some are kept as float.
std::string check_real(const std::string& text, Sign sign) {
  const auto number = number_of<double>(text);
  if (!number || !(std::abs(*number) <= std::numeric_limits<float>::max())) {
    return fmt::format("'{}' is no finite number, such as 0.25", text);
  }
  if (sign == Sign::positive && *number <= 0.0) {
    return fmt::format("'{}' is not above 0: give more than 0", text);
  }
  return sign == Sign::not_negative && *number < 0.0 ? fmt::format("'{}' is below 0: give 0 or more", text)
                                                     : std::string();
}

/// Options of any subcommand that name a file for reading. Others name one for writing, or a folder.
bool is_input(const CLI::Option& option) {
  constexpr std::array<std::string_view, 11> names = {
      "--model",       "model",        "--prompt-file", "--heads",    "--errors",    "--haystack",
      "--needle-file", "--statistics", "--surrogate",   "--kv-heads", "--load-cache"};
  const bool is_flag = option.get_items_expected_max() == 0;  // as are three of calibrate
  return !is_flag && std::find(names.begin(), names.end(), option.get_name()) != names.end();
}

/// What is wrong with what lies at a path. A prompt may come through a pipe; the others are read twice. One
/// that is absent is left to `wrong_input`: what the options say among themselves comes first.
std::string check_input(const std::string& path, bool may_be_pipe) {
  std::error_code unknown;
  if (!path.empty() && fs::status(path, unknown).type() == fs::file_type::not_found) {
    return {};
  }
  const std::string wrong = files::why_not_read(path, may_be_pipe);
  return wrong.empty() ? wrong : fmt::format("'{}': {}", path, wrong);
}

/// What shows in the first bytes of a file that it is no JSON object. The loaders pass over a byte-order mark
/// of UTF-8, too.
std::string why_no_json(const std::string& path) {
  std::array<char, 3> start{};
  std::ifstream in{path, std::ios::binary};
  in.read(start.data(), start.size());
  const std::string_view mark(start.data(), start.size());
  if (mark.starts_with("\xFF\xFE") || mark.starts_with("\xFE\xFF")) {
    return "is UTF-16, by its byte-order mark, and not UTF-8";
  }
  in.clear();
  in.seekg(mark == "\xEF\xBB\xBF" ? 3 : 0);
  char first = '\0';
  return (in >> first) && first == '{' ? "" : "is no JSON";
}

/// Goes over all options, those of groups too.
template <class App, class Visit>
void for_options(App& app, const Visit& visit) {
  for (auto* option : app.get_options()) {
    visit(*option);
  }
  for (auto* inner : app.get_subcommands([](const CLI::App*) { return true; })) {
    for_options(*inner, visit);
  }
}

}  // namespace

std::string check_count(std::string& text, std::uint64_t least, std::uint64_t most) {
  const auto number = number_of<std::uint64_t>(text);
  if (!number || *number < least || *number > most) {
    return fmt::format("'{}' is no whole number from {} to {}", text, least, most);
  }
  text = std::to_string(*number);
  return {};
}

void check_values(CLI::App& app) {
  for_options(app, [](CLI::Option& option) {
    // What CLI11 shows of an option in the help says what it takes: its type, then what its own validators
    // are called. `transform` puts this one before them, so that its message is the one that is seen.
    const std::string type = option.get_type_name();
    const auto says = [&](const char* word) { return type.find(word) != std::string::npos; };
    const Sign sign = says("POSITIVE")      ? Sign::positive
                      : says("NONNEGATIVE") ? Sign::not_negative
                                            : Sign::any;
    CLI::Validator validator;
    if (is_input(option)) {
      const bool may_be_pipe = option.get_name() == "--prompt-file";
      validator.operation([may_be_pipe](std::string& path) { return check_input(path, may_be_pipe); });
    } else if (says("SIZE")) {
      return;  // byte_count looks at it
    } else if (says("FLOAT")) {
      validator.operation([sign](std::string& text) { return check_real(text, sign); });
    } else if (type.starts_with("INT")) {
      validator.operation([](std::string& text) { return check_count(text, 0, most_threads); });
    } else if (says("UINT") || sign == Sign::positive) {
      const std::uint64_t most = sign == Sign::any ? any_number : most_tokens;
      const std::uint64_t least = sign == Sign::positive ? 1 : 0;
      validator.operation([=](std::string& text) { return check_count(text, least, most); });
    } else {
      return;
    }
    option.transform(validator);  // before those that are there
  });
}

std::optional<std::string> wrong_input(const CLI::App& app) {
  std::optional<std::string> wrong;
  for_options(app, [&](const CLI::Option& option) {
    if (wrong || !is_input(option)) {
      return;
    }
    for (const std::string& path : option.results()) {
      std::string why = files::why_not_read(path, true);
      if (why.empty() && access(path.c_str(), R_OK) != 0) {
        why = files::cannot_be_opened(errno);
      }
      if (!why.empty()) {
        wrong = fmt::format("{} '{}': {}", option.get_name(), path, why);
      } else if (option.get_name() == "--heads" || option.get_name() == "--errors") {
        const std::string ending = option.get_name() == "--heads"
                                       ? "NAME_head_idx.json or NAME_head_scores.json"
                                       : "NAME_layer_score.jsonl";
        if (const std::string other = why_no_json(path); !other.empty()) {
          wrong = fmt::format("{} '{}': {}: give one of the files that `ckv calibrate` writes, {}",
                              option.get_name(), path, other, ending);
        }
      }
    }
  });
  return wrong;
}

CLI::Validator byte_count() {
  return {[units = CLI::AsSizeValue(true)](std::string& text) -> std::string {
            const std::size_t unit = std::min(text.find_first_not_of("0123456789"), text.size());
            std::string number = text.substr(0, unit);
            std::string bytes;
            try {
              if (check_count(number, 1, any_number).empty()) {
                bytes = number + text.substr(unit);
                if (!units(bytes).empty()) {
                  bytes.clear();
                }
              }
            } catch (const CLI::Error&) {
              bytes.clear();
            }
            if (bytes.empty()) {
              return fmt::format(
                  "'{}' is no whole number from 1 to {} bytes, in units of your choice: 2MiB, 500kB", text,
                  any_number);
            }
            text = bytes;
            return {};
          },
          "SIZE [b, kB, KiB, MB, MiB, ...]"};
}

CLI::Validator share() {
  return {[](std::string& text) -> std::string {
            const auto number = number_of<double>(text);
            return number && *number >= 0.0 && *number <= 1.0
                       ? std::string()
                       : fmt::format("'{}' is no number from 0 to 1", text);
          },
          "0 to 1"};
}

void add_engine_option(CLI::App& command, std::string& engine) {
  command
      .add_option(
          "--engine", engine,
          "What runs the model: small, our own for the LLaMA architecture, or llama.cpp, for all that "
          "it runs")
      ->check(CLI::IsMember({std::string(small_engine), std::string(llama_cpp_engine)}))
      ->capture_default_str();
}

void refuse_with_llama_cpp(std::initializer_list<GivenOption> options) {
  for (const auto& [option, given] : options) {
    if (given) {
      throw UsageError(
          fmt::format("{} does not go with --engine llama.cpp: drop it, or take the small engine", option));
    }
  }
}

void needs_small_engine(const std::string& option, std::string_view not_shown) {
  throw UsageError(
      fmt::format("{} does not go with --engine llama.cpp, which does not show {}: drop it, or take --engine "
                  "small, which needs a model of the LLaMA architecture",
                  option, not_shown));
}

void ModelArguments::add_to(CLI::App& command) {
  command
      .add_option("--model", model,
                  "GGUF file: of the LLaMA architecture, or in llama.cpp of any that it runs")
      ->required()
      ->type_name("M.gguf");
  add_engine_option(command, engine);
  command.add_option("--threads", threads, "Threads to use; 0: as many as the machine has")
      ->capture_default_str();
}

namespace {

/// By `kernel::Pool`.
const std::vector<std::string>& pools() {
  static const std::vector<std::string> names = {"avg", "max", "trailing"};
  return names;
}

}  // namespace

std::string pool_names() { return "avg, max or trailing"; }

std::optional<compresskv::kernel::Pool> pool_named(std::string_view name) {
  const auto found = std::find(pools().begin(), pools().end(), name);
  return found == pools().end()
             ? std::nullopt
             : std::optional(static_cast<compresskv::kernel::Pool>(found - pools().begin()));
}

void CacheArguments::add_to(CLI::App& command, bool with_kv_type) {
  command
      .add_option(
          "--window", window,
          "Last tokens of the prompt that observe; they are always kept. Default: the method's own, 8 "
          "of the paper's methods, 16 of carried, model-wide and the blends")
      ->check(CLI::PositiveNumber);
  command
      .add_option("--heads-per-layer", heads_per_layer, "Semantic retrieval heads that choose in each layer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option(
          "--pool", pool,
          "How neighbouring tokens share scores: avg or max of those around, or trailing, the average "
          "of a token and those before it. Default: the method's own, avg but for the blends")
      ->check(CLI::IsMember(pools()));
  if (with_kv_type) {
    command.add_option("--kv-type", kv_type, "Element type of the cache: f32, f16 or bf16")
        ->check(CLI::IsMember({"f32", "f16", "bf16"}))
        ->capture_default_str();
  }
}

void CacheArguments::fill(Method method) {
  window = window.value_or(info(method).window);
  if (pool.empty()) {
    pool = pools()[static_cast<std::size_t>(info(method).pool)];
  }
}

void CacheArguments::apply_to(Compression& how) const {
  how.window = window;
  how.heads_per_layer = heads_per_layer;
  how.pool = pool_named(pool);
}

void check_measured(const CalibrationFiles& files, const MethodInfo& method, const std::string& asked_by,
                    const fs::path& models_dir, const fs::path& model) {
  for (const MeasuredWhenAsked& row : measured_when_asked) {
    if (method.*row.needed && (files.*row.file).empty()) {
      throw UsageError(fmt::format(
          "{} {}", asked_by, fmt::format(fmt::runtime(row.missing), models_dir.string(), model.string())));
    }
  }
}

std::optional<CalibrationFiles> find_calibration(const fs::path& models, const std::string& sha256) {
  std::vector<std::string> unread;  // one may be of this very model
  std::error_code failure;
  for (const auto& folder : fs::directory_iterator{models, failure}) {
    const fs::path record_file = folder.path() / "calibration.json";
    if (!fs::exists(record_file, failure)) {
      continue;
    }
    try {
      const auto refuse = [&](const std::string& why) { files::fail(record_file, why); };
      const auto record = files::parse_json<nlohmann::json>(files::read_text(record_file), "", refuse);
      const auto text = [&](const char* key) {
        const auto found = record.is_object() ? record.find(key) : record.end();
        return found != record.end() && found->is_string() ? found->get<std::string>() : std::string();
      };
      if (text("model_sha256") == sha256) {
        const std::string name = text("model");
        CalibrationFiles made{.heads = folder.path() / (name + "_head_idx.json"),
                              .errors = folder.path() / (name + "_layer_score.jsonl"),
                              .scores = folder.path() / (name + "_head_scores.json"),
                              .statistics = folder.path() / (name + "_query_statistics.bin"),
                              .kv_heads = folder.path() / (name + "_kv_head_scores.json"),
                              .surrogate = folder.path() / (name + "_surrogate.bin")};
        for (const MeasuredWhenAsked& row : measured_when_asked) {
          if (!fs::exists(made.*row.file, failure)) {
            (made.*row.file).clear();
          }
        }
        if (text("engine") == llama_cpp_engine) {  // where no layer errors are measured
          made.errors.clear();
        }
        return made;
      }
    } catch (const compresskv::FileError& error) {
      unread.push_back(fmt::format("passed over: {}", error.what()));
    }
  }
  for (const std::string& message : unread) {
    complain(message);
  }
  return std::nullopt;
}

std::string read_text_file(const fs::path& path) {
  const std::string wrong = files::why_not_read(path, true);
  files::require(wrong.empty(), path, wrong);
  std::string text;
  files::read_pieces(path, [&](std::string_view piece) {
    text += piece;
    check_interrupt();
  });
  return text;
}

void write_text_file(const fs::path& path, const std::string& text) {
  std::error_code unknown;
  const fs::file_status there = fs::status(path, unknown);
  if (!fs::exists(there) || fs::is_regular_file(there) || fs::is_directory(there)) {
    files::write_text(path, text);
    return;
  }
  const std::string stopped = files::overwrite(path, text);
  files::require(stopped.empty(), path, "cannot be written, ", stopped, ": give the path of a file");
}

void check_writable(const char* option, const fs::path& path) {
  std::string wrong = files::why_not_written(path, true);
  if (wrong.empty()) {
    const fs::path folder = files::behind_links(path).parent_path();
    const bool there = fs::exists(path);
    const bool is_file = !there || fs::is_regular_file(path);
    if ((there && access(path.c_str(), W_OK) != 0) ||
        (is_file && access(folder.empty() ? "." : folder.c_str(), W_OK | X_OK) != 0)) {
      wrong = fmt::format("cannot be written, {}: check the permissions", files::reason_of(errno));
    }
  }
  if (!wrong.empty()) {
    throw UsageError(fmt::format("{} '{}': {}", option, path.string(), wrong));
  }
}

}  // namespace ckv
