#include <benchmark/benchmark.h>

#include <exception>
#include <iostream>
#include <string_view>

#include "compresskv/kernel/code_path.hpp"

// As benchmark's own main, with one more option: --code_path=portable (avx2, avx512, avx512_bf16) in place of
// the fastest that the CPU supports.
int main(int argc, char** argv) {
  constexpr std::string_view option = "--code_path=";
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (!argument.starts_with(option)) {
      argv[kept++] = argv[i];
      continue;
    }
    using namespace compresskv::kernel;
    const auto wanted = code_path_named(argument.substr(option.size()));
    if (!wanted) {
      std::cerr << argument << ": the code paths are portable, avx2, avx512 and avx512_bf16\n";
      return 2;
    }
    try {
      force_code_path(*wanted);
    } catch (const std::exception& error) {
      std::cerr << error.what() << '\n';
      return 1;
    }
  }
  argv[kept] = nullptr;
  benchmark::Initialize(&kept, argv);
  if (benchmark::ReportUnrecognizedArguments(kept, argv)) {
    return 2;
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
