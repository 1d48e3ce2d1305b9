#include "kv_cache.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

#include "error.hpp"

namespace engine {

std::string_view kv_type_name(KvType type) {
  switch (type) {
    case KvType::f16:
      return "f16";
    case KvType::bf16:
      return "bf16";
    case KvType::f32:
      break;
  }
  return "f32";
}

KvType parse_kv_type(std::string_view text) {
  for (const KvType type : {KvType::f32, KvType::f16, KvType::bf16}) {
    if (text == kv_type_name(type)) return type;
  }
  throw Error(fmt::format("cache type \"{}\" is unknown; give f32, f16 or bf16", text));
}

std::size_t kv_element_bytes(KvType type) { return type == KvType::f32 ? 4 : 2; }

LayerCache::LayerCache(KvType type, int kv_heads, int head_dim)
    : type_{type},
      kv_heads_{kv_heads},
      head_dim_{head_dim},
      first_row_(static_cast<std::size_t>(kv_heads), 0),
      rows_(static_cast<std::size_t>(kv_heads), 0),
      allocated_(static_cast<std::size_t>(kv_heads), 0) {}

LayerCache::LayerCache(const LayerCache& other)
    : type_{other.type_},
      kv_heads_{other.kv_heads_},
      head_dim_{other.head_dim_},
      first_row_{other.first_row_},
      rows_{other.rows_},
      allocated_{other.allocated_} {
  if (const std::size_t half = bytes() / 2; half > 0) {
    keys_.reset(std::malloc(half));
    values_.reset(std::malloc(half));
    if (!keys_ || !values_) throw std::bad_alloc{};
    std::memcpy(keys_.get(), other.keys_.get(), half);
    std::memcpy(values_.get(), other.values_.get(), half);
  }
}

LayerCache& LayerCache::operator=(const LayerCache& other) {
  if (this != &other) *this = LayerCache{other};
  return *this;
}

std::size_t LayerCache::total_rows() const {
  return std::accumulate(allocated_.begin(), allocated_.end(), std::size_t{0});
}

std::size_t LayerCache::bytes() const {
  return 2 * total_rows() * static_cast<std::size_t>(head_dim_) * kv_element_bytes(type_);
}

void LayerCache::extend(std::size_t count, CacheMeter& meter) {
  const std::size_t longest = *std::ranges::max_element(rows_) + count;
  relocate(std::vector<std::size_t>(rows_.size(), longest), meter);
  for (std::size_t& rows : rows_) rows += count;
}

void LayerCache::truncate(std::span<const std::size_t> rows) {
  if (rows.size() != rows_.size()) {
    throw Error(fmt::format("{} lengths for {} KV heads; give one each", rows.size(), rows_.size()));
  }
  for (std::size_t h = 0; h < rows.size(); ++h) {
    if (rows[h] > rows_[h]) {
      throw Error(fmt::format("KV head {} cannot keep {} rows, it holds {}", h, rows[h], rows_[h]));
    }
  }
  std::ranges::copy(rows, rows_.begin());
}

void LayerCache::resize(std::span<const std::size_t> rows, CacheMeter& meter) {
  if (rows.size() != rows_.size()) {
    throw Error(fmt::format("{} lengths for {} KV heads; give one each", rows.size(), rows_.size()));
  }
  extend(*std::ranges::max_element(rows), meter);
  truncate(rows);
  fit(meter);
}

void LayerCache::fit(CacheMeter& meter) {
  if (allocated_ != rows_) relocate(rows_, meter);
}

void LayerCache::reserve(std::size_t extra, CacheMeter& meter) {
  std::vector<std::size_t> wanted = allocated_;
  bool enough = true;
  for (std::size_t h = 0; h < wanted.size(); ++h) {
    enough = enough && rows_[h] + extra <= allocated_[h];
    wanted[h] = std::max(wanted[h], rows_[h] + extra);
  }
  if (!enough) relocate(wanted, meter);
}

// Moves every head's rows to where the new layout has them. Those that move to the front go from the first
// head to the last, those that move to the back from the last to the first: no row is overwritten before it
// has moved.
void LayerCache::relocate(std::span<const std::size_t> allocated, CacheMeter& meter) {
  const std::size_t row_bytes = static_cast<std::size_t>(head_dim_) * kv_element_bytes(type_);
  const std::size_t bytes_before = bytes();
  const std::size_t total_before = total_rows();
  const std::size_t total = std::accumulate(allocated.begin(), allocated.end(), std::size_t{0});
  if (total > std::numeric_limits<std::size_t>::max() / 4 / row_bytes) {
    throw Error(fmt::format("{} rows of cache do not fit into memory", total));
  }
  std::vector<std::size_t> first(allocated.size(), 0);
  for (std::size_t h = 1; h < first.size(); ++h) first[h] = first[h - 1] + allocated[h - 1];

  const auto resize = [&](Buffer& buffer) {
    if (total == 0) {
      buffer.reset();
      return;
    }
    void* moved = std::realloc(buffer.get(), total * row_bytes);
    if (moved == nullptr) throw std::bad_alloc{};
    static_cast<void>(buffer.release());
    buffer.reset(moved);
  };
  const auto move_head = [&](Buffer& buffer, std::size_t h) {
    auto* base = static_cast<std::byte*>(buffer.get());
    if (rows_[h] > 0) {
      std::memmove(base + first[h] * row_bytes, base + first_row_[h] * row_bytes, rows_[h] * row_bytes);
    }
  };
  // Growing, both buffers are resized before anything moves: a failed allocation leaves the rows where they
  // were.
  const bool grows = total >= total_before;
  if (grows) {
    resize(keys_);
    resize(values_);
  }
  for (Buffer* buffer : {&keys_, &values_}) {
    for (std::size_t h = 0; h < first.size(); ++h) {
      if (first[h] < first_row_[h]) move_head(*buffer, h);
    }
    for (std::size_t h = first.size(); h-- > 0;) {
      if (first[h] > first_row_[h]) move_head(*buffer, h);
    }
  }
  if (!grows) {
    resize(keys_);
    resize(values_);
  }
  first_row_ = std::move(first);
  allocated_.assign(allocated.begin(), allocated.end());
  meter.change(bytes_before, bytes());
}

void LayerCache::write(int kv_head, std::size_t row, std::span<const float> key,
                       std::span<const float> value) {
  const std::size_t offset = row * static_cast<std::size_t>(head_dim_);
  with_kv_type(type_, [&]<typename T>(T*) {
    const auto round = [](float x) { return static_cast<T>(x); };
    std::ranges::transform(key, keys<T>(kv_head) + offset, round);
    std::ranges::transform(value, values<T>(kv_head) + offset, round);
  });
}

void LayerCache::append(int kv_head, std::span<const float> key, std::span<const float> value) {
  write(kv_head, rows_[static_cast<std::size_t>(kv_head)]++, key, value);
}

}  // namespace engine
