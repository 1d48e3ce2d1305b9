#!/usr/bin/env bash
# Builds the fuzzers of tests/fuzz/ in build-fuzz/ and runs each for some seconds, from its seeds and what earlier runs
# found (build-fuzz/corpus/). A finding is kept in build-fuzz/findings/, and the exit status is 1.
#   scripts/fuzz.sh                  each fuzzer for 60 seconds
#   scripts/fuzz.sh 1200 gguf json   these two for 20 minutes each
# Installs clang++ and its libFuzzer where they are missing (Debian, Ubuntu).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
build="$root/build-fuzz"
seconds="${1:-60}"
if [[ ! "$seconds" =~ ^[1-9][0-9]*$ ]]; then
  echo "fuzz: seconds is '$seconds', must be a whole number above 0" >&2
  exit 2
fi
shift || true

names=("$@")
if ((${#names[@]} == 0)); then
  for source in "$root"/tests/fuzz/*_fuzz.cpp; do names+=("$(basename "$source" _fuzz.cpp)"); done
fi
for name in "${names[@]}"; do
  if [[ ! -f "$root/tests/fuzz/${name}_fuzz.cpp" ]]; then
    echo "fuzz: there is no fuzzer '$name' in tests/fuzz/" >&2
    exit 2
  fi
done

"$root/scripts/deps.sh" --fuzz
cd "$root"
cmake --preset fuzz >/dev/null
cmake --build build-fuzz -j "$(nproc)" --target "${names[@]/%/_fuzz}"

mkdir -p "$build/findings"
# One fuzzer, its own line at the end; status 1 on a finding.
run() {
  local name="$1" log="$build/$1.log" status=0 corpus="$build/corpus/$1" seeds="$root/tests/fuzz/corpus/$1"
  local schedule=()
  # With as many edges as these calls have, weighing inputs takes libFuzzer more time than running them.
  if [[ "$name" == compressor ]]; then schedule=(-entropic=0); fi
  mkdir -p "$corpus"
  "$build/tests/fuzz/${name}_fuzz" -max_total_time="$seconds" -timeout=30 -rss_limit_mb=4096 -print_final_stats=1 \
    "${schedule[@]}" -artifact_prefix="$build/findings/$name-" "$corpus" $([[ -d "$seeds" ]] && printf '%s' "$seeds") >"$log" 2>&1 || status=$?
  local executions edges
  executions="$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")"
  edges="$(grep -oE 'cov: [0-9]+' "$log" | tail -n 1 | cut -d' ' -f2 || true)"
  printf 'fuzz: %-10s %9s executions, %6s edges, %5s inputs kept, %s\n' "$name" "${executions:-?}" "${edges:-?}" \
    "$(find "$corpus" -type f | wc -l)" "$( ((status)) && printf 'FINDING: %s' "$log" || printf 'no finding')"
  return "$status"
}

failed=0 running=0
for name in "${names[@]}"; do
  if ((running >= 2)); then
    wait -n || failed=1
    running=$((running - 1))
  fi
  run "$name" &
  running=$((running + 1))
done
while ((running > 0)); do
  wait -n || failed=1
  running=$((running - 1))
done
exit "$failed"
