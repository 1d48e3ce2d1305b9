#include "saved_context.hpp"

#include <fmt/core.h>

#include <bit>
#include <compresskv/sequence/saved_bytes.hpp>
#include <cstddef>
#include <memory>
#include <span>
#include <sstream>
#include <streambuf>
#include <utility>

#include "compress.hpp"
#include "engine/error.hpp"
#include "engine/sha256.hpp"

// "CKVCACHE" | version, 4 bytes | the origin as JSON behind its length, 8 | what the library saved | the
// rows: for each layer and KV head its keys, then its values, in the element type | checksum, 8.

namespace ckv {
namespace {

using Json = nlohmann::json;
using compresskv::sequence::Checksum;
using compresskv::sequence::SavedReader;
using compresskv::sequence::SavedWriter;

constexpr std::string_view magic = "CKVCACHE";
constexpr std::uint32_t version = 1;

static_assert(std::endian::native == std::endian::little, "rows are written as they lie in memory");

/// A stream over bytes that lie elsewhere.
class Bytes : public std::streambuf {
 public:
  explicit Bytes(std::string_view bytes) {
    char* const begin = const_cast<char*>(bytes.data());  // only read
    setg(begin, begin, begin + bytes.size());
  }
  std::string_view rest() const { return {gptr(), static_cast<std::size_t>(egptr() - gptr())}; }
};

std::unique_ptr<PromptCompressor> compressor_of(const Compression& how, const compresskv::ModelShape& shape,
                                                engine::ThreadPool& pool, std::size_t tokens) {
  return how.method == Method::full
             ? std::make_unique<PromptCompressor>(compresskv::AnyPlan(shape, Method::full), pool)
             : make_compressor(how, shape, pool, tokens);
}

/// Calls `visit(layer, rows of its KV heads)` for each layer.
template <class Visit>
void for_layers(const PromptCompressor& compressor, const compresskv::ModelShape& shape, std::size_t tokens,
                const Visit& visit) {
  const compresskv::Held held = compressor.held(tokens);
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    std::vector<std::size_t> rows(shape.kv_heads);
    for (std::size_t head = 0; head < rows.size(); ++head) {
      rows[head] = held.rows(layer, head);
    }
    visit(layer, rows);
  }
}

}  // namespace

std::string digests_of(const CalibrationFiles& files) {
  std::string out;
  const auto add = [&](const char* what, const std::filesystem::path& file) {
    if (!file.empty()) {
      out += fmt::format("{}{} {}", out.empty() ? "" : ", ", what, engine::sha256_of_file(file));
    }
  };
  add("heads", files.heads);
  add("errors", files.errors);
  add("statistics", files.statistics);
  add("KV heads", files.kv_heads);
  return out;
}

std::string save_context(const ContextOrigin& origin, const LoadedModel& loaded, const Compression& how,
                         const Context& context) {
  const engine::KvType type = context.sequence.kv_type();
  const compresskv::ModelShape shape = loaded.shape(type);
  std::ostringstream library;
  const std::string settings = origin.settings.dump();
  const std::string digests = digests_of(origin.calibration);
  const compresskv::MadeWith made{.method = settings, .calibration = digests};
  std::unique_ptr<PromptCompressor> full;
  if (!context.compressor) {
    full = compressor_of(how, shape, loaded.model.pool(), context.tokens.size());
    full->begin(context.tokens.size());
  }
  const PromptCompressor& compressor = full ? *full : *context.compressor;
  compressor.save(library, made);

  const Json header = {{"model_sha256", origin.model_sha256},
                       {"text", origin.text},
                       {"tokens", origin.tokens},
                       {"method", origin.method},
                       {"budget", origin.budget},
                       {"settings", origin.settings},
                       {"heads", origin.calibration.heads.string()},
                       {"errors", origin.calibration.errors.string()},
                       {"statistics", origin.calibration.statistics.string()},
                       {"kv_heads", origin.calibration.kv_heads.string()}};
  SavedWriter head;
  head.number(version, 4);
  try {
    head.text(header.dump());
  } catch (const Json::exception&) {
    throw engine::Error("the text is no UTF-8, and could not be told again; give it through iconv -t UTF-8");
  }
  std::string bytes(magic);
  bytes += head.bytes();
  bytes += library.view();
  for (int layer = 0; layer < loaded.model.config().layers; ++layer) {
    const engine::LayerCache& cache = context.sequence.cache(layer);
    engine::with_kv_type(type, [&]<typename T>(T*) {
      for (int head_index = 0; head_index < cache.kv_heads(); ++head_index) {
        const std::size_t count = cache.rows(head_index) * shape.head_dim * sizeof(T);
        bytes.append(reinterpret_cast<const char*>(cache.keys<T>(head_index)), count);
        bytes.append(reinterpret_cast<const char*>(cache.values<T>(head_index)), count);
      }
    });
  }
  Checksum sum;
  sum.add(bytes);
  SavedWriter tail;
  tail.number(sum.value());
  bytes += tail.bytes();
  return bytes;
}

SavedContext::SavedContext(std::filesystem::path path, std::string bytes)
    : path_(std::move(path)), bytes_(std::move(bytes)) {
  const auto refuse = [&](const std::string& why) {
    throw engine::Error(fmt::format("{}: {}", path_.string(), why));
  };
  const std::string_view all = bytes_;
  if (!all.starts_with(magic) || all.size() < magic.size() + 12) {
    refuse("is no cache that `ckv generate --save-cache` wrote");
  }
  const std::uint64_t found = SavedReader(all.substr(magic.size())).number("version", 4);
  if (found != version) {
    refuse(fmt::format("has version {}, this tool reads version {}; save it again", found, version));
  }
  const std::string_view content = all.substr(0, all.size() - 8);
  Checksum sum;
  sum.add(content);
  if (SavedReader(all.substr(content.size())).number("checksum") != sum.value()) {
    refuse("its checksum is not that of its bytes: it was cut off or is damaged; save it again");
  }
  try {
    SavedReader reader(content.substr(magic.size() + 4));
    const std::string_view text = reader.text("origin");
    body_ = content.substr(magic.size() + 12 + text.size());
    const Json header = Json::parse(text);
    header.at("model_sha256").get_to(origin_.model_sha256);
    header.at("text").get_to(origin_.text);
    header.at("tokens").get_to(origin_.tokens);
    header.at("method").get_to(origin_.method);
    origin_.budget = header.at("budget");
    origin_.settings = header.at("settings");
    origin_.calibration.heads = header.at("heads").get<std::string>();
    origin_.calibration.errors = header.at("errors").get<std::string>();
    origin_.calibration.statistics = header.at("statistics").get<std::string>();
    origin_.calibration.kv_heads = header.value("kv_heads", "");  // absent where none were known yet
  } catch (const Json::exception& error) {
    refuse(fmt::format("what it says of its origin cannot be read: {}", error.what()));
  } catch (const compresskv::FileError& error) {
    refuse(error.what());
  }
}

Context SavedContext::restore(const LoadedModel& loaded, const Compression& how, engine::KvType type,
                              const CalibrationFiles& files) const {
  const auto refuse = [&](const std::string& why) {
    throw engine::Error(fmt::format("{}: {}", path_.string(), why));
  };
  const compresskv::ModelShape shape = loaded.shape(type);
  const std::size_t tokens = origin_.tokens.size();
  const std::string settings = origin_.settings.dump();
  const std::string digests = digests_of(files);
  Bytes buffer(body_);
  std::istream in(&buffer);
  std::unique_ptr<PromptCompressor> compressor = compressor_of(how, shape, loaded.model.pool(), tokens);
  compressor->load(in, {.method = settings, .calibration = digests});

  const std::uint64_t row_bytes = shape.kv_row_bytes;
  std::uint64_t rows_in_all = 0;
  Context context{engine::Sequence{loaded.model, {.kv_type = type}}, origin_.tokens};
  for_layers(*compressor, shape, tokens, [&](std::size_t layer, const std::vector<std::size_t>& rows) {
    const compresskv::Retained& kept = compressor->retained(layer);
    if (kept.next_position() != tokens) {
      refuse(fmt::format("layer {} has seen {} tokens, the text has {}; save it again", layer,
                         kept.next_position(), tokens));
    }
    for (const std::size_t of_head : rows) {
      rows_in_all += of_head;
    }
    context.result.kept.push_back(positions_of(kept));
  });
  std::string_view rest = buffer.rest();
  if (rest.size() != rows_in_all * row_bytes) {
    refuse(fmt::format("holds {} bytes of keys and values, its {} rows take {}; save it again", rest.size(),
                       rows_in_all, rows_in_all * row_bytes));
  }

  std::vector<engine::LayerCache> caches;
  for_layers(*compressor, shape, tokens, [&](std::size_t, const std::vector<std::size_t>& rows) {
    engine::LayerCache& cache =
        caches.emplace_back(type, static_cast<int>(shape.kv_heads), static_cast<int>(shape.head_dim));
    engine::CacheMeter meter;  // the sequence counts for itself
    cache.resize(rows, meter);
    engine::with_kv_type(type, [&]<typename T>(T*) {
      for (std::size_t head = 0; head < rows.size(); ++head) {
        const std::size_t count = rows[head] * shape.head_dim * sizeof(T);
        for (T* const to : {cache.keys<T>(static_cast<int>(head)), cache.values<T>(static_cast<int>(head))}) {
          rest.copy(reinterpret_cast<char*>(to), count);
          rest.remove_prefix(count);
        }
      }
    });
  });
  context.sequence.restore(std::move(caches), tokens);
  if (how.method != Method::full) {
    context.compressor = std::move(compressor);
  }
  return context;
}

}  // namespace ckv
