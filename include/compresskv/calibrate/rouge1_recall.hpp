#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>

#include "compresskv/core/error.hpp"

namespace compresskv::calibrate {

namespace detail {

/// How often each word stands in `text`: runs of ASCII letters and digits, lower case.
inline std::map<std::string, std::size_t> count_words(std::string_view text) {
  std::map<std::string, std::size_t> counts;
  std::string word;
  const auto end_word = [&] {
    if (!word.empty()) {
      ++counts[word];
      word.clear();
    }
  };
  for (const char c : text) {
    if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9')) {
      word += c;
    } else if (c >= 'A' && c <= 'Z') {
      word += static_cast<char>(c - 'A' + 'a');
    } else {
      end_word();
    }
  }
  end_word();
  return counts;
}

}  // namespace detail

/// Share of the reference's words that the response holds, in [0, 1]: each word counts at most as often as it
/// stands in the reference. Words are lower-case runs of `[a-z0-9]`; whatever else separates them. The scorer
/// that was released with CompressKV cuts words down to their stems as well, this one does not: "walks" is
/// not "walk".
///
/// ROUGE-1 recall, Lin 2004. Throws ArgumentError when the reference has no word.
inline double rouge1_recall(std::string_view response, std::string_view reference) {
  const auto wanted = detail::count_words(reference);
  const auto given = detail::count_words(response);
  std::size_t total = 0;
  std::size_t found = 0;
  for (const auto& [word, count] : wanted) {
    total += count;
    if (const auto match = given.find(word); match != given.end()) {
      found += (std::min)(count, match->second);
    }
  }
  compresskv::detail::require(total > 0, "reference \"", reference,
                              "\" has no word of letters a-z or digits: give the answer that is looked for");
  return static_cast<double>(found) / static_cast<double>(total);
}

/// A calibration run counts when the recall of its answer is above this.
inline constexpr double counted_recall = 0.5;

/// Whether a run counts: `rouge1_recall(response, needle)` is above `counted_recall`, not equal to it.
inline bool answered(std::string_view response, std::string_view needle) {
  return rouge1_recall(response, needle) > counted_recall;
}

}  // namespace compresskv::calibrate
