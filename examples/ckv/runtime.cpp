// All methods, compiled once with the engine's flags: in place of linking compresskv::runtime, which has
// plain ones.

#include <compresskv/runtime/any_compressor_impl.hpp>
