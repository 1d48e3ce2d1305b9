// What this test program allocates.

#include <cstddef>
#include <cstdlib>
#include <new>

#include "reference/allocations.hpp"

namespace compresskv::reference {

std::atomic<std::size_t> allocations{0};
std::atomic<std::size_t> failing_allocation{0};

}  // namespace compresskv::reference

// Not inlined, as g++ 12 would else see `free` of what came from `new` and warn.
[[gnu::noinline]] void* operator new(std::size_t size) {
  using namespace compresskv::reference;
  if (++allocations == failing_allocation) {
    throw std::bad_alloc();
  }
  if (void* memory = std::malloc(size == 0 ? 1 : size)) {
    return memory;
  }
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
