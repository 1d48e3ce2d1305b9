# cmake -DCOMPILER=... -DSOURCE=... -DINCLUDE=... -DSYSTEM_INCLUDES=... -DOBJECT=... -P check.cmake

cmake_path(GET SOURCE STEM name)
file(STRINGS "${SOURCE}" lines LIMIT_COUNT 1)
if(name STREQUAL "control_ok")
  set(expected "")
elseif(lines MATCHES "^// expect: (.+)$")
  set(expected "${CMAKE_MATCH_1}")
else()
  message(FATAL_ERROR "${SOURCE}: the first line must read '// expect: <regular expression>', not '${lines}'")
endif()

set(system_flags "")
foreach(folder IN LISTS SYSTEM_INCLUDES)
  list(APPEND system_flags -isystem "${folder}")
endforeach()

# A whole compilation, not -fsyntax-only: static_asserts in function bodies are found when templates are instantiated.
# English diagnostics whatever the user's language; the paths of the sources stay out of what is matched.
execute_process(
  COMMAND "${CMAKE_COMMAND}" -E env LC_ALL=C
    "${COMPILER}" -std=c++20 -Wall -Wextra -I "${INCLUDE}" ${system_flags} -c "${SOURCE}" -o "${OBJECT}"
  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)

if(expected STREQUAL "")
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "the control file must compile, but the compiler says:\n${output}")
  endif()
elseif(status EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiled, but must not: expected a diagnostic that matches '${expected}'")
else()
  # The compiler quotes source lines, the first one of the file among them if it comes to that: only lines that state
  # an error, a note or a failed requirement count.
  string(REPLACE ";" "," output_list "${output}")
  string(REPLACE "\n" ";" output_list "${output_list}")
  set(found FALSE)
  foreach(line IN LISTS output_list)
    if(line MATCHES "(error|note): " AND line MATCHES "${expected}")
      set(found TRUE)
    endif()
  endforeach()
  if(NOT found)
    message(FATAL_ERROR "${SOURCE} fails to compile, as it must, but no error matches '${expected}':\n${output}")
  endif()
endif()
