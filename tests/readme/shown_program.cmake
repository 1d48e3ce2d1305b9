# cmake -DSOURCE=... -DPAGE=... [-DPROGRAM=...] -P shown_program.cmake
# Fails unless PAGE shows SOURCE as it is, PROGRAM ends well, and PAGE shows what it prints, indented.

file(READ "${PAGE}" page)
file(READ "${SOURCE}" source)
string(FIND "${page}" "```cpp\n${source}```\n" at)
if(at EQUAL -1)
  message(FATAL_ERROR "${PAGE} does not show ${SOURCE} as it is: copy the file into a block of C++ there")
endif()
if(NOT DEFINED PROGRAM)
  return()
endif()

execute_process(COMMAND "${PROGRAM}" OUTPUT_VARIABLE printed RESULT_VARIABLE status)
if(NOT status EQUAL 0 OR printed STREQUAL "")
  message(FATAL_ERROR "${PROGRAM} ended with ${status} and printed '${printed}'")
endif()
string(REGEX REPLACE "([^\n]+)\n" "    \\1\n" printed "${printed}")
string(FIND "${page}" "\n\n${printed}" at)
if(at EQUAL -1)
  message(FATAL_ERROR "${PAGE} does not show what ${PROGRAM} prints:\n${printed}")
endif()
