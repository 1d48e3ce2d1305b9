// first: compile what includes it with -fexceptions
// flags: -fno-exceptions
#include <compresskv/compresskv.hpp>
