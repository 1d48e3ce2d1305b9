#pragma once

#include <llama.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"

namespace compresskv::llama_cpp::detail {

struct BatchToken {
  std::size_t position = 0;
  std::vector<llama_seq_id> sequences;
  std::vector<llama_seq_id> wanted_by;  // sequences of whose window it is
};

/// Tokens that libllama computes in one graph, in its order: stream after stream.
struct MicroBatch {
  std::vector<BatchToken> tokens;
  bool any_wanted = false;

  bool wanted() const { return any_wanted; }
};

/// A batch cut into micro-batches as libllama cuts it: `llama_n_ubatch` tokens in order where all sequences
/// share one stream of cells; else equally many of sequences that follow one another. `Observer` holds the
/// graph's own token counts and positions against it.
class MicroBatches {
 public:
  MicroBatches() = default;

  MicroBatches(llama_context& context, const llama_batch& batch, std::size_t window, std::size_t following) {
    std::vector<BatchToken> tokens = tokens_of(context, batch);
    mark_wanted(tokens, window, following);
    const std::size_t most = llama_n_ubatch(&context);
    const bool one_stream =
        llama_n_seq_max(&context) == 1 || llama_n_ctx_seq(&context) == llama_n_ctx(&context);
    if (one_stream) {
      cut_in_order(std::move(tokens), most);
    } else {
      cut_equally(std::move(tokens), most);
    }
    for (MicroBatch& micro : batches_) {
      micro.any_wanted =
          std::ranges::any_of(micro.tokens, [](const BatchToken& token) { return !token.wanted_by.empty(); });
    }
  }

  /// One that has nothing where `index` is beyond the last.
  const MicroBatch& at(std::ptrdiff_t index) const {
    return index >= 0 && static_cast<std::size_t>(index) < batches_.size()
               ? batches_[static_cast<std::size_t>(index)]
               : none_;
  }
  const std::vector<llama_seq_id>& sequences() const { return sequences_; }

 private:
  std::vector<BatchToken> tokens_of(llama_context& context, const llama_batch& batch) {
    std::vector<BatchToken> tokens(static_cast<std::size_t>((std::max)(batch.n_tokens, 0)));
    std::map<llama_seq_id, std::size_t> next;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      BatchToken& token = tokens[i];
      if (batch.seq_id == nullptr || batch.n_seq_id == nullptr) {
        token.sequences = {0};
      } else {
        token.sequences.assign(batch.seq_id[i], batch.seq_id[i] + batch.n_seq_id[i]);
      }
      for (const llama_seq_id sequence : token.sequences) {
        if (std::ranges::find(sequences_, sequence) == sequences_.end()) {
          sequences_.push_back(sequence);
          next[sequence] =
              static_cast<std::size_t>(llama_memory_seq_pos_max(llama_get_memory(&context), sequence) + 1);
        }
      }
      std::size_t& own = next[token.sequences.at(0)];
      token.position = batch.pos == nullptr ? own : static_cast<std::size_t>((std::max)(batch.pos[i], 0));
      own = token.position + 1;
    }
    return tokens;
  }

  /// From the end: the last `window` tokens of each sequence, `following` of which are still to come.
  static void mark_wanted(std::vector<BatchToken>& tokens, std::size_t window, std::size_t following) {
    std::map<llama_seq_id, std::size_t> behind;
    for (auto token = tokens.rbegin(); token != tokens.rend(); ++token) {
      for (const llama_seq_id sequence : token->sequences) {
        if (behind[sequence]++ + following < window) {
          token->wanted_by.push_back(sequence);
        }
      }
    }
  }

  void cut_in_order(std::vector<BatchToken> tokens, std::size_t most) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (i % most == 0) {
        batches_.emplace_back();
      }
      batches_.back().tokens.push_back(std::move(tokens[i]));
    }
  }

  void cut_equally(std::vector<BatchToken> tokens, std::size_t most) {
    // Sequences in order of their first token that is left; those that take part have consecutive numbers.
    std::vector<bool> used(tokens.size());
    for (std::size_t left = tokens.size(); left > 0;) {
      std::vector<std::vector<std::size_t>> parts;
      llama_seq_id last = -1;
      for (std::size_t i = 0; i < tokens.size() && parts.size() <= most; ++i) {
        if (used[i] || (!parts.empty() && tokens[i].sequences.at(0) != last + 1)) {
          continue;
        }
        last = tokens[i].sequences.at(0);
        parts.emplace_back();
        for (std::size_t j = i; j < tokens.size(); ++j) {
          if (!used[j] && tokens[j].sequences.at(0) == last) {
            parts.back().push_back(j);
          }
        }
      }
      std::size_t each = (std::max)(most / parts.size(), std::size_t{1});
      for (const auto& part : parts) {
        each = (std::min)(each, part.size());
      }
      MicroBatch& micro = batches_.emplace_back();
      for (const auto& part : parts) {
        for (std::size_t k = 0; k < each; ++k) {
          used[part[k]] = true;
          micro.tokens.push_back(std::move(tokens[part[k]]));
        }
      }
      left -= each * parts.size();
    }
  }

  std::vector<MicroBatch> batches_;
  std::vector<llama_seq_id> sequences_;
  MicroBatch none_;
};

}  // namespace compresskv::llama_cpp::detail
