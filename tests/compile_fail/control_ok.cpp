// The same command line as the cases beside this file, on good code.
#include <compresskv/compresskv.hpp>

int main() {}
