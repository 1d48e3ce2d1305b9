#pragma once

#include <CLI/CLI.hpp>

namespace ckv {

// Each adds its subcommand, which runs while the command line is parsed and throws where it fails.
void add_generate(CLI::App& app);
void add_calibrate(CLI::App& app);
void add_demo(CLI::App& app);
void add_inspect(CLI::App& app);
void add_evaluate(CLI::App& app);

}  // namespace ckv
