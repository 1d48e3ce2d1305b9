# Install rules: headers, exported targets for find_package(compresskv), and pkg-config files.

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/compresskv")
# Nothing here depends on the architecture, so a noarch package may hold it all.
set(pkgconfig_dir "${CMAKE_INSTALL_DATADIR}/pkgconfig")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/compresskv" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.h")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/compresskv")

install(TARGETS compresskv EXPORT compresskv_targets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT compresskv_targets NAMESPACE compresskv:: FILE compresskv-targets.cmake DESTINATION "${package_dir}")
if(TARGET compresskv_io)
  # A file of its own: the online part must stay usable where nlohmann_json is not installed.
  install(TARGETS compresskv_io EXPORT compresskv_io_targets)
  install(EXPORT compresskv_io_targets NAMESPACE compresskv:: FILE compresskv-io-targets.cmake
          DESTINATION "${package_dir}")
endif()

set(any_architecture ARCH_INDEPENDENT)
if(COMPRESSKV_BUILD_RUNTIME)
  # A file of its own as well: the headers alone stay usable where it is not installed.
  set(any_architecture "")
  install(TARGETS compresskv_runtime EXPORT compresskv_runtime_targets)
  install(EXPORT compresskv_runtime_targets NAMESPACE compresskv:: FILE compresskv-runtime-targets.cmake
          DESTINATION "${package_dir}")
endif()

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/compresskv-config.cmake.in"
  "${PROJECT_BINARY_DIR}/compresskv-config.cmake" INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/compresskv-config-version.cmake"
  COMPATIBILITY SameMinorVersion ${any_architecture})
install(FILES "${PROJECT_BINARY_DIR}/compresskv-config.cmake"
              "${PROJECT_BINARY_DIR}/compresskv-config-version.cmake" DESTINATION "${package_dir}")

# The prefix is given relative to the file, so that an installed tree may be moved. Absolute folders cannot move with it
# and are written as they are.
if(IS_ABSOLUTE "${pkgconfig_dir}")
  set(pkgconfig_prefix "${CMAKE_INSTALL_PREFIX}")
else()
  file(RELATIVE_PATH pkgconfig_prefix "/${pkgconfig_dir}" "/")
  string(REGEX REPLACE "/$" "" pkgconfig_prefix "\${pcfiledir}/${pkgconfig_prefix}")
endif()
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(pkgconfig_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
else()
  set(pkgconfig_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file("${PROJECT_SOURCE_DIR}/cmake/compresskv.pc.in" "${PROJECT_BINARY_DIR}/compresskv.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/compresskv.pc" DESTINATION "${pkgconfig_dir}")
if(TARGET compresskv_io)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/compresskv-io.pc.in" "${PROJECT_BINARY_DIR}/compresskv-io.pc" @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/compresskv-io.pc" DESTINATION "${pkgconfig_dir}")
endif()

if(COMPRESSKV_BUILD_RUNTIME)
  # The folder of the library, seen from that of the file where both move together.
  if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
    set(pkgconfig_libdir "${CMAKE_INSTALL_LIBDIR}")
  else()
    set(pkgconfig_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
  endif()
  configure_file("${PROJECT_SOURCE_DIR}/cmake/compresskv-runtime.pc.in"
                 "${PROJECT_BINARY_DIR}/compresskv-runtime.pc" @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/compresskv-runtime.pc" DESTINATION "${pkgconfig_dir}")
endif()
