#!/usr/bin/env bash
# Installs PyTorch and kvpress into build/peers-venv, builds what they are measured against, and prints the
# table. Options go to peers.py: --threads 1,2 --pairs 31 --out results.json. With `methods` in front they go to
# methods.py, which times every method beside kvpress's.
# With PYTHON set, that interpreter is used as it is: it must have torch and kvpress.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
"$root/scripts/deps.sh"

if [ -z "${PYTHON:-}" ]; then
  venv="$root/build/peers-venv"
  PYTHON="$venv/bin/python"
  if ! "$PYTHON" -c 'import torch, kvpress' 2>/dev/null; then
    echo "peers: installing PyTorch and kvpress, some gigabytes" >&2
    python3 -m venv "$venv"
    "$PYTHON" -m pip install --quiet -r "$root/bench/peers/requirements.txt"
  fi
fi

cmake -S "$root" -B "$root/build" -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$root/build" --target peers >&2
program=peers
if [ "${1:-}" = methods ]; then
  program=methods
  shift
fi
exec "$PYTHON" "$root/bench/peers/$program.py" --library "$root/build/bench/libpeers.so" "$@"
