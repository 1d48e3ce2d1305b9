#include "gguf.hpp"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <numeric>
#include <system_error>

#include "dequantise.hpp"

static_assert(std::endian::native == std::endian::little, "GGUF files are read as little-endian bytes");

namespace engine {

// Where the bytes come from: an open file, or a copy of bytes given in memory.
class detail::GgufSource {
 public:
  GgufSource(std::vector<std::byte> bytes, std::string name)
      : copy_{std::move(bytes)}, name_{std::move(name)}, size_{copy_.size()} {}

  explicit GgufSource(const std::filesystem::path& path) : name_{path.string()} {
    // Without O_NONBLOCK a pipe that nobody writes to would be waited for.
    file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file_ < 0) throw system_error("open the file");
    struct stat status {};
    const bool is_known = ::fstat(file_, &status) == 0;
    if (is_known && S_ISREG(status.st_mode) && status.st_size > 0) {
      size_ = static_cast<std::uint64_t>(status.st_size);
      return;
    }
    const Error error =
        !is_known ? system_error("read the file's size")
        : S_ISREG(status.st_mode)
            ? Error(fmt::format("{}: the file is empty", name_))
            : Error(fmt::format("{}: not a regular file; give the path of a .gguf file", name_));
    ::close(file_);
    throw error;
  }

  GgufSource(const GgufSource&) = delete;
  GgufSource& operator=(const GgufSource&) = delete;
  ~GgufSource() {
    if (file_ >= 0) ::close(file_);
  }

  const std::string& name() const { return name_; }
  std::uint64_t size() const { return size_; }

  // Fills `out` from byte `at` on; all of it lies within size().
  void read(std::uint64_t at, std::span<std::byte> out) const {
    if (file_ < 0) {
      std::ranges::copy(std::span{copy_}.subspan(at, out.size()), out.begin());
      return;
    }
    while (!out.empty()) {
      const ::ssize_t count = ::pread(file_, out.data(), out.size(), static_cast<::off_t>(at));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) throw system_error(fmt::format("read byte {}", at));
      if (count == 0) {
        throw Error(
            fmt::format("{}: the file ends at byte {} now, it had {} bytes when it was opened; it is "
                        "being written or was cut: try again when it is whole",
                        name_, at, size_));
      }
      at += static_cast<std::uint64_t>(count);
      out = out.subspan(static_cast<std::size_t>(count));
    }
  }

 private:
  Error system_error(std::string_view doing) const {
    return Error(fmt::format("{}: cannot {}: {}", name_, doing, std::generic_category().message(errno)));
  }

  std::vector<std::byte> copy_;
  std::string name_;
  int file_ = -1;
  std::uint64_t size_ = 0;
};

namespace {

constexpr std::uint32_t magic = 0x46554747;      // "GGUF"
constexpr std::uint64_t default_alignment = 32;  // where general.alignment is absent
constexpr std::uint32_t most_dimensions = 4;     // ggml's own limit
constexpr std::uint64_t most_items = 1ULL
                                     << 24;  // of an array; the largest vocabularies have under 2^19 tokens
// A file full of holes is small on the disk and large by its size, which then bounds nothing.
constexpr std::uint64_t most_text = 1ULL << 26;     // bytes of one text; chat templates have under 2^17
constexpr std::uint64_t most_entries = 1ULL << 20;  // of metadata, and tensors

// The least bytes that an entry can take: what bounds the counts in the header by the size of the file.
constexpr std::uint64_t least_metadata_bytes = 8 + 4 + 1;  // key length, type, one byte of value
constexpr std::uint64_t least_tensor_bytes =
    8 + 4 + 8 + 4 + 8;  // name length, rank, one dimension, type, offset

enum class ValueType : std::uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};

struct TypeName {
  std::uint32_t code;
  std::string_view name;
};

// All published codes, so that a type without a decoder is refused by its name.
constexpr std::array type_names = {
    TypeName{0, "F32"},      TypeName{1, "F16"},     TypeName{2, "Q4_0"},     TypeName{3, "Q4_1"},
    TypeName{6, "Q5_0"},     TypeName{7, "Q5_1"},    TypeName{8, "Q8_0"},     TypeName{9, "Q8_1"},
    TypeName{10, "Q2_K"},    TypeName{11, "Q3_K"},   TypeName{12, "Q4_K"},    TypeName{13, "Q5_K"},
    TypeName{14, "Q6_K"},    TypeName{15, "Q8_K"},   TypeName{16, "IQ2_XXS"}, TypeName{17, "IQ2_XS"},
    TypeName{18, "IQ3_XXS"}, TypeName{19, "IQ1_S"},  TypeName{20, "IQ4_NL"},  TypeName{21, "IQ3_S"},
    TypeName{22, "IQ2_S"},   TypeName{23, "IQ4_XS"}, TypeName{24, "I8"},      TypeName{25, "I16"},
    TypeName{26, "I32"},     TypeName{27, "I64"},    TypeName{28, "F64"},     TypeName{29, "IQ1_M"},
    TypeName{30, "BF16"},    TypeName{34, "TQ1_0"},  TypeName{35, "TQ2_0"},   TypeName{39, "MXFP4"},
};

std::string in_quotes(std::string_view text, std::size_t most = 80) {
  std::string out = "\"";
  for (const char c : text.substr(0, most)) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned>(static_cast<unsigned char>(c)));
    } else {
      out += c;
    }
  }
  out += text.size() > most ? "...\"" : "\"";
  return out;
}

// A position in the file. Every read is checked against the end, and says what it was reading when it fails.
class Cursor {
 public:
  explicit Cursor(const detail::GgufSource& source) : source_{source} {}

  std::uint64_t at() const { return at_; }
  std::uint64_t left() const { return source_.size() - at_; }
  void now(std::string what) { what_ = std::move(what); }

  [[noreturn]] void fail(const std::string& problem) const {
    throw Error(fmt::format("{}: {} (byte {}): {}", source_.name(), what_, at_, problem));
  }

  template <typename T>
  T number() {
    if (left() < sizeof(T)) {
      fail(fmt::format("{} bytes are needed, {} are left; the file is truncated", sizeof(T), left()));
    }
    T value;
    take({reinterpret_cast<std::byte*>(&value), sizeof(T)});
    return value;
  }

  std::string string() {
    const auto length = number<std::uint64_t>();
    if (length > left()) {
      fail(fmt::format("a text of {} bytes, but {} are left; the file is truncated or damaged", length,
                       left()));
    }
    if (length > most_text)
      fail(fmt::format("a text of {} bytes; at most {} are supported", length, most_text));
    std::string text(length, '\0');
    take({reinterpret_cast<std::byte*>(text.data()), text.size()});
    return text;
  }

  bool boolean() {
    const auto value = number<std::uint8_t>();
    if (value > 1) fail(fmt::format("a bool must be 0 or 1, this one is {}", value));
    return value == 1;
  }

  // A count of things of at least `least_bytes` each that are still to come.
  std::uint64_t count(std::uint64_t value, std::uint64_t least_bytes, std::string_view of) const {
    if (value > left() / least_bytes) {
      fail(fmt::format(
          "{} {} take at least {} bytes each, but {} bytes are left; the file is truncated or damaged", value,
          of, least_bytes, left()));
    }
    return value;
  }

 private:
  // Reads ahead, so that a number does not cost a call of the system.
  void take(std::span<std::byte> out) {
    constexpr std::uint64_t ahead = 1U << 18U;
    if (at_ < first_ || out.size() > first_ + buffer_.size() - at_) {
      first_ = at_;
      buffer_.resize(std::min(left(), std::max<std::uint64_t>(ahead, out.size())));
      source_.read(at_, buffer_);
    }
    std::memcpy(out.data(), buffer_.data() + (at_ - first_), out.size());
    at_ += out.size();
  }

  const detail::GgufSource& source_;
  std::string what_ = "header";
  std::uint64_t at_ = 0;
  std::vector<std::byte> buffer_;  // what was read from byte first_ on
  std::uint64_t first_ = 0;
};

template <typename Wide, typename T>
MetadataArray read_numbers(Cursor& cursor, std::uint64_t count) {
  cursor.count(count, sizeof(T), "array items");
  std::vector<Wide> items(count);
  for (Wide& item : items) item = static_cast<Wide>(cursor.number<T>());
  return items;
}

MetadataArray read_array(Cursor& cursor) {
  const auto type = cursor.number<std::uint32_t>();
  const auto count = cursor.number<std::uint64_t>();
  if (count > most_items) {
    cursor.fail(fmt::format("an array of {} items; at most {} are supported", count, most_items));
  }
  using U = std::uint64_t;
  using I = std::int64_t;
  switch (static_cast<ValueType>(type)) {
    case ValueType::u8:
      return read_numbers<U, std::uint8_t>(cursor, count);
    case ValueType::u16:
      return read_numbers<U, std::uint16_t>(cursor, count);
    case ValueType::u32:
      return read_numbers<U, std::uint32_t>(cursor, count);
    case ValueType::u64:
      return read_numbers<U, std::uint64_t>(cursor, count);
    case ValueType::i8:
      return read_numbers<I, std::int8_t>(cursor, count);
    case ValueType::i16:
      return read_numbers<I, std::int16_t>(cursor, count);
    case ValueType::i32:
      return read_numbers<I, std::int32_t>(cursor, count);
    case ValueType::i64:
      return read_numbers<I, std::int64_t>(cursor, count);
    case ValueType::f32:
      return read_numbers<double, float>(cursor, count);
    case ValueType::f64:
      return read_numbers<double, double>(cursor, count);
    case ValueType::boolean: {
      cursor.count(count, 1, "array items");
      std::vector<bool> items(count);
      for (std::size_t i = 0; i < count; ++i) items[i] = cursor.boolean();
      return items;
    }
    case ValueType::string: {
      cursor.count(count, sizeof(std::uint64_t), "array items");
      std::vector<std::string> items;
      items.reserve(count);
      for (std::uint64_t i = 0; i < count; ++i) items.push_back(cursor.string());
      return items;
    }
    case ValueType::array:
      cursor.fail("an array of arrays; only arrays of numbers, bools and texts are supported");
  }
  cursor.fail(fmt::format("array items of type {}; the types are 0 to 12", type));
}

MetadataValue read_value(Cursor& cursor) {
  const auto type = cursor.number<std::uint32_t>();
  switch (static_cast<ValueType>(type)) {
    case ValueType::u8:
      return std::uint64_t{cursor.number<std::uint8_t>()};
    case ValueType::u16:
      return std::uint64_t{cursor.number<std::uint16_t>()};
    case ValueType::u32:
      return std::uint64_t{cursor.number<std::uint32_t>()};
    case ValueType::u64:
      return cursor.number<std::uint64_t>();
    case ValueType::i8:
      return std::int64_t{cursor.number<std::int8_t>()};
    case ValueType::i16:
      return std::int64_t{cursor.number<std::int16_t>()};
    case ValueType::i32:
      return std::int64_t{cursor.number<std::int32_t>()};
    case ValueType::i64:
      return cursor.number<std::int64_t>();
    case ValueType::f32:
      return double{cursor.number<float>()};
    case ValueType::f64:
      return cursor.number<double>();
    case ValueType::boolean:
      return cursor.boolean();
    case ValueType::string:
      return cursor.string();
    case ValueType::array:
      return read_array(cursor);
  }
  cursor.fail(fmt::format("a value of type {}; the types are 0 to 12", type));
}

// Sorted order of `items` by a member; equal neighbours are an error of the file.
template <typename T>
std::vector<std::size_t> index_by(const std::vector<T>& items, std::string T::*member,
                                  const std::string& file, std::string_view what) {
  std::vector<std::size_t> order(items.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, {}, [&](std::size_t i) -> const std::string& { return items[i].*member; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    const std::string& name = items[order[i]].*member;
    if (items[order[i - 1]].*member == name) {
      throw Error(fmt::format("{}: {} {} occurs twice; the file is damaged", file, what, in_quotes(name)));
    }
  }
  return order;
}

template <typename T>
const T* find_by(const std::vector<T>& items, const std::vector<std::size_t>& order, std::string T::*member,
                 std::string_view name) {
  const auto projection = [&](std::size_t i) { return std::string_view{items[i].*member}; };
  const auto found = std::ranges::lower_bound(order, name, {}, projection);
  if (found == order.end() || projection(*found) != name) return nullptr;
  return &items[*found];
}

std::string_view kind_text(const MetadataValue& value) {
  constexpr std::array<std::string_view, 6> names = {
      "an unsigned integer", "a signed integer", "a real number", "a bool", "a text", "an array"};
  return names[value.index()];
}

}  // namespace

std::string type_name(TensorType type) {
  const auto code = static_cast<std::uint32_t>(type);
  const auto* found = std::ranges::find(type_names, code, &TypeName::code);
  return found == type_names.end() ? fmt::format("type {}", code) : std::string{found->name};
}

std::string shape_text(std::span<const std::uint64_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string value_text(const MetadataValue& value, std::size_t max_items) {
  const auto item_text = [](const auto& item) {
    using Item = std::remove_cvref_t<decltype(item)>;
    if constexpr (std::same_as<Item, std::string>) {
      return in_quotes(item);
    } else {
      return fmt::format("{}", item);
    }
  };
  const auto array_text = [&](const MetadataArray& array) {
    return std::visit(
        [&](const auto& items) {
          std::string out = "[";
          for (std::size_t i = 0; i < items.size() && i < max_items; ++i) {
            if (i > 0) out += ", ";
            if constexpr (std::same_as<std::remove_cvref_t<decltype(items)>, std::vector<bool>>) {
              out += items[i] ? "true" : "false";
            } else {
              out += item_text(items[i]);
            }
          }
          if (items.size() > max_items) out += fmt::format(", ... {} items", items.size());
          return out + "]";
        },
        array);
  };
  return std::visit(
      [&](const auto& held) {
        if constexpr (std::same_as<std::remove_cvref_t<decltype(held)>, MetadataArray>) {
          return array_text(held);
        } else {
          return item_text(held);
        }
      },
      value);
}

GgufFile GgufFile::open(const std::filesystem::path& path) {
  GgufFile result{std::make_shared<detail::GgufSource>(path), path.string()};
  result.parse();
  return result;
}

GgufFile GgufFile::from_bytes(std::span<const std::byte> bytes, std::string name) {
  auto source =
      std::make_shared<detail::GgufSource>(std::vector<std::byte>(bytes.begin(), bytes.end()), name);
  GgufFile result{std::move(source), std::move(name)};
  result.parse();
  return result;
}

GgufFile::GgufFile(std::shared_ptr<const detail::GgufSource> source, std::string name)
    : source_{std::move(source)}, name_{std::move(name)} {}

std::uint64_t GgufFile::file_bytes() const { return source_->size(); }

std::vector<std::byte> GgufFile::read(const Tensor& tensor) const {
  std::vector<std::byte> out(tensor.bytes);
  source_->read(tensor.offset, out);
  return out;
}

void GgufFile::parse() {
  Cursor cursor{*source_};
  if (const auto found = cursor.number<std::uint32_t>(); found != magic) {
    cursor.fail("the file does not begin with GGUF; it is not a GGUF file");
  }
  version_ = cursor.number<std::uint32_t>();
  if ((version_ & 0xffffU) == 0 && version_ != 0) {
    cursor.fail("the file is big-endian; only little-endian files are supported");
  }
  if (version_ != 2 && version_ != 3) {
    cursor.fail(fmt::format("GGUF version {}; versions 2 and 3 are supported", version_));
  }
  const auto tensor_count = cursor.number<std::uint64_t>();
  const auto metadata_count = cursor.number<std::uint64_t>();
  cursor.count(metadata_count, least_metadata_bytes, "metadata entries");
  cursor.count(tensor_count, least_tensor_bytes, "tensors");
  if (metadata_count > most_entries || tensor_count > most_entries) {
    cursor.fail(fmt::format("{} metadata entries and {} tensors; at most {} of each are supported",
                            metadata_count, tensor_count, most_entries));
  }

  metadata_.reserve(metadata_count);
  for (std::uint64_t i = 0; i < metadata_count; ++i) {
    cursor.now(fmt::format("key of metadata entry {} of {}", i + 1, metadata_count));
    std::string key = cursor.string();
    if (key.empty()) cursor.fail("the key is empty");
    cursor.now(fmt::format("value of {}", in_quotes(key)));
    MetadataValue value = read_value(cursor);
    metadata_.push_back({.key = std::move(key), .value = std::move(value)});
  }
  by_key_ = index_by(metadata_, &MetadataEntry::key, name_, "metadata key");

  const std::uint64_t alignment = find<std::uint64_t>("general.alignment").value_or(default_alignment);
  if (alignment < 8 || !std::has_single_bit(alignment) || alignment > (1U << 30)) {
    throw Error(fmt::format("{}: general.alignment is {}; it must be a power of two from 8 to 2^30", name_,
                            alignment));
  }

  std::vector<std::uint64_t> offsets;
  offsets.reserve(tensor_count);
  tensors_.reserve(tensor_count);
  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    cursor.now(fmt::format("name of tensor {} of {}", i + 1, tensor_count));
    Tensor tensor{.name = cursor.string(), .shape = {}};
    if (tensor.name.empty()) cursor.fail("the name is empty");
    cursor.now(fmt::format("tensor {}", in_quotes(tensor.name)));
    const auto rank = cursor.number<std::uint32_t>();
    if (rank < 1 || rank > most_dimensions) {
      cursor.fail(fmt::format("{} dimensions; there must be 1 to {}", rank, most_dimensions));
    }
    tensor.elements = 1;
    for (std::uint32_t d = 0; d < rank; ++d) {
      const auto extent = cursor.number<std::uint64_t>();
      tensor.shape.push_back(extent);
      // Elements are kept below 2^60 so that no byte count below can wrap around.
      if (extent == 0 || extent > (1ULL << 60) / tensor.elements) {
        cursor.fail(fmt::format("shape {} is empty or too large", shape_text(tensor.shape)));
      }
      tensor.elements *= extent;
    }
    tensor.type = static_cast<TensorType>(cursor.number<std::uint32_t>());
    if (!is_supported(tensor.type)) {
      cursor.fail(
          fmt::format("stored as {}, which this engine cannot decode; convert the model to Q8_0, Q4_K or F16",
                      type_name(tensor.type)));
    }
    if (const std::size_t block = block_shape(tensor.type).elements; tensor.shape[0] % block != 0) {
      cursor.fail(fmt::format("{} has blocks of {}, which do not divide the first dimension of shape {}",
                              type_name(tensor.type), block, shape_text(tensor.shape)));
    }
    const auto offset = cursor.number<std::uint64_t>();
    if (offset % alignment != 0) {
      cursor.fail(
          fmt::format("data at offset {}, which is not a multiple of the alignment {}", offset, alignment));
    }
    offsets.push_back(offset);
    tensors_.push_back(std::move(tensor));
  }
  by_name_ = index_by(tensors_, &Tensor::name, name_, "tensor");

  const std::uint64_t data_start = (cursor.at() + alignment - 1) / alignment * alignment;
  const std::uint64_t room = file_bytes() > data_start ? file_bytes() - data_start : 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    Tensor& tensor = tensors_[i];
    const BlockShape block = block_shape(tensor.type);
    const std::uint64_t blocks = tensor.elements / block.elements;
    if (offsets[i] > room || blocks > (room - offsets[i]) / block.bytes) {
      throw Error(fmt::format(
          "{}: tensor {} of shape {} ({}) begins at byte {} and takes {} blocks of {} bytes, which "
          "goes beyond the file's {} bytes; the file is truncated or damaged",
          name_, in_quotes(tensor.name), shape_text(tensor.shape), type_name(tensor.type),
          data_start + offsets[i], blocks, block.bytes, file_bytes()));
    }
    tensor.offset = data_start + offsets[i];
    tensor.bytes = blocks * block.bytes;
  }
  check_overlaps();
}

void GgufFile::check_overlaps() const {
  std::vector<const Tensor*> by_place;
  for (const Tensor& tensor : tensors_) by_place.push_back(&tensor);
  std::ranges::sort(by_place, {}, &Tensor::offset);
  for (std::size_t i = 1; i < by_place.size(); ++i) {
    const Tensor& before = *by_place[i - 1];
    const Tensor& tensor = *by_place[i];
    if (tensor.offset - before.offset < before.bytes) {
      throw Error(fmt::format(
          "{}: tensor {} begins at byte {}, inside tensor {}, which takes {} bytes from byte {} on; "
          "the file is damaged",
          name_, in_quotes(tensor.name), tensor.offset, in_quotes(before.name), before.bytes, before.offset));
    }
  }
}

const Tensor* GgufFile::find_tensor(std::string_view name) const {
  return find_by(tensors_, by_name_, &Tensor::name, name);
}

const MetadataValue* GgufFile::find_value(std::string_view key) const {
  const MetadataEntry* entry = find_by(metadata_, by_key_, &MetadataEntry::key, key);
  return entry == nullptr ? nullptr : &entry->value;
}

std::optional<std::size_t> GgufFile::array_size(std::string_view key) const {
  const MetadataValue* value = find_value(key);
  if (value == nullptr || !std::holds_alternative<MetadataArray>(*value)) return std::nullopt;
  return std::visit([](const auto& items) { return items.size(); }, std::get<MetadataArray>(*value));
}

void GgufFile::throw_wrong_kind(std::string_view key, const MetadataValue& value) const {
  throw Error(fmt::format("{}: metadata {} is {} ({}), which is not what is expected there or does not fit",
                          name_, in_quotes(key), kind_text(value), value_text(value)));
}

void GgufFile::throw_missing(std::string_view key) const {
  throw Error(
      fmt::format("{}: metadata {} is missing; the file is not a complete model", name_, in_quotes(key)));
}

}  // namespace engine
