// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

const compresskv::kernel::Rotary rotary{.frequency_factors = std::vector<float>{1.0F, 2.0F}};
