#include "model_engine.hpp"

#include <fmt/core.h>

#include <numeric>

#include "llama_cpp/load.hpp"
#include "run.hpp"
#include "usage_error.hpp"

namespace ckv {
namespace {

/// Why a method does not go with llama.cpp; empty where it does.
std::string_view why_not_in_llama_cpp(Method method) {
  switch (method) {
    case Method::pyramidkv:
    case Method::cake:
      return "gives layers unequal rows, and a cell of llama.cpp is one row of all layers";
    case Method::adakv:
    case Method::compresskv_adaptive:
    case Method::expected_attention_adaptive:
    case Method::duoattention:
    case Method::kvzip_heads:
      return "gives KV heads unequal rows, and a cell of llama.cpp is one row of all heads";
    case Method::h2o:
      return "wants the attention of all queries, which llama.cpp does not show";
    case Method::criticalkv:
      return "weighs values by the model's output projection, which llama.cpp does not show";
    case Method::kvzip:
    case Method::kvzip_plus:
      return "feeds the context once more, which is built for the small engine alone";
    default:
      return {};
  }
}

}  // namespace

std::vector<std::size_t> ModelEngine::compressed_layers() const {
  std::vector<std::size_t> all(layers());
  std::iota(all.begin(), all.end(), std::size_t{0});
  return all;
}

void ModelEngine::show_outputs(Compression& how) const {
  if (info(how.method).needs_outputs) {
    how.output_weights = output_weights();
  }
}

engine::PromptText ModelEngine::chat_prompt(const std::string& message) const {
  const engine::ChatMessage user{.role = "user", .content = message};
  return lay_out({&user, 1});
}

void check_engine(std::string_view engine) {
  if (engine == llama_cpp_engine && !has_llama_cpp()) {
    throw UsageError(
        "--engine llama.cpp: this ckv was built without libllama; run scripts/llama_cpp.sh, which builds it "
        "once, then configure and build again");
  }
}

bool goes_with_llama_cpp(Method method) { return why_not_in_llama_cpp(method).empty(); }

void check_method_of_llama_cpp(Method method) {
  if (const std::string_view why = why_not_in_llama_cpp(method); !why.empty()) {
    throw UsageError(
        fmt::format("--method {} does not go with --engine llama.cpp: it {}; take compresskv, snapkv or "
                    "model-wide, or the small engine",
                    info(method).name, why));
  }
}

std::unique_ptr<ModelEngine> load_engine(std::string_view engine, const std::filesystem::path& path,
                                         int threads) {
  check_engine(engine);
  if (engine == llama_cpp_engine) {
    return load_llama_cpp(path, threads);
  }
  return std::make_unique<LoadedModel>(load_model(path, threads));
}

}  // namespace ckv
