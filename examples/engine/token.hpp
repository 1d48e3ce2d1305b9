#pragma once

#include <cstdint>

namespace engine {

/// A token's id in the model's vocabulary.
using TokenId = std::int32_t;

}  // namespace engine
