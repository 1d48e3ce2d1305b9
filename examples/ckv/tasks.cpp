#include "tasks.hpp"

#include <fmt/core.h>

#include <array>
#include <random>
#include <span>

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

  std::size_t below(std::size_t count) { return static_cast<std::size_t>(generator_() % count); }
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

/// One of many facts; what it says can be guessed from nothing else.
OwnNeedle draw_needle(Draw& draw) {
  switch (draw.below(8)) {
    case 0: {
      const std::string town = draw.word(towns);
      const std::string number = std::to_string(10'000 + draw.below(90'000));
      return {.fact = fmt::format("The special magic number of {} is {}.", town, number),
              .question = fmt::format("What is the special magic number of {}?", town),
              .expect = number};
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

TaskPrompt single_needle(const LoadedModel& loaded, const Haystack& haystack, const PromptPlace& place) {
  Draw draw{place, 0};
  const OwnNeedle needle = draw_needle(draw);
  // A tenth of the text is left behind the last place to start, so that it never ends too soon.
  NeedlePrompt prompt =
      needle_prompt(loaded, haystack, needle.view(),
                    {.tokens = place.length, .depth = place.depth, .start = 0.9 * draw.share()});
  return {.tokens = std::move(prompt.tokens), .expect = {needle.expect}};
}

struct TaskInfo {
  std::string_view name;
  std::string_view summary;
  TaskPrompt (*prompt)(const LoadedModel&, const Haystack&, const PromptPlace&);
};

constexpr std::array<TaskInfo, 1> tasks = {{
    {"needle", "one fact hidden in a long text, and the question that it answers", single_needle},
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

TaskPrompt task_prompt(std::string_view name, const LoadedModel& loaded, const Haystack& haystack,
                       const PromptPlace& place) {
  for (const TaskInfo& task : tasks) {
    if (task.name == name) {
      return task.prompt(loaded, haystack, place);
    }
  }
  throw engine::Error(fmt::format("there is no task '{}': {}", name, task_help()));
}

}  // namespace ckv
