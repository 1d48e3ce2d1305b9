// ckv: runs a language model from a compressed KV cache, finds out which heads retrieve, shows what it saves.
// Exit codes: 0 done, 1 failed, 2 wrong usage.

#include <fmt/core.h>

#include <cstdio>
#include <exception>

#include "commands.hpp"
#include "terminal.hpp"
#include "usage_error.hpp"

int main(int argc, char** argv) {
  CLI::App app{"Answers from a compressed KV cache: models of the LLaMA architecture in GGUF files.", "ckv"};
  app.set_version_flag("--version", CKV_VERSION);
  app.require_subcommand(1);
  app.footer("Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.");
  ckv::add_generate(app);
  ckv::add_calibrate(app);
  ckv::add_demo(app);
  ckv::add_evaluate(app);
  ckv::add_inspect(app);
  ckv::catch_interrupts();
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const ckv::UsageError& error) {
    fmt::print(stderr, "ckv: {}\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    fmt::print(stderr, "ckv: {}\n", error.what());
    return 1;
  }
}
