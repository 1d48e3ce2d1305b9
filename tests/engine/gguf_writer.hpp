// Writes small GGUF files in memory, for tests: correct ones, and through raw access broken ones.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace engine::test {

class Bytes {
 public:
  template <typename T>
  requires std::is_arithmetic_v<T> Bytes& put(T value) {
    const std::size_t at = bytes_.size();
    bytes_.resize(at + sizeof value);
    std::memcpy(bytes_.data() + at, &value, sizeof value);
    return *this;
  }
  Bytes& put(std::string_view text) {
    put(std::uint64_t{text.size()});
    const auto* data = reinterpret_cast<const std::byte*>(text.data());
    bytes_.insert(bytes_.end(), data, data + text.size());
    return *this;
  }
  Bytes& append(std::span<const std::byte> more) {
    bytes_.insert(bytes_.end(), more.begin(), more.end());
    return *this;
  }
  Bytes& pad(std::size_t alignment) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  std::size_t size() const { return bytes_.size(); }
  const std::vector<std::byte>& get() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

/// Codes of metadata value types in the file.
template <typename T>
constexpr std::uint32_t value_code() {
  if constexpr (std::same_as<T, std::uint8_t>) return 0;
  if constexpr (std::same_as<T, std::int8_t>) return 1;
  if constexpr (std::same_as<T, std::uint16_t>) return 2;
  if constexpr (std::same_as<T, std::int16_t>) return 3;
  if constexpr (std::same_as<T, std::uint32_t>) return 4;
  if constexpr (std::same_as<T, std::int32_t>) return 5;
  if constexpr (std::same_as<T, float>) return 6;
  if constexpr (std::same_as<T, bool>) return 7;
  if constexpr (std::same_as<T, std::string>) return 8;
  if constexpr (std::same_as<T, std::uint64_t>) return 10;
  if constexpr (std::same_as<T, std::int64_t>) return 11;
  return 12;
}

/// A file in the making; every field can be overridden before `bytes()`.
struct GgufWriter {
  struct TensorEntry {
    std::string name;
    std::vector<std::uint64_t> shape;
    std::uint32_t type = 0;
    std::uint64_t offset = 0;
  };

  std::uint32_t magic = 0x46554747;
  std::uint32_t version = 3;
  std::size_t alignment = 32;
  std::vector<std::pair<std::string, Bytes>> metadata;  // key; type and value as they lie in the file
  std::vector<TensorEntry> tensors;
  Bytes data;
  std::int64_t more_tensors = 0;  // added to the counts in the header
  std::int64_t more_metadata = 0;

  template <typename T>
  GgufWriter& set(std::string key, T value) {
    Bytes encoded;
    encoded.put(value_code<T>());
    if constexpr (std::same_as<T, std::string>) {
      encoded.put(std::string_view{value});
    } else {
      encoded.put(value);
    }
    return set_raw(std::move(key), std::move(encoded));
  }
  template <typename T>
  GgufWriter& set_array(std::string key, const std::vector<T>& items) {
    Bytes encoded;
    encoded.put(std::uint32_t{9}).put(value_code<T>()).put(std::uint64_t{items.size()});
    for (const auto& item : items) {
      if constexpr (std::same_as<T, std::string>) {
        encoded.put(std::string_view{item});
      } else {
        encoded.put(static_cast<T>(item));
      }
    }
    return set_raw(std::move(key), std::move(encoded));
  }
  /// Replaces the value of a key that is there already.
  GgufWriter& set_raw(std::string key, Bytes encoded) {
    for (auto& [known, value] : metadata) {
      if (known == key) {
        value = std::move(encoded);
        return *this;
      }
    }
    metadata.emplace_back(std::move(key), std::move(encoded));
    return *this;
  }
  GgufWriter& tensor(std::string name, std::vector<std::uint64_t> shape, std::uint32_t type,
                     std::span<const std::byte> content) {
    data.pad(alignment);
    tensors.push_back({std::move(name), std::move(shape), type, data.size()});
    data.append(content);
    return *this;
  }
  GgufWriter& tensor(std::string name, std::vector<std::uint64_t> shape, std::span<const float> content) {
    return tensor(std::move(name), std::move(shape), 0, std::as_bytes(content));
  }

  std::vector<std::byte> bytes() const {
    Bytes out;
    out.put(magic).put(version);
    out.put(static_cast<std::int64_t>(tensors.size()) + more_tensors);
    out.put(static_cast<std::int64_t>(metadata.size()) + more_metadata);
    for (const auto& [key, value] : metadata) out.put(std::string_view{key}).append(value.get());
    for (const TensorEntry& tensor : tensors) {
      out.put(std::string_view{tensor.name}).put(static_cast<std::uint32_t>(tensor.shape.size()));
      for (const std::uint64_t extent : tensor.shape) out.put(extent);
      out.put(tensor.type).put(tensor.offset);
    }
    out.pad(alignment).append(data.get());
    return out.get();
  }
};

}  // namespace engine::test
