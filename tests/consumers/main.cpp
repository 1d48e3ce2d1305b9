#include <compresskv/compresskv.hpp>
#include <compresskv/core/version.hpp>
#include <cstdio>

int main() {
  std::printf("compresskv %d.%d.%d\n", COMPRESSKV_VERSION_MAJOR, COMPRESSKV_VERSION_MINOR,
              COMPRESSKV_VERSION_PATCH);
}
