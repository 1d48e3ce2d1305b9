// The digest that ties a result to the exact model file it came from.
#pragma once

#include <filesystem>
#include <string>

namespace engine {

/// SHA-256 of a file's bytes as 64 lower-case hexadecimal digits. Reads the file once, in pieces of 1 MiB.
/// Throws Error when the file cannot be read.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace engine
