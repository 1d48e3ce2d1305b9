// A LLaMA-architecture model: its shape, read and checked from a GGUF file's metadata, and its weights as
// float32.
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gemm.hpp"
#include "gguf.hpp"
#include "thread_pool.hpp"
#include "token.hpp"

namespace engine {

/// Activations: one row a token.
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::Matrix<float, Eigen::Dynamic, 1>;

struct ModelConfig {
  std::string name;                   ///< general.name, or empty
  int layers = 0;                     ///< llama.block_count
  std::size_t context = 0;            ///< llama.context_length: the most positions the model was trained for
  int embedding = 0;                  ///< llama.embedding_length
  int feed_forward = 0;               ///< llama.feed_forward_length
  int heads = 0;                      ///< query heads
  int kv_heads = 0;                   ///< heads is a multiple of it
  int head_dim = 0;                   ///< of queries, keys and values
  int vocabulary = 0;                 ///< rows of token_embd.weight
  float rms_epsilon = 0;              ///< llama.attention.layer_norm_rms_epsilon
  int rope_dimensions = 0;            ///< the leading part of a head that is rotated
  double rope_base = 10000.0;         ///< llama.rope.freq_base
  std::string rope_scaling = "none";  ///< none, linear or yarn
  double rope_factor = 1.0;           ///< llama.rope.scaling.factor
  std::size_t rope_original_context = 0;  ///< llama.rope.scaling.original_context_length, yarn alone
  double rope_magnitude = 1.0;            ///< llama.rope.scaling.attn_factor: multiplies what yarn asks for
  double yarn_extrapolation = 1.0;        ///< llama.rope.scaling.yarn_ext_factor: 0 leaves linear scaling
  double yarn_fast = 32.0;                ///< llama.rope.scaling.yarn_beta_fast
  double yarn_slow = 1.0;                 ///< llama.rope.scaling.yarn_beta_slow
  bool tied_output = false;               ///< the output projection is the embedding

  int group() const { return heads / kv_heads; }
  /// Elements of one token's K and V over all layers; times the element size: bytes of cache a token.
  std::size_t kv_elements_per_token() const {
    return 2 * static_cast<std::size_t>(layers) * static_cast<std::size_t>(kv_heads) *
           static_cast<std::size_t>(head_dim);
  }
};

/// The shape that a file describes. Throws Error for another architecture than llama (naming it), for part of
/// a split model, for options that this engine does not have (experts, other scalings; any `llama.` key that
/// it does not know), and for values that are absent or contradict each other, the vocabulary's size among
/// them. Reads no tensor data.
ModelConfig read_config(const GgufFile& file);

/// The weights of one block. Shapes are [outputs, inputs].
struct LayerWeights {
  Vector attention_norm;     ///< [embedding]
  PackedMatrix query;        ///< [heads * head_dim, embedding]
  PackedMatrix key;          ///< [kv_heads * head_dim, embedding]
  PackedMatrix value;        ///< [kv_heads * head_dim, embedding]
  PackedMatrix output;       ///< [embedding, heads * head_dim]
  Vector feed_forward_norm;  ///< [embedding]
  PackedMatrix gate;         ///< [feed_forward, embedding]
  PackedMatrix up;           ///< [feed_forward, embedding]
  PackedMatrix down;         ///< [embedding, feed_forward]
};

struct ModelOptions {
  int threads = 0;  ///< 0: as many as the machine has
};

/// Immutable after loading, so any number of sequences may share it. Results do not depend on the thread
/// count.
class Model {
 public:
  /// Decodes every weight to float32 (4 bytes a parameter). The file may be closed afterwards.
  /// Throws Error naming a tensor that is missing, has another shape than the metadata says, is of a type
  /// without decoder, or that this engine would ignore.
  explicit Model(const GgufFile& file, ModelOptions options = {});

  const ModelConfig& config() const { return config_; }
  int threads() const { return pool_->threads(); }
  /// The threads that work on this model's products; loops of the caller's own may use them too.
  ThreadPool& pool() const { return *pool_; }
  std::span<const LayerWeights> layers() const { return layers_; }
  const PackedMatrix& embedding() const { return embedding_; }  ///< [vocabulary, embedding]
  const Vector& output_norm() const { return output_norm_; }
  const PackedMatrix& output() const { return output_ ? *output_ : embedding_; }  ///< [vocabulary, embedding]

  /// Radians a position for each rotated pair, [rope_dimensions / 2], scaling and rope_freqs included.
  std::span<const double> rope_frequencies() const { return rope_frequencies_; }
  /// What cosine and sine are multiplied by: 1 but for yarn.
  double rope_magnitude() const { return rope_magnitude_; }

 private:
  ModelConfig config_;
  std::unique_ptr<ThreadPool> pool_;
  PackedMatrix embedding_;
  std::vector<LayerWeights> layers_;
  Vector output_norm_;
  std::optional<PackedMatrix> output_;
  std::vector<double> rope_frequencies_;
  double rope_magnitude_ = 1.0;
};

}  // namespace engine
