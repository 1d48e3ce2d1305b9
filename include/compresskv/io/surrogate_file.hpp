#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compresskv/core/shape.hpp"
#include "compresskv/core/surrogate.hpp"
#include "compresskv/io/byte_file.hpp"
#include "compresskv/io/text_file.hpp"

/// A surrogate on disk: numbers side by side, little-endian, on any machine (200 KiB of 30 layers of 3 KV
/// heads of 576 elements).
///
/// | bytes | what |
/// | --- | --- |
/// | 8 | `ckvsurro` |
/// | 4 each | version (1), layers, KV heads, hidden size |
/// | 4 each | of each KV head, layer after layer: weights, then the bias, float32 |
/// | 8 | FNV-1a of all before |
namespace compresskv::io {

namespace detail {

inline constexpr std::string_view surrogate_magic = "ckvsurro";
inline constexpr std::uint32_t surrogate_version = 1;
inline constexpr std::size_t surrogate_header = 8 + 4 * 4;

/// Bytes that a file of these sizes has, or 0 where they cannot be counted.
inline std::uint64_t surrogate_bytes(std::uint64_t heads, std::uint64_t hidden_size) {
  std::uint64_t all = 0;
  const bool counted = !__builtin_mul_overflow(4 * (hidden_size + 1), heads, &all) &&
                       !__builtin_add_overflow(all, surrogate_header + checksum_bytes, &all);
  return counted ? all : 0;
}

}  // namespace detail

/// Reads a surrogate. Throws FileError when the file is absent, of another kind, version or length, was
/// damaged, or holds numbers that are none.
inline Surrogate load_surrogate(const std::filesystem::path& file) {
  using detail::require;
  const std::string bytes = detail::read_whole(file);
  require(std::string_view(bytes).substr(0, detail::surrogate_magic.size()) == detail::surrogate_magic, file,
          "holds no surrogate: give the file that `ckv calibrate --surrogate` or save_surrogate wrote");
  require(bytes.size() >= detail::surrogate_header + detail::checksum_bytes, file, "has ", bytes.size(),
          " bytes and ends within its header: make the calibration again");
  detail::ByteReader in(bytes);
  in.take_text(detail::surrogate_magic.size());
  const auto version = in.take<std::uint32_t>();
  require(version == detail::surrogate_version, file, "has version ", version, ", this library reads ",
          detail::surrogate_version, ": make the calibration again");
  const auto layers = in.take<std::uint32_t>();
  const auto kv_heads = in.take<std::uint32_t>();
  const auto hidden_size = in.take<std::uint32_t>();
  // Before anything is made of these sizes.
  const std::uint64_t heads = std::uint64_t{layers} * kv_heads;
  const std::uint64_t expected = detail::surrogate_bytes(heads, hidden_size);
  require(expected == bytes.size(), file, "has ", bytes.size(), " bytes, ", layers, " layers of ", kv_heads,
          " KV heads of ", hidden_size, " elements take ", expected,
          ": it was cut off or is of another kind, make the calibration again");
  const auto body = std::string_view(bytes).substr(0, bytes.size() - detail::checksum_bytes);
  detail::ByteReader tail(std::string_view(bytes).substr(body.size()));
  require(tail.take<std::uint64_t>() == detail::checksum(body), file,
          "was damaged, its checksum is another: make the calibration again");

  std::vector<float> weights;
  std::vector<float> biases;
  weights.reserve(heads * hidden_size);
  biases.reserve(heads);
  for (std::uint64_t i = 0; i < heads; ++i) {
    const std::vector<float> of_head = in.take_all(hidden_size);
    weights.insert(weights.end(), of_head.begin(), of_head.end());
    biases.push_back(in.take_all(1).front());
  }
  return detail::made_of(
      file, [&] { return Surrogate(layers, kv_heads, hidden_size, std::move(weights), std::move(biases)); });
}

/// The same for the model that will use it. Throws FileError also when it is of other sizes.
inline Surrogate load_surrogate(const std::filesystem::path& file, const ModelShape& shape) {
  Surrogate surrogate = load_surrogate(file);
  return detail::made_of(file, [&] {
    surrogate.validate(shape.layers, shape.kv_heads);
    return std::move(surrogate);
  });
}

/// Writes a surrogate. `load_surrogate` reads back an equal one. Throws FileError when the folder is absent,
/// the file cannot be written, or would be larger than is read; an older file then stays as it was.
inline void save_surrogate(const std::filesystem::path& file, const Surrogate& surrogate) {
  const std::uint64_t size = detail::surrogate_bytes(std::uint64_t{surrogate.layers()} * surrogate.kv_heads(),
                                                     surrogate.hidden_size());
  detail::require(size <= detail::largest_file, file, "cannot be written, the surrogate takes ", size,
                  " bytes: at most ", detail::largest_file >> 20U, " MiB are read");
  detail::ByteWriter out;
  out.add_text(detail::surrogate_magic);
  for (const std::size_t number : {std::size_t{detail::surrogate_version}, surrogate.layers(),
                                   surrogate.kv_heads(), surrogate.hidden_size()}) {
    out.add(static_cast<std::uint32_t>(number));
  }
  for (std::size_t layer = 0; layer < surrogate.layers(); ++layer) {
    for (std::size_t head = 0; head < surrogate.kv_heads(); ++head) {
      const float bias = surrogate.bias(layer, head);
      out.add_all(surrogate.weights(layer, head));
      out.add_all({&bias, 1});
    }
  }
  out.add(detail::checksum(out.bytes()));
  detail::write_text(file, out.bytes());
}

}  // namespace compresskv::io
