#!/usr/bin/env bash
# Installs what is missing, builds everything in build/ and runs all tests. Arguments go to ctest, for example
#   scripts/test.sh -R Budget
# COMPRESSKV_TEST_MODEL names the model of the end-to-end tests; unset, scripts/model.sh fetches it.
# COMPRESSKV_TEST_MODEL_2 may name another GGUF file, of any architecture: the tests in llama.cpp take it besides.
# The tests in llama.cpp need libllama: scripts/llama_cpp.sh finds or builds it. Where it cannot be had they are left out.
# The last line says how many tests passed and failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
build="$root/build"

"$root/scripts/deps.sh"
if [[ -z "${COMPRESSKV_TEST_MODEL:-}" ]]; then COMPRESSKV_TEST_MODEL="$("$root/scripts/model.sh")"; fi
export COMPRESSKV_TEST_MODEL

if ! "$root/scripts/llama_cpp.sh" >/dev/null; then
  echo "test: no libllama, for the reason above: the tests in llama.cpp are left out" >&2
fi

# A build folder that is there keeps its generator and its settings.
generator=()
if [[ ! -f "$build/CMakeCache.txt" ]]; then generator=(-G Ninja); fi
cmake -S "$root" -B "$build" "${generator[@]}"
cmake --build "$build" -j "$(nproc)"

# More than four at once would only fight for memory: some tests load the whole model.
jobs="$(nproc)"
if ((jobs > 4)); then jobs=4; fi

log="$build/test.log"
status=0
ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$jobs" "$@" 2>&1 | tee "$log" || status=$?

# ctest counts a skipped test as passed; a test that could not start counts as failed.
summary="$(grep -E '^[0-9]+% tests passed, [0-9]+ tests? failed out of [0-9]+' "$log" || true)"
if [[ -z "$summary" ]]; then
  echo "test: ctest ran no test" >&2
  exit 1
fi
read -r failed total < <(sed -E 's/^.*passed, ([0-9]+) tests? failed out of ([0-9]+).*/\1 \2/' <<<"$summary")
skipped="$(grep -cE '^ *[0-9]+/[0-9]+ Test +#[0-9]+: .*\*\*\*Skipped' "$log" || true)"
line="$((total - failed - skipped)) passed, $failed failed"
if ((skipped)); then line+=", $skipped skipped"; fi
printf '%s\n' "$line"
exit "$status"
