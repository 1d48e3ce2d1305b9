// Facts to hide in a text, and the questions that they answer.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ckv {

struct Needle {
  std::string_view fact;      ///< a sentence
  std::string_view question;  ///< what the fact answers
  std::string_view expect;    ///< what a right answer holds
};

/// Needles for calibration. The demo's and the tests' are others.
std::span<const Needle> calibration_needles();

/// A needle of the user's own.
struct NeedleText {
  std::string fact;
  std::string question;

  Needle view() const { return {.fact = fact, .question = question, .expect = {}}; }
};

/// Needles from JSON Lines, `{"fact": "...", "question": "..."}`; blank lines do not count. Throws
/// engine::Error naming file and line where one is none.
std::vector<NeedleText> read_needles(const std::filesystem::path& path);

/// The demo's needle.
const Needle& demo_needle();

}  // namespace ckv
