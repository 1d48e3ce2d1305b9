#include "needle_table.hpp"

#include <fmt/core.h>

#include <array>
#include <compresskv/calibrate/rouge1_recall.hpp>
#include <compresskv/io/json_file.hpp>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "arguments.hpp"
#include "engine/error.hpp"

namespace ckv {
namespace {

constexpr std::array<Needle, 6> calibration_table = {{
    {.fact = "The lighthouse at Pellam Point was painted green by a retired dentist named Oswald.",
     .question = "Who painted the lighthouse at Pellam Point green?",
     .expect = "Oswald"},
    {.fact = "The secret ingredient in Marta's famous soup is a spoonful of roasted barley.",
     .question = "What is the secret ingredient in Marta's famous soup?",
     .expect = "barley"},
    {.fact = "The best remedy for a squeaking bicycle is a drop of walnut oil on the chain.",
     .question = "What is the best remedy for a squeaking bicycle?",
     .expect = "walnut oil"},
    {.fact = "The spare key of the bakery hangs behind the blue clock in the kitchen.",
     .question = "Where does the spare key of the bakery hang?",
     .expect = "blue clock"},
    {.fact = "The night train to Varnholm leaves from platform seventeen at midnight.",
     .question = "From which platform does the night train to Varnholm leave?",
     .expect = "seventeen"},
    {.fact = "Professor Lindqvist keeps her tame otter in the library of the old observatory.",
     .question = "Where does Professor Lindqvist keep her tame otter?",
     .expect = "library"},
}};

constexpr Needle demo_row = {
    .fact = "The best thing to do in the city of Larnow is to eat a plum cake on the old stone bridge.",
    .question = "What is the best thing to do in the city of Larnow?",
    .expect = "plum cake"};

constexpr std::string_view blanks = " \t\n\v\f\r";

}  // namespace

std::span<const Needle> calibration_needles() { return calibration_table; }

std::vector<NeedleText> read_needles(const std::filesystem::path& path) {
  std::vector<NeedleText> needles;
  std::istringstream text{read_text_file(path)};
  std::size_t number = 0;
  for (std::string line; std::getline(text, line);) {
    ++number;
    if (line.find_first_not_of(blanks) == std::string::npos) {
      continue;
    }
    const auto fail = [&](const std::string& what) {
      throw engine::Error(
          fmt::format(R"('{}' line {}: {}; give a needle a line, {{"fact": "...", "question": "..."}})",
                      path.string(), number, what));
    };
    const auto json = compresskv::io::detail::parse_json<nlohmann::json>(line, "", fail);
    if (!json.is_object()) {
      fail("no JSON object");
    }
    const auto sentence = [&](const char* key) {
      const auto found = json.find(key);
      if (found == json.end() || !found->is_string()) {
        fail(fmt::format("\"{}\" is {}", key, found == json.end() ? "absent" : "no text"));
      }
      return found->get<std::string>();
    };
    NeedleText needle{.fact = sentence("fact"), .question = sentence("question")};
    // Answers are judged by the fact's words; a question may be in any script.
    if (compresskv::calibrate::detail::count_words(needle.fact).empty()) {
      fail("\"fact\" has no word of letters a-z or digits, by which answers are judged");
    }
    if (needle.question.find_first_not_of(blanks) == std::string::npos) {
      fail("\"question\" is empty");
    }
    needles.push_back(std::move(needle));
  }
  if (needles.empty()) {
    throw engine::Error(fmt::format("'{}' holds no needle; give one a line, {}", path.string(),
                                    R"({"fact": "...", "question": "..."})"));
  }
  return needles;
}

const Needle& demo_needle() { return demo_row; }

}  // namespace ckv
