// ckv: runs a language model from a compressed KV cache, finds out which heads retrieve, shows what it saves.
// Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + signal: ended by Ctrl-C (130) or SIGTERM (143).

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "commands.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

namespace {

/// Throws UsageError where the first word is none of the subcommands: CLI11 says only that it wants one.
void check_subcommand(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    names.push_back(command->get_name());
  }
  const std::string first = argc > 1 ? argv[1] : "";
  if (argc > 1 && !first.starts_with('-') && std::find(names.begin(), names.end(), first) == names.end()) {
    throw ckv::UsageError(
        fmt::format("there is no subcommand '{}': give one of {}", first, fmt::join(names, ", ")));
  }
}

int run(CLI::App& app, int argc, char** argv) {
  try {
    if (argc <= 1) {
      std::fputs(app.help().c_str(), stderr);
      return 2;
    }
    check_subcommand(app, argc, argv);
    app.parse(argc, argv);
    ckv::flush_stdout();
    return 0;
  } catch (const CLI::Success& help) {
    std::ostringstream text;
    app.exit(help, text, text);
    std::fputs(text.str().c_str(), stdout);
    ckv::flush_stdout();
    return 0;
  } catch (const CLI::ParseError& error) {
    app.exit(error);
    return 2;
  } catch (const ckv::UsageError& error) {
    ckv::complain(error.what());
    return 2;
  } catch (const ckv::Interrupted& interrupted) {
    ckv::complain(interrupted.what());
    return 128 + interrupted.signal();
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Answers from a compressed KV cache of a model in a GGUF file.", "ckv"};
  app.set_version_flag("--version", CKV_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage (an option, a "
      "value, a\nfile that is not there; no subcommand at all), 130 ended by Ctrl-C, 143 by SIGTERM.");
  ckv::open_standard_streams();
  ckv::catch_interrupts();
  std::string problem;
  try {
    ckv::add_generate(app);
    ckv::add_calibrate(app);
    ckv::add_demo(app);
    ckv::add_evaluate(app);
    ckv::add_inspect(app);
    ckv::check_values(app);
    return run(app, argc, argv);
  } catch (const std::bad_alloc&) {
    problem = "out of memory: ask for less at a time, fewer or shorter";
  } catch (const std::exception& error) {
    problem = error.what();
  }
  // A wrong file may have come to light as anything; it is what the user can mend.
  if (const auto wrong = ckv::wrong_input(app)) {
    ckv::complain(*wrong);
    return 2;
  }
  if (const std::string_view what = "cannot write to stdout";
      std::ferror(stdout) != 0 && !problem.starts_with(what)) {  // fmt does not say which file
    problem = fmt::format("{}: {}", what, problem);
  }
  ckv::complain(problem);
  return 1;
}
