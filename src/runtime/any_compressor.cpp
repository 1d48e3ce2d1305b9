#include "compresskv/runtime/any_compressor_impl.hpp"
