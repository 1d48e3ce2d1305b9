#!/usr/bin/env bash
# Installs what is missing, builds the tool in build/ckv and runs its demo: a real model looks for a needle in a long text,
# from the whole cache and from smaller and smaller ones. Arguments go to `ckv demo`, for example
#   scripts/demo.sh --prompt-file my.txt --question 'Who wrote this?'
# Without --model the demo runs on the model that scripts/model.sh fetches.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
build="$root/build"

"$root/scripts/deps.sh"

needs_model=true
for argument in "$@"; do
  case "$argument" in
    --model | --model=* | -h | --help) needs_model=false ;;
  esac
done
arguments=("$@")
if $needs_model; then model="$("$root/scripts/model.sh")"; arguments=(--model "$model" "$@"); fi

# The build talks on stderr, so that stdout holds the demo's result alone.
generator=()
if [[ ! -f "$build/CMakeCache.txt" ]]; then generator=(-G Ninja); fi
cmake -S "$root" -B "$build" "${generator[@]}" >&2
cmake --build "$build" --target ckv -j "$(nproc)" >&2

exec "$build/ckv" demo "${arguments[@]}"
