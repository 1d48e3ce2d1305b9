// expect: the elements are kept, not copied: give a variable that outlives this, not a temporary
#include <compresskv/compresskv.hpp>
#include <vector>

void rows(std::vector<std::int8_t>& data, std::vector<float>& scales) {
  compresskv::Int8Rows keys{data, scales, std::vector<float>(8)};
}
