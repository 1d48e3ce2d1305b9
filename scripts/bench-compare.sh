#!/usr/bin/env bash
# Compares a benchmark at two commits on this machine: both are built in worktrees under build/compare and run in turn,
# so that what else the machine does hits both.
#   scripts/bench-compare.sh OLD NEW [BENCHMARK] [FILTER] [ROUNDS]
#   scripts/bench-compare.sh main~1 main compress_bench 'compress<.*model:0/tokens:8192' 9
set -euo pipefail

if (($# < 2)); then sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
benchmark="${3:-compress_bench}"
filter="${4:-compress<.*model:0/tokens:[0-9]*/kv_heads:3/k:4/window:8/}"
rounds="${5:-9}"
folder="$root/build/compare"
"$root/scripts/deps.sh"

build() {  # NAME COMMIT
  local tree="$folder/$1"
  git -C "$root" worktree remove --force "$tree" 2>/dev/null || true
  git -C "$root" worktree add --quiet --detach "$tree" "$2"
  cmake -S "$tree" -B "$tree/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCOMPRESSKV_BUILD_TESTS=OFF \
    -DCOMPRESSKV_BUILD_EXAMPLES=OFF -DCOMPRESSKV_BUILD_BENCH=ON >/dev/null
  cmake --build "$tree/build" --target "$benchmark" >&2
}
trap 'git -C "$root" worktree prune; for n in old new; do git -C "$root" worktree remove --force "$folder/$n" 2>/dev/null || true; done' EXIT
build old "$1"
build new "$2"

results="$(mktemp -d)"
for ((round = 0; round < rounds; ++round)); do
  for side in old new; do
    "$folder/$side/build/bench/$benchmark" --benchmark_filter="$filter" --benchmark_format=json --benchmark_min_time=0.01 \
      >"$results/$side.$round.json" 2>/dev/null
  done
done

python3 - "$results" "$rounds" <<'PYTHON'
import json, pathlib, statistics, sys
folder, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def times(side, n):
    runs = json.loads((folder / f"{side}.{n}.json").read_text())["benchmarks"]
    return {r["name"]: r["real_time"] for r in runs if "real_time" in r}
pairs = [(times("old", n), times("new", n)) for n in range(rounds)]
if not pairs[0][0].keys() & pairs[0][1].keys():
    sys.exit("bench-compare: no benchmark has the same name at both commits")
print(f"{'benchmark':64} old / new  (quartiles)     {rounds} pairs; above 1: the new commit is faster")
for name in pairs[0][0]:
    ratios = [old[name] / new[name] for old, new in pairs if name in new]
    if len(ratios) > 1:
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:64} {middle:8.2f}   ({low:.2f}-{high:.2f})")
PYTHON
rm -r "$results"
