# The adapter of llama.cpp: compresskv::llama_cpp is the library with all methods compiled, and libllama. An installed one
# is taken, or the one that scripts/llama_cpp.sh has built into the user's cache folder; nothing is built here. As a guest
# in another project AUTO takes the target llama that is there already and looks for nothing.

if(NOT COMPRESSKV_LLAMA_CPP)
  return()
endif()
if(NOT TARGET llama AND (PROJECT_IS_TOP_LEVEL OR NOT COMPRESSKV_LLAMA_CPP STREQUAL "AUTO"))
  find_package(llama QUIET CONFIG)
  if(NOT llama_FOUND)
    execute_process(COMMAND "${PROJECT_SOURCE_DIR}/scripts/llama_cpp.sh" --find
      OUTPUT_VARIABLE llama_prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE llama_missing)
    if(llama_missing EQUAL 0)
      # llama's package looks for ggml's in turn.
      list(APPEND CMAKE_PREFIX_PATH "${llama_prefix}")
      find_package(llama QUIET CONFIG)
    endif()
  endif()
endif()
if(TARGET llama)
  # Its packages ask for a C standard, which CMake refuses to a project without C.
  enable_language(C)
  add_library(compresskv_llama_cpp INTERFACE)
  add_library(compresskv::llama_cpp ALIAS compresskv_llama_cpp)
  target_link_libraries(compresskv_llama_cpp INTERFACE compresskv_runtime llama)
elseif(COMPRESSKV_LLAMA_CPP STREQUAL "AUTO")
  if(PROJECT_IS_TOP_LEVEL)
    message(STATUS "libllama not found: no compresskv::llama_cpp, its tests and examples are left out; "
                   "scripts/llama_cpp.sh builds it")
  endif()
else()
  message(FATAL_ERROR "COMPRESSKV_LLAMA_CPP is ON and libllama was not found: run scripts/llama_cpp.sh, or name its "
                      "prefix in CMAKE_PREFIX_PATH")
endif()
