#include "engine/error.hpp"
#include "load.hpp"

namespace ckv {

bool has_llama_cpp() { return false; }

std::unique_ptr<ModelEngine> load_llama_cpp(const std::filesystem::path& /*path*/, int /*threads*/) {
  throw engine::Error("this ckv was built without libllama");
}

LlamaFacts inspect_llama_cpp(const std::filesystem::path& path) { return {.model = load_llama_cpp(path, 0)}; }

}  // namespace ckv
