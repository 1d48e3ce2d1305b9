// Exceptions are needed, run-time types are not.
// flags: -fno-rtti
#include "control_ok.cpp"
