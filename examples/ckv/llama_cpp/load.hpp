// The engine llama.cpp, where libllama was found; model.cpp has it, else missing.cpp says that it is not
// there.
#pragma once

#include <filesystem>
#include <memory>

#include "../model_engine.hpp"

namespace ckv {

/// Whether this tool was built with libllama.
bool has_llama_cpp();

/// Throws engine::Error. `threads` 0: as many as the machine has.
std::unique_ptr<ModelEngine> load_llama_cpp(const std::filesystem::path& path, int threads);

}  // namespace ckv
