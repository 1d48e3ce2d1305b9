#include <gtest/gtest.h>

#include <compresskv/core/workspace.hpp>
#include <cstdint>

namespace compresskv {
namespace {

TEST(Workspace, SlotsAreApartAndKeepTheirMemory) {
  Workspace workspace;
  EXPECT_EQ(workspace.bytes(), 0U);
  const auto scores = workspace.take(Workspace::Slot::scores, 10);
  const auto logits = workspace.take(Workspace::Slot::logits, 20);
  ASSERT_EQ(scores.size(), 10U);
  ASSERT_EQ(logits.size(), 20U);
  scores[9] = 1.0F;
  logits[0] = 2.0F;
  EXPECT_EQ(scores[9], 1.0F);
  // A cache line more for each slot: all start with a line.
  EXPECT_EQ(workspace.bytes(), (10 + 16 + 20 + 16) * sizeof(float));
  for (const auto span : {scores, logits}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(span.data()) % 64, 0U);
  }
  const auto fewer = workspace.take(Workspace::Slot::scores, 4);
  EXPECT_EQ(fewer.size(), 4U);
  EXPECT_EQ(fewer.data(), scores.data()) << "a smaller request uses the memory that is there";
  EXPECT_EQ(workspace.bytes(), (10 + 16 + 20 + 16) * sizeof(float));
  EXPECT_TRUE(workspace.take(Workspace::Slot::queries, 0).empty());
}

}  // namespace
}  // namespace compresskv
