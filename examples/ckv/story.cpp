#include "story.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <map>

#include "engine/error.hpp"
#include "needle.hpp"

namespace ckv {
namespace {

/// Where a sentence's telling or recalled part lies in the text, in bytes.
struct Marked {
  const StorySentence* sentence;
  std::size_t begin;
  std::size_t end;
};

struct StoryText {
  std::string text;
  std::vector<Marked> marked;
};

StoryText write(std::span<const StorySentence* const> sentences, std::span<const std::string> filler) {
  StoryText story;
  std::size_t next = 0;
  const auto add = [&](const std::string& text) {
    story.text += story.text.empty() ? "" : " ";
    story.text += text;
  };
  for (std::size_t i = 0; i <= filler.size(); ++i) {
    const double place = (static_cast<double>(i) + 0.5) / static_cast<double>(filler.size());
    for (; next < sentences.size() && (i == filler.size() || sentences[next]->place < place); ++next) {
      const StorySentence& sentence = *sentences[next];
      const std::size_t begin = story.text.size();
      add(sentence.text);
      if (sentence.recalled.empty()) {
        story.marked.push_back({&sentence, begin, story.text.size()});
      } else {
        add(sentence.recalled);
        story.marked.push_back({&sentence, story.text.size() - sentence.recalled.size(), story.text.size()});
        story.text += ".";
      }
    }
    if (i < filler.size()) {
      add(filler[i]);
    }
  }
  return story;
}

}  // namespace

Story tell(const ModelEngine& loaded, std::span<const StorySentence> sentences,
           const std::function<std::string()>& filler, std::size_t tokens) {
  std::vector<const StorySentence*> ordered;
  for (const StorySentence& sentence : sentences) {
    ordered.push_back(&sentence);
  }
  std::ranges::stable_sort(ordered, {}, [](const StorySentence* sentence) { return sentence->place; });

  const auto tokens_of = [&](const std::string& text) { return loaded.encode(text, false); };
  std::vector<std::string> between;
  const auto fits = [&](std::size_t count) {
    while (between.size() < count) {
      between.push_back(filler());
    }
    return tokens_of(write(ordered, std::span(between).first(count)).text).size() <= tokens;
  };
  if (!fits(0)) {
    throw engine::Error(
        fmt::format("a story of {} tokens was asked for, what it must say has {}: give a greater length",
                    tokens, tokens_of(write(ordered, {}).text).size()));
  }
  std::size_t most = 0;
  std::size_t step = 1;
  for (; fits(most + step); step *= 2) {
    most += step;
  }
  for (; step > 0; step /= 2) {
    most += fits(most + step) ? step : 0;
  }

  const StoryText written = write(ordered, std::span(between).first(most));
  Story story{.tokens = tokens_of(written.text), .recalls = {}};
  std::vector<std::size_t> ends;  // [token], bytes
  std::string bytes;
  for (const TokenId token : story.tokens) {
    bytes += loaded.token_bytes(token);
    ends.push_back(bytes.size());
  }
  if (bytes != written.text) {
    throw engine::Error("the model's tokens do not give a text back byte by byte: stories need one whose do");
  }
  const auto token_at = [&](std::size_t byte) {
    return static_cast<std::size_t>(std::ranges::upper_bound(ends, byte) - ends.begin());
  };
  std::map<std::size_t, std::size_t> told;  // [subject]
  for (const Marked& mark : written.marked) {
    const StorySentence& sentence = *mark.sentence;
    const std::size_t last = token_at(mark.end - 1) + 1;
    if (!sentence.recalled.empty()) {
      // The blank before a word is the word's, as a rule.
      story.recalls.push_back({.expect = sentence.recalled,
                               .first = token_at(mark.begin),
                               .last = last,
                               .told = told.at(sentence.subject)});
    }
    told[sentence.subject] = last;
  }
  return story;
}

}  // namespace ckv
