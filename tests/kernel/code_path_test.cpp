#include <gtest/gtest.h>

#include <compresskv/kernel/code_path.hpp>

#include "reference/errors.hpp"
#include "reference/forced_path.hpp"

namespace compresskv::kernel {
namespace {

TEST(CodePath, PortableIsAlwaysThere) {
  EXPECT_TRUE(supported(CodePath::portable));
  const reference::ForcedPath forced(CodePath::portable);
  EXPECT_EQ(code_path(), CodePath::portable);
}

TEST(CodePath, NamesAreThoseOfTheOutput) {
  EXPECT_EQ(name(CodePath::portable), "portable");
  EXPECT_EQ(name(CodePath::avx2), "avx2");
}

TEST(CodePath, TheFastestSupportedOneIsUsedUnlessForced) {
  EXPECT_EQ(code_path(), supported(CodePath::avx2) ? CodePath::avx2 : CodePath::portable);
}

TEST(CodePath, OneThatTheCpuLacksIsRejected) {
  if (supported(CodePath::avx2)) {
    GTEST_SKIP() << "this CPU supports every path";
  }
  reference::expect_error<ArgumentError>([] { force_code_path(CodePath::avx2); },
                                         {"code path 'avx2' is not supported", "use 'portable'"});
}

}  // namespace
}  // namespace compresskv::kernel
