// The second pass of methods that score a context by its repeats (KVzip).
#pragma once

#include <compresskv/core/stretch.hpp>
#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "compress.hpp"
#include "engine/sequence.hpp"
#include "run.hpp"

namespace ckv {

/// Tokens of the context that are repeated at a time.
inline constexpr std::size_t repeated_at_once = 2048;

/// What is shown each layer that holds repeats of a stretch behind the context; their queries are the
/// layer's.
using ShowRepeats = std::function<void(engine::LayerView& layer, const compresskv::Stretch& stretch)>;

/// Feeds the whole of `context`, which `sequence` has read and nothing of which was evicted, once more:
/// stretch by stretch, each behind a request to repeat it. The tokens are taken back, and the sequence is as
/// it was, logits included. Throws engine::Error where a stretch and its repeat do not fit into the model's
/// context, Interrupted after Ctrl-C.
void repeat_context(const LoadedModel& loaded, engine::Sequence& sequence, std::span<const TokenId> context,
                    const ShowRepeats& show, std::size_t at_once = repeated_at_once);
/// The same for compressors, all of which are shown the queries.
void repeat_context(const LoadedModel& loaded, engine::Sequence& sequence, std::span<const TokenId> context,
                    std::span<PromptCompressor* const> compressors, std::size_t at_once = repeated_at_once);

/// What is fed before tokens `first` on are repeated.
std::vector<TokenId> repeat_request(const ModelEngine& loaded, std::span<const TokenId> context,
                                    std::size_t first);

}  // namespace ckv
