#!/usr/bin/env bash
# Installs what is missing, builds the tool in build/ckv and runs its demo: a real model looks for a needle in a long text,
# from the whole cache and from smaller and smaller ones. Arguments go to `ckv demo`, for example
#   scripts/demo.sh --prompt-file my.txt --question 'Who wrote this?'
# One is its own: --picture FILE.png (or .svg) also draws which tokens each layer kept; installs matplotlib when asked.
# Without --model the demo runs on the model that scripts/model.sh fetches.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
build="$root/build"
venv="$build/venv"

say() { printf 'demo: %s\n' "$*" >&2; }

needs_model=true
picture="" json=""
arguments=()
while (($#)); do
  case "$1" in
    --picture | --json)
      if (($# < 2)); then say "$1 needs the name of a file"; exit 2; fi
      if [[ $1 == --picture ]]; then picture="$2"; else json="$2"; arguments+=("$1" "$2"); fi
      shift
      ;;
    --picture=*) picture="${1#*=}" ;;
    --json=*) json="${1#*=}"; arguments+=("$1") ;;
    --model | --model=* | -h | --help) needs_model=false; arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

"$root/scripts/deps.sh"
if $needs_model; then model="$("$root/scripts/model.sh")"; arguments=(--model "$model" "${arguments[@]}"); fi

# The build talks on stderr, so that stdout holds the demo's result alone.
generator=()
if [[ ! -f "$build/CMakeCache.txt" ]]; then generator=(-G Ninja); fi
cmake -S "$root" -B "$build" "${generator[@]}" >&2
cmake --build "$build" --target ckv -j "$(nproc)" >&2

if [[ -z "$picture" ]]; then exec "$build/ckv" demo "${arguments[@]}"; fi

if ! "$venv/bin/python" -c 'import matplotlib' 2>/dev/null; then
  say "installing matplotlib into $venv for the picture"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then rm -rf "$venv"; python3 -m venv "$venv" >&2; fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check matplotlib >&2
fi
if [[ -z "$json" ]]; then
  json="$(mktemp "${TMPDIR:-/tmp}/ckv-demo.XXXXXX.json")"
  trap 'rm -f "$json"' EXIT
  arguments+=(--json "$json")
fi
"$build/ckv" demo "${arguments[@]}"
"$venv/bin/python" "$root/tools/plot_kept.py" "$json" "$picture"
say "picture: $picture"
