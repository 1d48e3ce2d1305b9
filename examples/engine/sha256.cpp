#include "sha256.hpp"

#include <fmt/core.h>
#include <openssl/evp.h>

#include <array>
#include <fstream>
#include <memory>
#include <vector>

#include "error.hpp"

namespace engine {

std::string sha256_of_file(const std::filesystem::path& path) {
  std::ifstream file{path, std::ios::binary};
  if (!file) throw Error(fmt::format("{}: cannot open the file to compute its SHA-256", path.string()));

  const auto free_context = [](EVP_MD_CTX* context) { EVP_MD_CTX_free(context); };
  const std::unique_ptr<EVP_MD_CTX, decltype(free_context)> context{EVP_MD_CTX_new(), free_context};
  const auto check = [&](bool done) {
    if (!done) throw Error(fmt::format("{}: OpenSSL could not compute the SHA-256", path.string()));
  };
  check(context != nullptr && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1);

  std::vector<char> piece(1U << 20);
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())), file.gcount() > 0) {
    check(EVP_DigestUpdate(context.get(), piece.data(), static_cast<std::size_t>(file.gcount())) == 1);
  }
  if (file.bad()) throw Error(fmt::format("{}: reading failed before the end of the file", path.string()));

  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int digest_bytes = 0;
  check(EVP_DigestFinal_ex(context.get(), digest.data(), &digest_bytes) == 1);
  std::string text;
  for (unsigned int i = 0; i < digest_bytes; ++i) text += fmt::format("{:02x}", digest[i]);
  return text;
}

}  // namespace engine
