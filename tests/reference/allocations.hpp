#pragma once

#include <atomic>
#include <cstddef>

namespace compresskv::reference {

// What the test program allocates: its operators new and delete, in compressor_memory_test.cpp, count here.
extern std::atomic<std::size_t> allocations;
extern std::atomic<std::size_t> alive;       ///< bytes, as the allocator rounds them up
extern std::atomic<std::size_t> most_alive;  ///< since it was last set; exact where one thread allocates
/// The allocation that throws std::bad_alloc, counted from 1 in `allocations`; 0: none.
extern std::atomic<std::size_t> failing_allocation;

}  // namespace compresskv::reference
