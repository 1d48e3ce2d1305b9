#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>

#include "compresskv/core/error.hpp"

namespace compresskv::calibrate {

/// A token's number in the model's vocabulary.
using TokenId = std::int32_t;

/// Tokens `first` up to, not including, `last` of a prompt.
struct TokenSpan {
  std::size_t first = 0;
  std::size_t last = 0;

  constexpr std::size_t size() const { return last - first; }
  friend bool operator==(const TokenSpan&, const TokenSpan&) = default;
};

/// Where the needle's tokens stand in a prompt that was tokenised as a whole: the first window of the
/// needle's length that holds over `least_share` of the needle's distinct tokens, as the code released with
/// CompressKV looks for it. At the needle's borders tokens may have merged with their neighbours, so an exact
/// search would miss it; the price is that the window can begin a few tokens early. An engine that put the
/// needle there itself knows better. Nothing when no window holds enough.
///
/// Throws ArgumentError when the needle is empty or `least_share` is not in [0, 1). Cost: linear in the
/// prompt.
inline std::optional<TokenSpan> find_answer_span(std::span<const TokenId> prompt,
                                                 std::span<const TokenId> needle, double least_share = 0.9) {
  detail::require(!needle.empty(), "needle has no token: give the answer's tokens");
  detail::require(least_share >= 0.0 && least_share < 1.0, "least_share is ", least_share,
                  ", must be in [0, 1): a window counts when it holds more than that");
  std::unordered_map<TokenId, std::size_t> in_window;
  for (const TokenId token : needle) {
    in_window[token] = 0;
  }
  const auto distinct = static_cast<double>(in_window.size());
  std::size_t present = 0;
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    if (const auto entering = in_window.find(prompt[i]); entering != in_window.end()) {
      present += entering->second++ == 0 ? 1U : 0U;
    }
    if (i >= needle.size()) {
      if (const auto leaving = in_window.find(prompt[i - needle.size()]); leaving != in_window.end()) {
        present -= --leaving->second == 0 ? 1U : 0U;
      }
    }
    if (i + 1 >= needle.size() && static_cast<double>(present) / distinct > least_share) {
      return TokenSpan{.first = i + 1 - needle.size(), .last = i + 1};
    }
  }
  return std::nullopt;
}

}  // namespace compresskv::calibrate
