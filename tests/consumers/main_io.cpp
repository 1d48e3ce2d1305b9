#include <compresskv/io/calibration_files.hpp>

int main() {}
