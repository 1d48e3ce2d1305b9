# Flags of the executables that this project builds for itself. They hang on targets, never on the directory or the
# cache, so that a project that adds this one sees none of them; the library's INTERFACE target carries none either.

add_library(compresskv_own_flags INTERFACE)
target_compile_features(compresskv_own_flags INTERFACE cxx_std_20)
target_compile_options(compresskv_own_flags INTERFACE
  -Wall -Wextra -Wconversion -Wshadow -Wsign-conversion $<$<CXX_COMPILER_ID:GNU>:-Wuseless-cast>
  $<$<BOOL:${COMPRESSKV_WARNINGS_AS_ERRORS}>:-Werror>
  # g++ 12 takes `"text" + std::string` for an overlapping copy (GCC bug 105329); which one depends on the processor.
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict>)
if(COMPRESSKV_SANITIZE)
  target_compile_options(compresskv_own_flags INTERFACE
    -fsanitize=${COMPRESSKV_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g
    # g++ takes its own instrumentation of <regex> for a use before initialisation.
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  target_link_options(compresskv_own_flags INTERFACE -fsanitize=${COMPRESSKV_SANITIZE})
endif()

# The engine and all that links it are built whole for this machine. Eigen's types change alignment with the
# instruction set, so mixing flags inside one program would break the one-definition rule.
add_library(compresskv_engine_flags INTERFACE)
target_link_libraries(compresskv_engine_flags INTERFACE compresskv_own_flags)
target_compile_options(compresskv_engine_flags INTERFACE -march=native
  # g++ 12 warns of its own AVX-512 intrinsics, inlined from Eigen (GCC bug 105593): on such processors alone.
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-maybe-uninitialized>)

