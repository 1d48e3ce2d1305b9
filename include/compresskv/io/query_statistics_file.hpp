#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/rotary.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/io/byte_file.hpp"
#include "compresskv/io/text_file.hpp"

/// Query statistics on disk: numbers side by side, as text would take three times the room (2 MiB of 30
/// layers of 9 heads of 64 elements). Little-endian, on any machine.
///
/// | bytes | what |
/// | --- | --- |
/// | 8 | `ckvqstat` |
/// | 4 each | version (1), layers, query heads, head_dim |
/// | 4 each | of the rotary embedding: dims that rotate, pairing (0 halves, 1 interleaved), frequency factors
/// | | 8 each | base and position scale, float64 | | 4 each | the frequency factors, float32, as are all
/// numbers below | | 8, then 4 each | of each head, layer after layer: queries seen; mean, moduli, covariance
/// (lower triangle) | | 8 | FNV-1a of all before |
namespace compresskv::io {

namespace detail {

inline constexpr std::string_view statistics_magic = "ckvqstat";
inline constexpr std::uint32_t statistics_version = 1;
inline constexpr std::size_t statistics_header = 8 + 7 * 4 + 2 * 8;

/// Bytes that a file of these sizes has, or 0 where they cannot be counted.
inline std::uint64_t statistics_bytes(std::uint64_t heads, std::uint64_t head_dim, std::uint64_t pairs,
                                      std::uint64_t factors) {
  std::uint64_t triangle = 0;
  std::uint64_t all = 0;
  const bool counted = !__builtin_mul_overflow(head_dim, head_dim + 1, &triangle) &&
                       !__builtin_mul_overflow(triangle / 2 + head_dim + pairs, 4U, &all) &&
                       !__builtin_mul_overflow(all + 8, heads, &all) &&
                       !__builtin_add_overflow(all, statistics_header + 4 * factors + checksum_bytes, &all);
  return counted ? all : 0;
}

}  // namespace detail

/// Reads query statistics. Throws FileError when the file is absent, of another kind, version or length, was
/// damaged, or holds numbers that no queries give.
inline QueryStatistics load_query_statistics(const std::filesystem::path& file) {
  using detail::require;
  const std::string bytes = detail::read_whole(file);
  require(
      std::string_view(bytes).substr(0, detail::statistics_magic.size()) == detail::statistics_magic, file,
      "holds no query statistics: give the file that `ckv calibrate --statistics` or save_query_statistics "
      "wrote");
  require(bytes.size() >= detail::statistics_header + detail::checksum_bytes, file, "has ", bytes.size(),
          " bytes and ends within its header: make the calibration again");
  detail::ByteReader in(bytes);
  in.take_text(detail::statistics_magic.size());
  const auto version = in.take<std::uint32_t>();
  require(version == detail::statistics_version, file, "has version ", version, ", this library reads ",
          detail::statistics_version, ": make the calibration again");
  const auto layers = in.take<std::uint32_t>();
  const auto query_heads = in.take<std::uint32_t>();
  const auto head_dim = in.take<std::uint32_t>();
  const auto dims = in.take<std::uint32_t>();
  const auto pairing = in.take<std::uint32_t>();
  const auto factors = in.take<std::uint32_t>();
  Rotary rotary{.base = in.take_real(), .dims = dims};
  rotary.position_scale = in.take_real();
  require(pairing <= 1, file, "names pairing ", pairing, ", must be 0 (halves) or 1 (interleaved)");
  rotary.pairing = pairing == 0 ? RotaryPairing::half_split : RotaryPairing::interleaved;
  // Before anything is made of these sizes.
  require(dims > 0 && dims <= head_dim && (factors == 0 || factors == dims / 2), file, "has ", dims,
          " elements that rotate of ", head_dim, " and ", factors,
          " frequency factors: make the calibration again");
  const std::uint64_t heads = std::uint64_t{layers} * query_heads;
  const std::uint64_t expected = detail::statistics_bytes(heads, head_dim, dims / 2, factors);
  require(expected == bytes.size(), file, "has ", bytes.size(), " bytes, ", layers, " layers of ",
          query_heads, " heads of ", head_dim, " elements take ", expected,
          ": it was cut off or is of another kind, make the calibration again");
  const auto body = std::string_view(bytes).substr(0, bytes.size() - detail::checksum_bytes);
  detail::ByteReader tail(std::string_view(bytes).substr(body.size()));
  require(tail.take<std::uint64_t>() == detail::checksum(body), file,
          "was damaged, its checksum is another: make the calibration again");

  const std::vector<float> divisors = in.take_all(factors);
  rotary.frequency_factors = divisors;
  std::vector<QueryStatistics::Head> all;
  all.reserve(heads);
  for (std::uint64_t i = 0; i < heads; ++i) {
    QueryStatistics::Head head{.count = in.take<std::uint64_t>()};
    head.mean = in.take_all(head_dim);
    head.modulus = in.take_all(dims / 2);
    head.covariance = in.take_all(QueryStatistics::triangle(head_dim));
    all.push_back(std::move(head));
  }
  return detail::made_of(
      file, [&] { return QueryStatistics(layers, query_heads, head_dim, rotary, std::move(all)); });
}

/// The same for the model that will use them. Throws FileError also when they are of other sizes.
inline QueryStatistics load_query_statistics(const std::filesystem::path& file, const ModelShape& shape) {
  QueryStatistics statistics = load_query_statistics(file);
  return detail::made_of(file, [&] {
    statistics.validate(shape.layers, shape.query_heads, shape.head_dim);
    return std::move(statistics);
  });
}

/// Writes query statistics. `load_query_statistics` reads back equal ones. Throws FileError when the folder
/// is absent, the file cannot be written, or would be larger than is read; an older file then stays as it
/// was.
inline void save_query_statistics(const std::filesystem::path& file, const QueryStatistics& statistics) {
  const Rotary& rotary = statistics.rotary();
  const std::size_t head_dim = statistics.head_dim();
  const std::uint64_t size =
      detail::statistics_bytes(std::uint64_t{statistics.layers()} * statistics.query_heads(), head_dim,
                               statistics.pairs(), rotary.frequency_factors.size());
  detail::require(size <= detail::largest_file, file, "cannot be written, the statistics take ", size,
                  " bytes: at most ", detail::largest_file >> 20U, " MiB are read");
  detail::ByteWriter out;
  out.add_text(detail::statistics_magic);
  for (const std::size_t number :
       {std::size_t{detail::statistics_version}, statistics.layers(), statistics.query_heads(), head_dim,
        rotary.rotated(head_dim), std::size_t{rotary.pairing == RotaryPairing::interleaved},
        rotary.frequency_factors.size()}) {
    out.add(static_cast<std::uint32_t>(number));
  }
  out.add_real(rotary.base);
  out.add_real(rotary.position_scale);
  out.add_all(rotary.frequency_factors);
  for (std::size_t layer = 0; layer < statistics.layers(); ++layer) {
    for (std::size_t h = 0; h < statistics.query_heads(); ++h) {
      const QueryStatistics::Head& head = statistics.head(layer, h);
      out.add(head.count);
      out.add_all(head.mean);
      out.add_all(head.modulus);
      out.add_all(head.covariance);
    }
  }
  out.add(detail::checksum(out.bytes()));
  detail::write_text(file, out.bytes());
}

}  // namespace compresskv::io
