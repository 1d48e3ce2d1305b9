// What stands in for the tests of the adapter where there is no libllama.

#include <gtest/gtest.h>

TEST(LlamaCpp, IsTestedWhereItIsFound) {
  GTEST_SKIP() << "libllama was not found: run scripts/llama_cpp.sh and configure again";
}
