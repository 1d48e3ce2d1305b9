#pragma once

// The one place that states the version: CMake reads these three lines.
#define COMPRESSKV_VERSION_MAJOR 0
#define COMPRESSKV_VERSION_MINOR 1
#define COMPRESSKV_VERSION_PATCH 0
