#include "tasks.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <random>
#include <span>
#include <utility>

#include "engine/error.hpp"

namespace ckv {
namespace {

using Words = std::span<const std::string_view>;

constexpr std::array<std::string_view, 24> towns = {
    "Aldwick",   "Brenholt", "Carsey",   "Dornfeld", "Elmhaven", "Farrow",   "Gildern",  "Hollowby",
    "Istermark", "Jarnwell", "Kelmore",  "Lindrup",  "Morvane",  "Northolm", "Orsett",   "Penrake",
    "Quillan",   "Rosmere",  "Stanwyck", "Tavell",   "Ulverby",  "Vintry",   "Westrick", "Yarlow"};
constexpr std::array<std::string_view, 24> people = {
    "Mister Abbott",   "Miss Barlow",     "Doctor Carmichael", "Captain Dawson",  "Professor Ellery",
    "Inspector Finch", "Colonel Garrick", "Madame Hollis",     "Judge Ingram",    "Nurse Jessop",
    "Miss Kendrick",   "Mister Lockwood", "Doctor Mercer",     "Captain Nettles", "Professor Ogden",
    "Inspector Pryor", "Colonel Quaid",   "Madame Rochester",  "Judge Stirling",  "Nurse Tolliver",
    "Miss Underhill",  "Mister Voss",     "Doctor Whitlock",   "Captain Yates"};
constexpr std::array<std::string_view, 20> first_names = {
    "Biscuit", "Clementine", "Dusty",   "Ferdinand", "Gizmo",   "Hazel", "Igor",
    "Jasper",  "Kiwi",       "Lottie",  "Mango",     "Nugget",  "Oscar", "Pickle",
    "Quincy",  "Rufus",      "Saffron", "Twiggy",    "Waffles", "Ziggy"};
constexpr std::array<std::string_view, 16> pets = {
    "parrot", "tortoise", "hamster", "terrier", "poodle", "kitten",   "pony",   "goldfish",
    "iguana", "budgie",   "ferret",  "piglet",  "llama",  "hedgehog", "canary", "chameleon"};
constexpr std::array<std::string_view, 18> buildings = {"post office",     "bakery",
                                                        "railway station", "cinema",
                                                        "swimming pool",   "police station",
                                                        "town hall",       "gymnasium",
                                                        "power station",   "lighthouse",
                                                        "hospital",        "observatory",
                                                        "airport",         "chocolate factory",
                                                        "skating rink",    "laundry",
                                                        "museum",          "theatre"};
constexpr std::array<std::string_view, 18> adjectives = {
    "purple",  "gentle", "electric", "frozen",   "hidden", "clever", "rusty",    "velvet", "wooden",
    "crimson", "lazy",   "tiny",     "floating", "marble", "sleepy", "polished", "copper", "noisy"};
constexpr std::array<std::string_view, 18> nouns = {
    "umbrella", "penguin",   "teapot", "bicycle",  "lantern", "violin", "cactus",  "compass", "dragonfly",
    "pancake",  "telescope", "walrus", "zeppelin", "kettle",  "magnet", "origami", "pumpkin", "snowflake"};
constexpr std::array<std::string_view, 16> spots = {
    "grandfather clock", "piano",       "broom cupboard", "cookie jar",  "letter box",  "toolbox",
    "washing machine",   "guitar case", "bird cage",      "garden shed", "coal cellar", "hat box",
    "flower pot",        "bookcase",    "sewing machine", "refrigerator"};
constexpr std::array<std::string_view, 12> things = {
    "diary",  "gold watch", "treasure map", "violin bow",  "stamp album", "spare key",
    "camera", "passport",   "trophy",       "love letter", "microscope",  "recipe book"};
constexpr std::array<std::string_view, 18> foods = {
    "rhubarb pie", "tomato soup",   "pancakes",  "spaghetti", "mashed potatoes",  "chocolate cake",
    "sushi",       "cheese toast",  "ice cream", "popcorn",   "mushroom risotto", "banana bread",
    "pizza",       "peanut butter", "waffles",   "lasagne",   "potato salad",     "blueberry muffins"};
constexpr std::array<std::string_view, 14> colours = {
    "turquoise", "orange", "magenta",  "beige",   "yellow",    "pink",  "silver",
    "maroon",    "violet", "lavender", "emerald", "navy blue", "khaki", "indigo"};
constexpr std::array<std::string_view, 10> vehicles = {
    "tram",     "ferry",       "cable car", "school bus", "fire engine",
    "milk van", "night train", "taxi",      "airship",    "steam boat"};

/// Random numbers that are the same everywhere: bits of std::mt19937_64, no library's distribution.
class Draw {
 public:
  explicit Draw(const PromptPlace& place, std::uint64_t task) {
    std::seed_seq seeds{place.seed, place.seed >> 32U, static_cast<std::uint64_t>(place.length),
                        static_cast<std::uint64_t>(place.index), task};
    generator_.seed(seeds);
  }

  std::size_t below(std::size_t count) { return generator_() % count; }
  double share() { return static_cast<double>(generator_() >> 11U) * 0x1p-53; }
  std::string word(Words words) { return std::string(words[below(words.size())]); }

 private:
  std::mt19937_64 generator_;
};

struct OwnNeedle {
  std::string fact;
  std::string question;
  std::string expect;

  Needle view() const { return {.fact = fact, .question = question, .expect = expect}; }
};

std::string draw_number(Draw& draw) { return std::to_string(10'000 + draw.below(90'000)); }

OwnNeedle number_of(const std::string& key, const std::string& number) {
  return {.fact = fmt::format("The special magic number of {} is {}.", key, number),
          .question = fmt::format("What is the special magic number of {}?", key),
          .expect = number};
}

constexpr std::size_t needle_kinds = 8;

/// One of many facts; what it says can be guessed from nothing else.
OwnNeedle draw_needle(Draw& draw, std::size_t kind) {
  switch (kind) {
    case 0: {
      const std::string town = draw.word(towns);
      return number_of(town, draw_number(draw));
    }
    case 1: {
      const std::string place = fmt::format("{} in {}", draw.word(buildings), draw.word(towns));
      const std::string password = fmt::format("{} {}", draw.word(adjectives), draw.word(nouns));
      return {.fact = fmt::format("The password of the {} is {}.", place, password),
              .question = fmt::format("What is the password of the {}?", place),
              .expect = password};
    }
    case 2: {
      const std::string pet = fmt::format("{} of {}", draw.word(pets), draw.word(people));
      const std::string name = draw.word(first_names);
      return {.fact = fmt::format("The {} is called {}.", pet, name),
              .question = fmt::format("What is the {} called?", pet),
              .expect = name};
    }
    case 3: {
      const std::string thing = fmt::format("{} of {}", draw.word(things), draw.word(people));
      const std::string spot = draw.word(spots);
      return {.fact = fmt::format("The {} is hidden in the {}.", thing, spot),
              .question = fmt::format("Where is the {} hidden?", thing),
              .expect = spot};
    }
    case 4: {
      const std::string person = draw.word(people);
      const std::string food = draw.word(foods);
      return {.fact = fmt::format("The favourite food of {} is {}.", person, food),
              .question = fmt::format("What is the favourite food of {}?", person),
              .expect = food};
    }
    case 5: {
      const std::string place = fmt::format("{} in {}", draw.word(buildings), draw.word(towns));
      const std::string owner = draw.word(people);
      return {.fact = fmt::format("The {} belongs to {}.", place, owner),
              .question = fmt::format("To whom does the {} belong?", place),
              .expect = owner};
    }
    case 6: {
      const std::string vehicle = fmt::format("{} to {}", draw.word(vehicles), draw.word(towns));
      const std::string colour = draw.word(colours);
      return {.fact = fmt::format("The {} is painted {}.", vehicle, colour),
              .question = fmt::format("In which colour is the {} painted?", vehicle),
              .expect = colour};
    }
    default: {
      const std::string person = draw.word(people);
      const std::string town = draw.word(towns);
      return {.fact = fmt::format("The summer house of {} is in {}.", person, town),
              .question = fmt::format("Where is the summer house of {}?", person),
              .expect = town};
    }
  }
}

TaskPrompt single_needle(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 0};
  const OwnNeedle needle = draw_needle(draw, draw.below(needle_kinds));
  // A tenth of the text is left behind the last place to start, so that it never ends too soon.
  NeedlePrompt prompt =
      needle_prompt(loaded, haystack, needle.view(),
                    {.tokens = place.length, .depth = place.depth, .start = 0.9 * draw.share()});
  return {.tokens = std::move(prompt.tokens), .expect = {needle.expect}, .fact = prompt.needle};
}

// The tasks below ask for numbers, as RULER does: small models can tell them from the text.

/// So many different towns.
std::vector<std::string> draw_towns(Draw& draw, std::size_t count) {
  std::vector<std::string> drawn;
  while (drawn.size() < count) {
    std::string town = draw.word(towns);
    if (std::find(drawn.begin(), drawn.end(), town) == drawn.end()) {
      drawn.push_back(std::move(town));
    }
  }
  return drawn;
}

/// The first fact lies where asked for, the others anywhere.
engine::PromptText hide_all(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place,
                            Draw& draw, std::span<const std::string> facts, std::string_view question) {
  std::vector<Hidden> hidden;
  for (const std::string& fact : facts) {
    hidden.push_back({.fact = fact, .depth = hidden.empty() ? place.depth : draw.share()});
  }
  return hide(loaded, haystack, hidden, {.question = question}, place.length, 0.9 * draw.share());
}

TaskPrompt hidden_prompt(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place,
                         Draw& draw, std::span<const std::string> facts, std::string_view question,
                         std::vector<std::string> expect) {
  const engine::PromptText text = hide_all(loaded, haystack, place, draw, facts, question);
  return {.tokens = encode_prompt(loaded, text), .expect = std::move(expect)};
}

/// The facts of needles.
std::vector<std::string> facts_of(std::span<const OwnNeedle> needles) {
  std::vector<std::string> facts;
  for (const OwnNeedle& needle : needles) {
    facts.push_back(needle.fact);
  }
  return facts;
}

/// Numbers of so many towns.
std::vector<OwnNeedle> draw_keys(Draw& draw, std::size_t count) {
  std::vector<OwnNeedle> keys;
  for (const std::string& town : draw_towns(draw, count)) {
    keys.push_back(number_of(town, draw_number(draw)));
  }
  return keys;
}

constexpr std::size_t keys_hidden = 4;

TaskPrompt several_keys(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 1};
  const std::vector<OwnNeedle> keys = draw_keys(draw, keys_hidden);
  return hidden_prompt(loaded, haystack, place, draw, facts_of(keys), keys[0].question, {keys[0].expect});
}

TaskPrompt several_values(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 2};
  const std::string key = draw.word(towns);
  std::vector<std::string> facts;
  std::vector<std::string> numbers;
  for (int i = 0; i < 2; ++i) {
    numbers.push_back(draw_number(draw));
    facts.push_back(fmt::format("One of the special magic numbers of {} is {}.", key, numbers.back()));
  }
  return hidden_prompt(loaded, haystack, place, draw, facts,
                       fmt::format("What are the two special magic numbers of {}?", key), numbers);
}

TaskPrompt several_queries(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 3};
  std::vector<std::string> facts;
  std::vector<std::string> numbers;
  const std::vector<std::string> keys = draw_towns(draw, 2);
  for (const std::string& key : keys) {
    numbers.push_back(draw_number(draw));
    facts.push_back(fmt::format("The special magic number of {} is {}.", key, numbers.back()));
  }
  return hidden_prompt(
      loaded, haystack, place, draw, facts,
      fmt::format("What is the special magic number of {}, and what is that of {}?", keys[0], keys[1]),
      numbers);
}

TaskPrompt tracking(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 4};
  const std::string number = draw_number(draw);
  const std::vector<std::string> keys = draw_towns(draw, 3);
  // The chain stands in its order: each link lies behind the one that it names.
  const std::array<std::string, 3> facts = {
      fmt::format("The special magic number of {} is {}.", keys[0], number),
      fmt::format("The special magic number of {} is the same as that of {}.", keys[1], keys[0]),
      fmt::format("The special magic number of {} is the same as that of {}.", keys[2], keys[1])};
  std::vector<Hidden> hidden;
  for (std::size_t i = 0; i < facts.size(); ++i) {
    const double step = (1.0 - place.depth) / static_cast<double>(facts.size());
    hidden.push_back({.fact = facts[i], .depth = place.depth + step * static_cast<double>(i)});
  }
  const engine::PromptText text = hide(
      loaded, haystack, hidden, {.question = fmt::format("What is the special magic number of {}?", keys[2])},
      place.length, 0.9 * draw.share());
  return {.tokens = encode_prompt(loaded, text), .expect = {number}};
}

TaskPrompt two_turns(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 5};
  const std::vector<OwnNeedle> keys = draw_keys(draw, 2);
  // Room for both answers and the second question: what is asked second must fit into the length, too.
  PromptPlace first = place;
  const std::vector<TokenId> next = next_turn(loaded, keys[0].question);
  first.length -= std::min(next.size(), first.length);
  TaskPrompt prompt =
      hidden_prompt(loaded, haystack, first, draw, facts_of(keys), keys[1].question, {keys[0].expect});
  prompt.next_turn = next;
  return prompt;
}

/// A rule, and the system message that gives it.
struct Ruled {
  std::string system;
  Rule rule;
};

std::string in_capitals(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return text;
}

/// The rules say one thing several times: a small model does not follow what it was told once. Where a rule
/// forbids a name or its small letters, it names them, too: copying any name is not enough.
Ruled draw_rule(Draw& draw) {
  const std::string name = draw.word(first_names);
  switch (draw.below(3)) {
    case 0:
      return {
          .system = fmt::format("You are a robot. Your name is {0}. You always say \"I am {0}\". When the "
                                "user asks who you are, you say \"I am {0}\".",
                                name),
          .rule = {.kind = "name", .says = name}};
    case 1: {
      std::string other = draw.word(first_names);
      while (other == name) {
        other = draw.word(first_names);
      }
      return {.system =
                  fmt::format("You are a robot. Your name is {1}, but you never say \"{1}\". You always say "
                              "\"I am {0}\". When the user asks who you are, you say \"I am {0}\".",
                              name, other),
              .rule = {.kind = "never", .says = name, .never = other}};
    }
    default: {
      const std::string capitals = in_capitals(name);
      return {.system = fmt::format(
                  "You are a robot. Your name is {0}, in capital letters {1}. You are called {1}. "
                  "Everybody calls you {1}. You write your name in capital letters. When the "
                  "user asks who you are, you say \"I am {1}\".",
                  name, capitals),
              .rule = {.kind = "capitals", .says = capitals}};
    }
  }
}

TaskPrompt ruled(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 7};
  Ruled drawn = draw_rule(draw);
  const engine::PromptText text =
      hide(loaded, haystack, {}, {.question = "Who are you, robot?", .system = drawn.system}, place.length,
           0.9 * draw.share());
  return {.tokens = encode_prompt(loaded, text), .expect = {}, .rule = std::move(drawn.rule)};
}

// ---- what comes once the text was compressed ----

std::size_t common_tokens(std::span<const TokenId> a, std::span<const TokenId> b) {
  return static_cast<std::size_t>(std::ranges::mismatch(a, b).in1 - a.begin());
}

/// The template's head and a text with these facts in it; then, each by itself, these questions.
TaskPrompt asked_later(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place,
                       Draw& draw, std::span<const std::string> facts, std::span<const OwnNeedle> questions) {
  // There is room for the longest of them.
  const auto tokens_with = [&](const OwnNeedle& needle) {
    return encode_prompt(loaded, chat_prompt(loaded, message_text(".", needle.question))).size();
  };
  const std::string& longest = std::ranges::max_element(questions, {}, tokens_with)->question;
  const engine::PromptText chat = hide_all(loaded, haystack, place, draw, facts, longest);
  const std::size_t question = chat.text().rfind(longest);
  const std::size_t end = chat.text().find_last_not_of(" \n", question - 1) + 1;

  TaskPrompt prompt{.tokens = encode_prompt(loaded, chat.substr(0, end)), .expect = {}};
  for (const OwnNeedle& needle : questions) {
    engine::PromptText whole = chat.substr(0, question);
    whole.append({needle.question, true}).append(chat.substr(question + longest.size()));
    prompt.later.push_back({.tokens = encode_prompt(loaded, whole), .expect = needle.expect});
  }
  // Some vocabularies have tokens that reach over the end of the text: there it ends before them.
  for (const Later& later : prompt.later) {
    prompt.tokens.resize(common_tokens(prompt.tokens, later.tokens));
  }
  for (Later& later : prompt.later) {
    later.tokens.erase(later.tokens.begin(),
                       later.tokens.begin() + static_cast<std::ptrdiff_t>(prompt.tokens.size()));
  }
  return prompt;
}

constexpr std::size_t later_questions = 3;

/// Facts of different kinds. What one says stands in no other, so that no question fits two.
TaskPrompt later(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 8};
  std::vector<OwnNeedle> needles;
  std::vector<std::size_t> kinds;
  while (needles.size() < later_questions) {
    const std::size_t kind = draw.below(needle_kinds);
    OwnNeedle needle = draw_needle(draw, kind);
    const bool fits = std::ranges::find(kinds, kind) == kinds.end() &&
                      std::ranges::none_of(needles, [&](const OwnNeedle& other) {
                        return holds(other.fact, needle.expect) || holds(needle.fact, other.expect);
                      });
    if (fits) {
      kinds.push_back(kind);
      needles.push_back(std::move(needle));
    }
  }
  return asked_later(loaded, haystack, place, draw, facts_of(needles), needles);
}

TaskPrompt later_of_many(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 9};
  const std::vector<OwnNeedle> keys = draw_keys(draw, keys_hidden);
  return asked_later(loaded, haystack, place, draw, facts_of(keys), std::span(keys).first(later_questions));
}

/// What follows, where a task measures.
constexpr std::size_t continuation_tokens = 64;
constexpr std::size_t long_loss_tokens = 1024;

/// A passage of the text that lies where a needle would, said again once it is asked for.
TaskPrompt quoted_later(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 10};
  const OwnNeedle request{
      .fact = {}, .question = "Quote a passage of the text, word for word.", .expect = {}};
  TaskPrompt prompt = asked_later(loaded, haystack, place, draw, {}, {&request, 1});
  const std::size_t head = common_tokens(prompt.tokens, encode_prompt(loaded, chat_prompt(loaded, "?")));
  if (prompt.tokens.size() < head + continuation_tokens) {
    throw engine::Error(
        fmt::format("a prompt of {} tokens was asked for, its text has {} and a passage of {} is quoted",
                    place.length, prompt.tokens.size() - head, continuation_tokens));
  }
  const auto room = static_cast<double>(prompt.tokens.size() - head - continuation_tokens);
  const auto first = prompt.tokens.begin() + static_cast<std::ptrdiff_t>(head) +
                     static_cast<std::ptrdiff_t>(place.depth * room);
  prompt.continuation.assign(first, first + static_cast<std::ptrdiff_t>(continuation_tokens));
  return prompt;
}

/// A stretch of the text itself, and what follows it.
template <std::size_t continuation>
TaskPrompt plain_text(const ModelEngine& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 6};
  const auto sentences = haystack.sentences();
  std::string text;
  std::size_t bytes = 8 * (place.length + continuation);  // more than enough, as a rule
  for (std::size_t i = draw.below(sentences.size() * 9 / 10 + 1); i < sentences.size() && text.size() < bytes;
       ++i) {
    text += text.empty() ? "" : " ";
    text += sentences[i];
  }
  std::vector<TokenId> tokens = loaded.encode(text, false);
  if (const auto bos = loaded.bos()) {
    tokens.insert(tokens.begin(), *bos);
  }
  if (tokens.size() < place.length + continuation) {
    throw engine::Error(fmt::format(
        "the haystack ends after {} tokens, {} are needed: give a longer text or a shorter length",
        tokens.size(), place.length + continuation));
  }
  const auto end = tokens.begin() + static_cast<std::ptrdiff_t>(place.length);
  return {.tokens = {tokens.begin(), end},
          .expect = {},
          .fact = {},
          .next_turn = {},
          .continuation = {end, end + static_cast<std::ptrdiff_t>(continuation)}};
}

// ---- long answers: a story as the model would generate it, fed to every cache alike ----

/// A sentence of a story that says none of the words below which recalls ask for.
std::string draw_filler(Draw& draw, std::span<const std::string> cast) {
  const std::size_t one = draw.below(cast.size());
  const std::string& who = cast[one];
  const std::string town = draw.word(towns);
  switch (draw.below(10)) {
    case 0:
      return fmt::format("{} took the {} to {} and walked to the {}.", who, draw.word(vehicles), town,
                         draw.word(buildings));
    case 1:
      return fmt::format("In {} it rained, and {} waited in the {} with a {} {}.", town, who,
                         draw.word(buildings), draw.word(adjectives), draw.word(nouns));
    case 2:
      return fmt::format("\"Have you ever seen a {} {}?\" asked {}.", draw.word(adjectives), draw.word(nouns),
                         who);
    case 3:
      return fmt::format("The road from {} to {} was long, and {} grew tired.", town, draw.word(towns), who);
    case 4:
      return fmt::format("{} and {} met in front of the {} and talked about the weather.", who,
                         cast[(one + 1 + draw.below(cast.size() - 1)) % cast.size()], draw.word(buildings));
    case 5:
      return fmt::format("Somebody had left a {} at the {}, but {} did not notice.", draw.word(nouns),
                         draw.word(buildings), who);
    case 6:
      return fmt::format("Late at night {} wrote a letter to a cousin in {}.", who, town);
    case 7:
      return fmt::format("The {} of {} was closed that day, so {} went home.", draw.word(buildings), town,
                         who);
    case 8:
      return fmt::format("{} dreamt of a {} {} and woke up early.", who, draw.word(adjectives),
                         draw.word(nouns));
    default:
      return fmt::format("Then {} bought a {} in {}, since the old one was broken.", who, draw.word(nouns),
                         town);
  }
}

/// So many different words of a list.
std::vector<std::string> draw_different(Draw& draw, Words words, std::size_t count) {
  std::vector<std::string> left(words.begin(), words.end());
  std::vector<std::string> drawn;
  while (drawn.size() < count) {
    const auto at = left.begin() + static_cast<std::ptrdiff_t>(draw.below(left.size()));
    drawn.push_back(std::move(*at));
    left.erase(at);
  }
  return drawn;
}

/// The request for a story, and the story as its answer.
TaskPrompt told_story(const ModelEngine& loaded, const PromptPlace& place, Draw& draw,
                      const std::vector<StorySentence>& sentences, std::span<const std::string> cast) {
  Story story = tell(
      loaded, sentences, [&] { return draw_filler(draw, cast); }, place.length);
  return {.tokens = encode_prompt(loaded, chat_prompt(loaded,
                                                      "Tell me a long story. Remember all that you "
                                                      "have told.")),
          .expect = {},
          .continuation = std::move(story.tokens),
          .recalls = std::move(story.recalls)};
}

/// So many for each 1,000 tokens.
std::size_t so_many(const PromptPlace& place, std::size_t each, std::size_t most) {
  return std::clamp(each * place.length / 1000, std::size_t{2}, most);
}

/// What belongs to whom is told in the first quarter, each once; from 0.4 on the story names it again, once.
TaskPrompt long_names(const ModelEngine& loaded, const Haystack&, const PromptPlace& place) {
  Draw draw{place, 11};
  const std::size_t count = so_many(place, 8, people.size());
  const std::vector<std::string> cast = draw_different(draw, people, count);
  // No two facts say the same, so that none tells what another asks for.
  constexpr std::size_t kinds = 4;
  const std::size_t of_kind = (count + kinds - 1) / kinds;
  const std::array<std::vector<std::string>, kinds> said = {
      draw_different(draw, first_names, of_kind), draw_different(draw, spots, of_kind),
      draw_different(draw, foods, of_kind), draw_different(draw, colours, of_kind)};
  std::vector<StorySentence> sentences;
  for (std::size_t i = 0; i < count; ++i) {
    const std::string& who = cast[i];
    const std::array<std::string, kinds> facts = {
        fmt::format("he {} of {} was called", draw.word(pets), who),
        fmt::format("he {} of {} was hidden in the", draw.word(things), who),
        fmt::format("he favourite food of {} was", who), fmt::format("he house of {} was painted", who)};
    const std::string& fact = facts[i % kinds];
    const std::string& is = said[i % kinds][i / kinds];
    const double share = (static_cast<double>(i) + draw.share()) / static_cast<double>(count);
    sentences.push_back({.text = fmt::format("T{} {}.", fact, is), .place = 0.25 * share, .subject = i});
    sentences.push_back({.text = fmt::format("As everybody knew, t{}", fact),
                         .place = 0.4 + 0.6 * draw.share(),
                         .subject = i,
                         .recalled = is});
  }
  return told_story(loaded, place, draw, sentences, cast);
}

/// Scores that grow: two changes, one soon after the other, and much later the last score again; twice.
TaskPrompt long_tally(const ModelEngine& loaded, const Haystack&, const PromptPlace& place) {
  Draw draw{place, 12};
  const std::size_t count = so_many(place, 4, people.size());
  const std::vector<std::string> cast = draw_different(draw, people, count);
  std::vector<StorySentence> sentences;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t score = 100 + draw.below(300);
    for (const double half : {0.0, 0.5}) {
      for (const double begin : {0.0, 0.08}) {
        score += 20 + draw.below(80);
        sentences.push_back({.text = fmt::format("The score of {} is {}.", cast[i], score),
                             .place = half + begin + 0.08 * draw.share(),
                             .subject = i});
      }
      sentences.push_back({.text = fmt::format("As everybody knew, the score of {} is", cast[i]),
                           .place = half + 0.36 + 0.14 * draw.share(),
                           .subject = i,
                           .recalled = std::to_string(score)});
    }
  }
  return told_story(loaded, place, draw, sentences, cast);
}

struct TaskInfo {
  std::string_view name;
  std::string_view summary;
  TaskPrompt (*prompt)(const ModelEngine&, const Haystack&, const PromptPlace&);
  Measure measure = Measure::none;
};

constexpr std::array<TaskInfo, 15> tasks = {{
    {"needle", "one fact hidden in a long text, and the question that it answers", single_needle},
    {"keys", "four facts alike about different things, one of which is asked for", several_keys},
    {"values", "two facts about one thing, both asked for", several_values},
    {"queries", "two facts about two things, both asked for", several_queries},
    {"tracking", "a chain of three facts: what the last is depends on the first", tracking},
    {"turns", "a second question, about another fact, once the cache was compressed for the first",
     two_turns},
    {"rules", "a rule of the system message in front of a long text: the answer follows it", ruled},
    {"later", "a text with three facts, compressed before three questions come, each to a copy of its own",
     later},
    {"later-many", "the same with four facts alike, three of which are asked for", later_of_many},
    {"later-loss", "perplexity of 64 tokens of the text, quoted once it was compressed", quoted_later,
     Measure::perplexity},
    {"perplexity", "perplexity of the 64 tokens that follow a text", plain_text<continuation_tokens>,
     Measure::perplexity},
    {"long-loss", "perplexity of the 1024 that follow it, the cache cut to its budget again every 128 tokens",
     plain_text<long_loss_tokens>, Measure::long_loss},
    {"long-names",
     "a story that the model goes on with, so many tokens long, the cache cut to its budget again every 128: "
     "what belongs to whom is told early, and named again once, much later",
     long_names, Measure::recalls},
    {"long-tally", "the same of scores that change, and are named again later", long_tally, Measure::recalls},
    {"error", "relative error of each layer's attention output over the first 64",
     plain_text<continuation_tokens>, Measure::attention_error},
}};

}  // namespace

std::vector<std::string> task_names() {
  std::vector<std::string> names;
  for (const TaskInfo& task : tasks) {
    names.emplace_back(task.name);
  }
  return names;
}

std::string task_help() {
  std::string help;
  for (const TaskInfo& task : tasks) {
    help += fmt::format("{}{}: {}", help.empty() ? "" : "\n", task.name, task.summary);
  }
  return help;
}

Measure measure_of(std::string_view name) {
  const auto found =
      std::find_if(tasks.begin(), tasks.end(), [&](const TaskInfo& task) { return task.name == name; });
  return found == tasks.end() ? Measure::none : found->measure;
}

std::size_t tokens_at_last_cut(std::string_view task, std::size_t length) {
  const auto cut = [](std::size_t decoded) { return (decoded - 1) / decode_step * decode_step; };
  switch (measure_of(task)) {
    case Measure::long_loss:
      return length + cut(long_loss_tokens);
    case Measure::recalls:
      return cut(length);
    default:
      return 0;
  }
}

TaskPrompt task_prompt(std::string_view name, const ModelEngine& loaded, const Haystack& haystack,
                       const PromptPlace& place) {
  for (const TaskInfo& task : tasks) {
    if (task.name == name) {
      TaskPrompt prompt = task.prompt(loaded, haystack, place);
      prompt.measure = task.measure;
      return prompt;
    }
  }
  throw engine::Error(fmt::format("there is no task '{}': {}", name, task_help()));
}

}  // namespace ckv
