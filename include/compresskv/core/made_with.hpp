#pragma once

#include <string_view>

namespace compresskv {

/// What a sequence was compressed with, beside what its plan says itself (model shape, window, budget): texts
/// of the caller's, which a saved sequence carries and whoever loads it must give again. Any bytes will do;
/// short ones are shown in messages as they are.
struct MadeWith {
  std::string_view method = {};       ///< the method and its settings
  std::string_view calibration = {};  ///< digests of what was measured of the model, or empty
};

}  // namespace compresskv
