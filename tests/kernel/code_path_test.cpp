#include <gtest/gtest.h>

#include <compresskv/kernel/code_path.hpp>
#include <string>

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
  EXPECT_EQ(name(CodePath::avx512), "avx512");
  EXPECT_EQ(name(CodePath::avx512_bf16), "avx512_bf16");
}

TEST(CodePath, TheFastestSupportedOneIsUsedUnlessForced) {
  bool faster = false;
  for (const CodePath path : all_code_paths) {
    faster = faster || path == code_path();
    EXPECT_EQ(supported(path), !faster || path == code_path())
        << name(path) << ", in use " << name(code_path());
  }
  const reference::ForcedPath forced(CodePath::portable);
  EXPECT_FALSE(uses(CodePath::avx2));
  EXPECT_TRUE(uses(CodePath::portable));
}

TEST(CodePath, OneThatTheCpuLacksIsRejected) {
  if (fastest_code_path() == all_code_paths.back()) {
    GTEST_SKIP() << "this CPU supports every path";
  }
  for (const CodePath path : all_code_paths) {
    if (!supported(path)) {
      const std::string fastest(name(fastest_code_path()));
      reference::expect_error<ArgumentError>(
          [&] { force_code_path(path); },
          {"code path '" + std::string(name(path)) + "' is not supported", "use '" + fastest + "'"});
    }
  }
}

}  // namespace
}  // namespace compresskv::kernel
