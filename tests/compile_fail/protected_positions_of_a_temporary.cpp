// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

const compresskv::Protection protection{.positions = std::vector<std::uint32_t>{3, 5}};
