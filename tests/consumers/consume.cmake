# Configures, builds and runs the consumer project in SOURCE from scratch, as a user would.

file(REMOVE_RECURSE "${BUILD}")
cmake_path(GET SOURCE FILENAME way)

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    string(JOIN " " line ${ARGV})
    message(FATAL_ERROR "'${line}' failed with ${status}:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

if(OWN_INSTALL)
  file(REMOVE_RECURSE "${PREFIX}")
  run("${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${COMPRESSKV_SOURCE}" -B "${BUILD}/library"
    "-DCMAKE_CXX_COMPILER=${COMPILER}" "-DCMAKE_INSTALL_PREFIX=${PREFIX}"
    -DCOMPRESSKV_BUILD_TESTS=OFF -DCOMPRESSKV_BUILD_BENCH=OFF -DCOMPRESSKV_BUILD_EXAMPLES=OFF ${INSTALL_OPTIONS})
  if(INSTALL_OPTIONS MATCHES "COMPRESSKV_BUILD_RUNTIME=ON")
    run("${CMAKE_COMMAND}" --build "${BUILD}/library" --config Release)
  endif()
  run("${CMAKE_COMMAND}" --install "${BUILD}/library")
endif()
if(way MATCHES "^(find_package|pkg_config)$" AND NOT EXISTS "${PREFIX}/share/licenses/compresskv/LICENSE")
  message(FATAL_ERROR "the license is not installed: no ${PREFIX}/share/licenses/compresskv/LICENSE")
endif()

# The prefix must be all that a consumer of an installed library needs: no path of this checkout is passed to it. A user's own CPATH could hide a missing include path.
unset(ENV{CPATH})
unset(ENV{CPLUS_INCLUDE_PATH})
set(ENV{PKG_CONFIG_PATH} "${PREFIX}/share/pkgconfig")
set(arguments -G "${GENERATOR}" -S "${SOURCE}" -B "${BUILD}" "-DCMAKE_CXX_COMPILER=${COMPILER}")
if(way STREQUAL "find_package")
  list(APPEND arguments "-DCMAKE_PREFIX_PATH=${PREFIX}")
elseif(way MATCHES "^(add_subdirectory|fetch_content)$")
  list(APPEND arguments "-DCOMPRESSKV_SOURCE=${COMPRESSKV_SOURCE}")
endif()
run("${CMAKE_COMMAND}" ${arguments})
run("${CMAKE_COMMAND}" --build "${BUILD}" --config Release)

function(run_consumer name)
  find_program(executable ${name} PATHS "${BUILD}" "${BUILD}/Release" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  run("${executable}" ${ARGN})
  set(output "${output}" PARENT_SCOPE)
endfunction()

run_consumer(consumer)
if(NOT output STREQUAL "compresskv ${EXPECTED_VERSION}\n")
  message(FATAL_ERROR "the consumer printed '${output}', not the version ${EXPECTED_VERSION}")
endif()

file(WRITE "${BUILD}/ranking.json" [[{"0": [2, 0, 1], "1": [7, 3]}]])
run_consumer(consumer_io "${BUILD}/ranking.json")
if(NOT output STREQUAL "2 layers, best head of the last 7\n")
  message(FATAL_ERROR "the consumer of compresskv::io printed '${output}'")
endif()

if(INSTALL_OPTIONS MATCHES "COMPRESSKV_BUILD_RUNTIME=ON")
  run_consumer(consumer_runtime)
  if(NOT output STREQUAL "50 rows of 100\n")
    message(FATAL_ERROR "the consumer of compresskv::runtime printed '${output}'")
  endif()
endif()
