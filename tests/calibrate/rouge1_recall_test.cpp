#include "compresskv/calibrate/rouge1_recall.hpp"

#include <gtest/gtest.h>

#include "message_of.hpp"

namespace {

using compresskv::ArgumentError;
using compresskv::calibrate::answered;
using compresskv::calibrate::rouge1_recall;
using compresskv::test::message_of;

TEST(Rouge1Recall, CountsTheReferencesWords) {
  EXPECT_EQ(rouge1_recall("The cat sat.", "the cat sat"), 1.0);
  EXPECT_EQ(rouge1_recall("sat cat THE and much more", "the cat sat"), 1.0);
  EXPECT_EQ(rouge1_recall("a dog sat", "the cat sat on"), 0.25);
  EXPECT_EQ(rouge1_recall("", "the cat"), 0.0);
}

TEST(Rouge1Recall, AWordCountsAtMostAsOftenAsGivenAndAsWanted) {
  EXPECT_EQ(rouge1_recall("the the the the", "the cat the hat"), 0.5);
  EXPECT_EQ(rouge1_recall("the", "the cat the hat"), 0.25);
}

TEST(Rouge1Recall, WordsAreLettersAndDigits) {
  EXPECT_EQ(rouge1_recall("don't-stop_it", "don t stop it"), 1.0);
  EXPECT_EQ(rouge1_recall("gate 42b", "Gate-42B!"), 1.0);
  EXPECT_EQ(rouge1_recall("caf\xC3\xA9s", "caf s"), 1.0);
  EXPECT_EQ(rouge1_recall("walks", "walk"), 0.0) << "no stemming";
}

TEST(Rouge1Recall, ARunCountsAboveAHalf) {
  EXPECT_FALSE(answered("one two", "one two three four"));
  EXPECT_TRUE(answered("one two three", "one two three four"));
  EXPECT_FALSE(answered("", "one"));
}

TEST(Rouge1Recall, RejectsAReferenceWithoutWords) {
  EXPECT_EQ(message_of<ArgumentError>([] { rouge1_recall("word", "?!"); }),
            "reference \"?!\" has no word of letters a-z or digits: give the answer that is looked for");
}

}  // namespace
