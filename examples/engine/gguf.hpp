// Reading GGUF files (versions 2 and 3, little-endian): metadata, the tensor directory, and the tensors'
// bytes.
//
// A file comes from anywhere, so nothing in it is trusted: each count and length is bounded by the bytes that
// are left in the file before anything is allocated, and everything is checked before `open` returns. Tensor
// data stays in the file until `read` asks for it; `dequantise.hpp` turns it into floats. Nothing is mapped:
// a file that another program cuts short meanwhile is an Error, not a SIGBUS.
//
//   | header | metadata: key, type, value ... | directory: name, dims, type, offset ... | pad | tensor data
//   ... |
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "error.hpp"

namespace engine {

/// How a tensor's numbers are stored: the file's own code, which may be one that we do not know.
enum class TensorType : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q2_k = 10,
  q3_k = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30,
};

/// "Q4_1", "BF16", ...; for a type without a decoder here its published name, or "type 99" where it has none.
std::string type_name(TensorType type);

/// An array value. Integers of every width are widened, so that a reader need not care which one a writer
/// chose.
using MetadataArray = std::variant<std::vector<std::uint64_t>, std::vector<std::int64_t>, std::vector<double>,
                                   std::vector<bool>, std::vector<std::string>>;

/// A metadata value: unsigned, signed, real, bool, text or an array of one of them.
using MetadataValue = std::variant<std::uint64_t, std::int64_t, double, bool, std::string, MetadataArray>;

struct MetadataEntry {
  std::string key;
  MetadataValue value;
};

/// One row of the tensor directory.
struct Tensor {
  std::string name;
  std::vector<std::uint64_t> shape;  ///< as in the file: the dimension that is contiguous in memory first
  TensorType type{};
  std::uint64_t elements = 0;
  std::uint64_t offset = 0;  ///< of its first byte in the file
  std::uint64_t bytes = 0;   ///< that it takes there
};

/// "[576, 1536]", in the file's order.
std::string shape_text(std::span<const std::uint64_t> shape);

/// A value as one line for people: text in quotes with control characters escaped, arrays shortened to
/// `max_items`.
std::string value_text(const MetadataValue& value, std::size_t max_items = 6);

namespace detail {

class GgufSource;

/// `value` as T where that loses nothing, else nothing: any integer that fits, any real, bool, text, arrays
/// of them.
template <typename T, typename From>
std::optional<T> convert_scalar(const From& value) {
  if constexpr (std::same_as<T, From>) {
    return value;
  } else if constexpr (std::integral<T> && std::integral<From> && !std::same_as<T, bool> &&
                       !std::same_as<From, bool>) {
    if (!std::in_range<T>(value)) return std::nullopt;
    return static_cast<T>(value);
  } else if constexpr (std::floating_point<T> && std::floating_point<From>) {
    return static_cast<T>(value);
  } else {
    return std::nullopt;
  }
}

template <typename T>
struct ArrayElement {};
template <typename E>
struct ArrayElement<std::vector<E>> {
  using type = E;
};
template <typename T>
concept VectorOfValues = requires {
  typename ArrayElement<T>::type;
};

template <VectorOfValues T>
std::optional<T> convert_array(const MetadataArray& array) {
  using Element = typename ArrayElement<T>::type;
  return std::visit(
      [](const auto& items) -> std::optional<T> {
        T out;
        out.reserve(items.size());
        for (const auto& item : items) {
          using From = std::remove_cvref_t<typename std::remove_cvref_t<decltype(items)>::value_type>;
          const std::optional<Element> element = convert_scalar<Element, From>(item);
          if (!element) return std::nullopt;
          out.push_back(*element);
        }
        return out;
      },
      array);
}

template <typename T>
std::optional<T> convert(const MetadataValue& value) {
  return std::visit(
      [](const auto& held) -> std::optional<T> {
        using From = std::remove_cvref_t<decltype(held)>;
        if constexpr (std::same_as<From, MetadataArray>) {
          if constexpr (VectorOfValues<T>) {
            return convert_array<T>(held);
          } else {
            return std::nullopt;
          }
        } else {
          return convert_scalar<T, From>(held);
        }
      },
      value);
}

}  // namespace detail

/// A GGUF file, open for reading. Copies share it.
class GgufFile {
 public:
  /// Opens and checks the file. Throws Error saying what is wrong and at which byte.
  static GgufFile open(const std::filesystem::path& path);

  /// The same from bytes in memory (copied); `name` stands for the path in messages.
  static GgufFile from_bytes(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }
  std::uint32_t version() const { return version_; }
  std::uint64_t file_bytes() const;
  std::span<const MetadataEntry> metadata() const { return metadata_; }
  std::span<const Tensor> tensors() const { return tensors_; }

  /// The tensor of that name, or nullptr. O(log n).
  const Tensor* find_tensor(std::string_view name) const;

  /// The value of that key, or nullptr. O(log n).
  const MetadataValue* find_value(std::string_view key) const;

  bool has(std::string_view key) const { return find_value(key) != nullptr; }

  /// How many items the array of that key has, or nothing where the key is absent or no array.
  std::optional<std::size_t> array_size(std::string_view key) const;

  /// The tensor's bytes, as they are in the file. Throws Error where the file has become shorter since it was
  /// opened. Several threads may read at once.
  std::vector<std::byte> read(const Tensor& tensor) const;

  /// The value as T: an integer type, float or double, bool, std::string, or a std::vector of one of these.
  /// Nothing where the key is absent. Throws Error where the value is of another kind or does not fit into T.
  template <typename T>
  std::optional<T> find(std::string_view key) const {
    const MetadataValue* value = find_value(key);
    if (value == nullptr) return std::nullopt;
    std::optional<T> converted = detail::convert<T>(*value);
    if (!converted) throw_wrong_kind(key, *value);
    return converted;
  }

  /// As find, but an absent key is an Error as well.
  template <typename T>
  T get(std::string_view key) const {
    std::optional<T> value = find<T>(key);
    if (!value) throw_missing(key);
    return *std::move(value);
  }

 private:
  GgufFile(std::shared_ptr<const detail::GgufSource> source, std::string name);
  void parse();
  void check_overlaps() const;
  [[noreturn]] void throw_wrong_kind(std::string_view key, const MetadataValue& value) const;
  [[noreturn]] void throw_missing(std::string_view key) const;

  std::shared_ptr<const detail::GgufSource> source_;
  std::string name_;
  std::uint32_t version_ = 0;
  std::vector<MetadataEntry> metadata_;
  std::vector<Tensor> tensors_;
  std::vector<std::size_t> by_key_;   // indices into metadata_, by key
  std::vector<std::size_t> by_name_;  // indices into tensors_, by name
};

}  // namespace engine
