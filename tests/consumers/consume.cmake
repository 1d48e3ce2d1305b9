# Configures, builds and runs the consumer project in SOURCE from scratch, as a user would.

file(REMOVE_RECURSE "${BUILD}")

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    string(JOIN " " line ${ARGV})
    message(FATAL_ERROR "'${line}' failed with ${status}:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

# The compiled library is headers only, so the prefix must be all that the consumer needs: no path of this checkout is
# passed to the ones that use an install. A user's own CPATH could hide a missing include path.
unset(ENV{CPATH})
unset(ENV{CPLUS_INCLUDE_PATH})
set(ENV{PKG_CONFIG_PATH} "${PREFIX}/share/pkgconfig")
set(arguments -G "${GENERATOR}" -S "${SOURCE}" -B "${BUILD}" "-DCMAKE_CXX_COMPILER=${COMPILER}")
cmake_path(GET SOURCE FILENAME way)
if(way STREQUAL "find_package")
  list(APPEND arguments "-DCMAKE_PREFIX_PATH=${PREFIX}" "-DEigen3_DIR=${Eigen3_DIR}")
elseif(way MATCHES "^(add_subdirectory|fetch_content)$")
  list(APPEND arguments "-DCOMPRESSKV_SOURCE=${COMPRESSKV_SOURCE}" "-DEigen3_DIR=${Eigen3_DIR}")
endif()
run("${CMAKE_COMMAND}" ${arguments})
run("${CMAKE_COMMAND}" --build "${BUILD}" --config Release)

find_program(consumer consumer PATHS "${BUILD}" "${BUILD}/Release" NO_DEFAULT_PATH REQUIRED)
run("${consumer}")
if(NOT output MATCHES "compresskv ${EXPECTED_VERSION}")
  message(FATAL_ERROR "the consumer printed '${output}', not the version ${EXPECTED_VERSION}")
endif()
