// A compressed context in a file, to be asked later by another process: what `ckv generate --save-cache`
// writes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "engine/kv_cache.hpp"
#include "method.hpp"
#include "run.hpp"

namespace ckv {

/// What a context was made from: all that decides its rows, so that it is the key of the file, too.
struct ContextOrigin {
  std::string model_sha256;
  std::string text;             ///< the user's
  std::vector<TokenId> tokens;  ///< the template's head and the text, as they were read
  std::string method;
  nlohmann::json budget;         ///< {"rows": 128} or the like; null: none
  nlohmann::json settings;       ///< whatever else decides: window, pool, element type, chunks
  CalibrationFiles calibration;  ///< where its files lay; empty: none
};

/// Each calibration file that there is, with its digest: what the library's `MadeWith::calibration` is told.
std::string digests_of(const CalibrationFiles& files);

/// The file's bytes: the origin, what the library remembers, every row, and a checksum over all of it.
std::string save_context(const ContextOrigin& origin, const LoadedModel& loaded, const Compression& how,
                         const Context& context);

/// Such a file, read. Throws engine::Error naming `path` where it is none, damaged, or of another version.
class SavedContext {
 public:
  SavedContext(std::filesystem::path path, std::string bytes);

  const ContextOrigin& origin() const { return origin_; }

  /// The context, ready to be asked. `how` and the calibration are what the origin says, or should be.
  /// Throws engine::Error where the rows do not fit the model, compresskv::Error where the library finds that
  /// something differs from what it was compressed with.
  Context restore(const LoadedModel& loaded, const Compression& how, engine::KvType type,
                  const CalibrationFiles& files) const;

 private:
  std::filesystem::path path_;
  std::string bytes_;
  std::string_view body_;  // of bytes_: the library's part, and the rows
  ContextOrigin origin_;
};

}  // namespace ckv
