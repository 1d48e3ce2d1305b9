#include "needle.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>

#include "arguments.hpp"
#include "engine/error.hpp"

namespace ckv {
namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

struct ClosePipe {
  void operator()(std::FILE* pipe) const { pclose(pipe); }
};

std::string join(std::span<const std::string> sentences) {
  std::string text;
  for (const std::string& sentence : sentences) {
    text += text.empty() ? "" : " ";
    text += sentence;
  }
  return text;
}

}  // namespace

bool holds(std::string_view answer, std::string_view expect) {
  return lower(answer).find(lower(expect)) != std::string::npos;
}

Haystack::Haystack(std::string_view text) {
  std::string sentence;
  const auto end_sentence = [&] {
    if (!sentence.empty()) {
      sentences_.push_back(std::move(sentence));
      sentence.clear();
    }
  };
  bool space = false;
  for (const char c : text) {
    if (is_space(c)) {
      space = true;
      continue;
    }
    if (space && !sentence.empty()) {
      const char last = sentence.back();
      if (last == '.' || last == '?' || last == '!') {
        end_sentence();
      } else {
        sentence += ' ';
      }
    }
    space = false;
    sentence += c;
  }
  end_sentence();
}

Haystack Haystack::from_bible() {
  // One verse a line, each after its place: "Ge1:1 In the beginning ...".
  const std::unique_ptr<std::FILE, ClosePipe> pipe{
      popen("bible -f 'Gen1:1-Rev22:21' 2>/dev/null </dev/null", "r")};
  std::string lines;
  if (pipe) {
    std::array<char, 1 << 16> buffer{};
    while (const std::size_t count = std::fread(buffer.data(), 1, buffer.size(), pipe.get())) {
      lines.append(buffer.data(), count);
    }
  }
  std::string text;
  for (std::size_t begin = 0; begin < lines.size();) {
    const std::size_t end = std::min(lines.find('\n', begin), lines.size());
    const std::size_t verse = lines.find(' ', begin);
    if (verse < end) {
      text.append(lines, verse, end - verse);
    }
    begin = end + 1;
  }
  Haystack haystack{text};
  if (haystack.sentences().empty()) {
    throw engine::Error(
        "the King James text is not there: the program `bible` gave nothing; install Debian's package "
        "bible-kjv, or give a text of your own");
  }
  return haystack;
}

Haystack Haystack::from_file(const std::filesystem::path& path) {
  return Haystack{checked_text(read_text_file(path), fmt::format("the text '{}'", path.string()))};
}

Haystack Haystack::from(const std::filesystem::path& path) {
  return path.empty() ? from_bible() : from_file(path);
}

compresskv::calibrate::TokenSpan token_span(const ModelEngine& loaded, std::string_view text,
                                            std::span<const TokenId> tokens, std::string_view part) {
  // Byte-level vocabularies give the text back byte by byte, so that places in it can be counted out.
  const std::size_t begin = text.find(part);
  std::string bytes;
  std::optional<std::size_t> first;
  std::optional<std::size_t> last;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    bytes += loaded.token_bytes(tokens[i]);
    if (!first && bytes.size() > begin) {
      first = i;
    }
    if (!last && bytes.size() >= begin + part.size()) {
      last = i + 1;
    }
  }
  if (begin != std::string_view::npos && bytes == text && first && last) {
    return {.first = *first, .last = *last};
  }
  const auto alone = loaded.encode(part, false);
  const auto found = compresskv::calibrate::find_answer_span(tokens, alone);
  if (!found) {
    throw engine::Error(fmt::format("'{}' was not found among the tokens of the prompt", part));
  }
  return *found;
}

engine::PromptText hide(const ModelEngine& loaded, const Haystack& haystack, std::span<const Hidden> facts,
                        const Request& request, std::size_t tokens, double start) {
  const auto sentences = haystack.sentences();
  const auto skipped = static_cast<std::size_t>(std::floor(start * static_cast<double>(sentences.size())));
  std::vector<std::pair<std::size_t, std::string_view>> places;  // sentences before a fact, ascending
  const auto text_of = [&](std::span<const std::string> used) {
    std::string text;
    const auto add = [&](std::string_view part) {
      text += text.empty() || part.empty() ? "" : " ";
      text += part;
    };
    std::size_t begin = 0;
    for (const auto& [before, fact] : places) {
      add(join(used.subspan(begin, before - begin)));
      add(fact);
      begin = before;
    }
    add(join(used.subspan(begin)));
    const std::string asked = message_text(text, request.question);
    if (request.system.empty()) {
      return chat_prompt(loaded, asked);
    }
    const std::array<engine::ChatMessage, 2> messages = {
        {{.role = "system", .content = std::string(request.system)}, {.role = "user", .content = asked}}};
    return loaded.lay_out(messages);
  };
  for (const Hidden& hidden : facts) {
    places.emplace_back(0, hidden.fact);
  }
  const std::size_t bare = encode_prompt(loaded, text_of({})).size();
  if (bare > tokens) {
    throw engine::Error(
        fmt::format("a prompt of {} tokens was asked for, the question alone takes {}", tokens, bare));
  }

  std::vector<std::size_t> ends;  // tokens of the haystack up to the end of each sentence
  while (true) {
    const std::size_t count = ends.empty() ? 0 : ends.back();
    if (skipped + ends.size() == sentences.size()) {
      throw engine::Error(fmt::format(
          "the haystack ends after {} tokens, {} are needed: give a longer text or a shorter length", count,
          tokens - bare));
    }
    const std::size_t length = loaded.encode(" " + sentences[skipped + ends.size()], false).size();
    if (bare + count + length > tokens) {
      break;
    }
    ends.push_back(count + length);
  }

  // Tokens at the seams of the text may be others than those of its parts: what is too long loses a sentence.
  while (true) {
    const std::size_t count = ends.empty() ? 0 : ends.back();
    places.clear();
    for (const Hidden& hidden : facts) {
      const double wanted = hidden.depth * static_cast<double>(count);
      const auto above = std::find_if(ends.begin(), ends.end(),
                                      [&](std::size_t end) { return static_cast<double>(end) > wanted; });
      auto before = static_cast<std::size_t>(above - ends.begin());
      // The sentence that reaches over the place goes to the nearer side.
      if (above != ends.end()) {
        const double from = above == ends.begin() ? 0.0 : static_cast<double>(*(above - 1));
        before += static_cast<double>(*above) - wanted < wanted - from ? 1U : 0U;
      }
      places.emplace_back(before, hidden.fact);
    }
    std::stable_sort(places.begin(), places.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    engine::PromptText text = text_of(sentences.subspan(skipped, ends.size()));
    if (ends.empty() || encode_prompt(loaded, text).size() <= tokens) {
      return text;
    }
    ends.pop_back();
  }
}

NeedlePrompt needle_prompt(const ModelEngine& loaded, const Haystack& haystack, const Needle& needle,
                           const NeedlePlace& place) {
  const Hidden hidden{.fact = needle.fact, .depth = place.depth};
  const engine::PromptText text =
      hide(loaded, haystack, {&hidden, 1}, {.question = needle.question}, place.tokens, place.start);
  NeedlePrompt prompt{.tokens = encode_prompt(loaded, text), .needle = {}};
  prompt.needle = token_span(loaded, text.text(), prompt.tokens, needle.fact);
  return prompt;
}

}  // namespace ckv
