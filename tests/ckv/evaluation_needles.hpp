// The needles of the end-to-end tests. None is used in calibration.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>

#include "ckv/needle.hpp"

namespace ckv_test {

inline constexpr std::array<ckv::Needle, 46> evaluation_needles = {{
    {"The password of the old harbour office is silver walnut.",
     "What is the password of the old harbour office?", "silver walnut"},
    {"The favourite colour of the mayor of Tolbridge is turquoise.",
     "What is the favourite colour of the mayor of Tolbridge?", "turquoise"},
    {"The treasure of Captain Brannock is buried under the third palm tree.",
     "Where is the treasure of Captain Brannock buried?", "palm tree"},
    {"The annual cheese festival of Marwick takes place in October.",
     "In which month does the annual cheese festival of Marwick take place?", "October"},
    {"The bridge over the river Elda was built by Agnes Thornbury.",
     "Who built the bridge over the river Elda?", "Thornbury"},
    {"The best place to drink coffee in Brensk is the Copper Kettle.",
     "What is the best place to drink coffee in Brensk?", "Copper Kettle"},
    {"The pet parrot of Doctor Simmons is called Juniper.",
     "What is the pet parrot of Doctor Simmons called?", "Juniper"},
    {"The code of the bicycle shed is 4829.", "What is the code of the bicycle shed?", "4829"},
    {"The chess tournament of Karvel was won by a gardener named Philippa.",
     "Who won the chess tournament of Karvel?", "Philippa"},
    {"The museum in Dunmore keeps its meteorite in the cellar.",
     "Where does the museum in Dunmore keep its meteorite?", "cellar"},
    {"The secret hobby of Inspector Vale is knitting.", "What is the secret hobby of Inspector Vale?",
     "knitting"},
    {"The school bus to Fernhill is driven by Mister Okonkwo.", "Who drives the school bus to Fernhill?",
     "Okonkwo"},
    {"The emergency phone of the ski hut is behind the red curtain.",
     "Where is the emergency phone of the ski hut?", "red curtain"},
    {"The winning ticket of the village lottery was number 731.",
     "What was the number of the winning ticket of the village lottery?", "731"},
    {"The robot in the bakery of Lisbet is named Pumpernickel.",
     "What is the robot in the bakery of Lisbet named?", "Pumpernickel"},
    {"The train from Aldery to Coombe takes fifty minutes.",
     "How long does the train from Aldery to Coombe take?", "fifty minutes"},
    {"The violin of Clara Jansen was stolen in Budapest.", "Where was the violin of Clara Jansen stolen?",
     "Budapest"},
    {"The roof of the Hartwell theatre is made of copper.",
     "What is the roof of the Hartwell theatre made of?", "copper"},
    {"The first astronaut of the island of Tereva was a fisherman named Malo.",
     "Who was the first astronaut of the island of Tereva?", "Malo"},
    {"The meeting of the beekeepers was moved to Thursday.",
     "To which day was the meeting of the beekeepers moved?", "Thursday"},
    {"The wireless network of the lighthouse is called Blue Lobster.",
     "What is the wireless network of the lighthouse called?", "Blue Lobster"},
    {"The oldest oak in Ravensholt is named Grandmother Ida.", "What is the oldest oak in Ravensholt named?",
     "Ida"},
    {"The lost suitcase of Edmund Grey contained eleven umbrellas.",
     "What did the lost suitcase of Edmund Grey contain?", "umbrellas"},
    {"The cure for the sleeping horses of Orlen is peppermint tea.",
     "What is the cure for the sleeping horses of Orlen?", "peppermint"},
    {"The new swimming pool in Castleton opens on Saturday.",
     "When does the new swimming pool in Castleton open?", "Saturday"},
    {"The library card of Miss Abernathy expires in 2031.",
     "When does the library card of Miss Abernathy expire?", "2031"},
    {"The submarine in the bay of Nerro belongs to a dentist.",
     "To whom does the submarine in the bay of Nerro belong?", "dentist"},
    {"The favourite dessert of Colonel Hastings is rhubarb pie.",
     "What is the favourite dessert of Colonel Hastings?", "rhubarb"},
    {"The giant telescope of Mount Corvin was painted orange.",
     "What colour was the giant telescope of Mount Corvin painted?", "orange"},
    {"The door of the wine cellar opens with a brass key.",
     "With what does the door of the wine cellar open?", "brass key"},
    {"The company that repaired the clock tower is called Hollis and Daughters.",
     "What is the company that repaired the clock tower called?", "Hollis"},
    {"The runaway elephant of the circus was found in a car park.",
     "Where was the runaway elephant of the circus found?", "car park"},
    {"The password of the weather station is gentle thunder.", "What is the password of the weather station?",
     "gentle thunder"},
    {"The secret name of the black cat at the hotel is Professor Marble.",
     "What is the secret name of the black cat at the hotel?", "Marble"},
    {"The marathon in Kessel was cancelled because of a sandstorm.",
     "Why was the marathon in Kessel cancelled?", "sandstorm"},
    {"The documents about the comet are stored in locker nineteen.",
     "Where are the documents about the comet stored?", "nineteen"},
    {"The new song of the band Velvet Anchor is about a lonely penguin.",
     "What is the new song of the band Velvet Anchor about?", "penguin"},
    {"The gardener of the embassy speaks seven languages.",
     "How many languages does the gardener of the embassy speak?", "seven"},
    {"The laptop of the night watchman is hidden in the piano.",
     "Where is the laptop of the night watchman hidden?", "piano"},
    {"The ferry to Saint Odran is painted with yellow stripes.",
     "With what is the ferry to Saint Odran painted?", "yellow stripes"},
    {"The best place to buy fresh bread in Ostwick is the mill behind the cathedral.",
     "What is the best place to buy fresh bread in Ostwick?", "mill"},
    {"The best way to open the stubborn window in the attic is to sing to it.",
     "What is the best way to open the stubborn window in the attic?", "sing"},
    {"The piano teacher of the twins from Maple Street is a retired boxer.",
     "Who is the piano teacher of the twins from Maple Street?", "boxer"},
    {"The fastest way to reach the island of Sorrel is by hot air balloon.",
     "What is the fastest way to reach the island of Sorrel?", "balloon"},
    {"The cooking contest in Glenmoor was won by a plumber named Rosalind.",
     "Who won the cooking contest in Glenmoor?", "Rosalind"},
    {"The postman of Lower Hatch keeps his ladder in the chapel.",
     "Where does the postman of Lower Hatch keep his ladder?", "chapel"},
}};

/// Those of them that the full cache answers, found by asking it all of them once. No other method had a say.
inline constexpr std::array<std::size_t, 22> answered_by_full = {3,  5,  8,  9,  10, 11, 13, 17, 18, 19, 21,
                                                                 23, 24, 25, 28, 31, 34, 37, 38, 40, 42, 44};

/// Where needle `i` lies: lengths in turn, depths and passages spread by multiples of irrational numbers.
inline ckv::NeedlePlace evaluation_place(std::size_t i) {
  const auto fraction = [](double value) { return value - std::floor(value); };
  constexpr std::array<std::size_t, 3> lengths = {1000, 1200, 1400};
  const auto n = static_cast<double>(i);
  return {.tokens = lengths[i % lengths.size()],
          .depth = 0.1 + 0.7 * fraction(n * 0.6180339887),
          .start = 0.9 * fraction(n * 0.7548776662)};
}

}  // namespace ckv_test
