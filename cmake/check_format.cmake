# cmake -DCLANG_FORMAT=... -DROOT=... -P check_format.cmake
# Fails, naming each place, when a source is not laid out as .clang-format says.

file(GLOB_RECURSE sources "${ROOT}/include/*.hpp" "${ROOT}/examples/*.[ch]pp" "${ROOT}/tests/*.[ch]pp"
     "${ROOT}/bench/*.[ch]pp")
execute_process(COMMAND "${CLANG_FORMAT}" --dry-run --Werror ${sources} RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "run: ${CLANG_FORMAT} -i on the files named above")
endif()
