#!/usr/bin/env bash
# Prints the prefix of a libllama (llama.cpp) that CMake can find, as its only line on stdout: an installed one where
# there is one, else one that is built once, in 5 to 8 minutes on two cores, into a cache folder of the user
# ($XDG_CACHE_HOME or ~/.cache, compresskv/llama.cpp-VERSION-CPU). Quick when it is there already.
#
#     scripts/llama_cpp.sh          # finds it, or builds it
#     scripts/llama_cpp.sh --find   # finds it, or prints nothing and fails: nothing is fetched or built
#
# The source comes from PyPI: the sdist of llama-cpp-python holds llama.cpp whole. Nothing of its Python is run.
# Needs python3, cmake, ninja and a C++ compiler (scripts/deps.sh).
set -euo pipefail

version='0.3.36'  # of llama-cpp-python: libllama 0.5.0, ggml 0.25.3
file="llama_cpp_python-$version.tar.gz"
sha256='832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e'
cache="${XDG_CACHE_HOME:-$HOME/.cache}/compresskv"

say() { printf 'llama.cpp: %s\n' "$*" >&2; }

# Tiles are left out: some virtual machines name AMX, let a program ask for it, and stop it at the first instruction.
flags=()
if grep -q amx_tile /proc/cpuinfo 2>/dev/null; then
  flags+=(-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8' -DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8')
fi
# ggml is compiled for this processor, so that machines of different processors that share a home do not share it.
processor="$( (grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || uname -mp; echo "${flags[*]}") |
  sha256sum | cut -c 1-8)"
prefix="$cache/llama.cpp-$version-$processor"

# Prefixes as CMake would look for them, the user's own first.
installed() {
  local IFS=':;' candidate config
  for candidate in ${CMAKE_PREFIX_PATH:-} /usr/local /usr; do
    for config in "$candidate"/{lib,lib64,lib/*-linux-gnu}/cmake/llama/llama-config.cmake; do
      if [[ -f "$config" && -f "${config%/llama/*}/ggml/ggml-config.cmake" ]]; then
        printf '%s\n' "$candidate"
        return 0
      fi
    done
  done
  return 1
}

if installed; then exit 0; fi
if [[ -f "$prefix/lib/cmake/llama/llama-config.cmake" ]]; then
  printf '%s\n' "$prefix"
  exit 0
fi
if [[ "${1:-}" == --find ]]; then exit 1; fi

mkdir -p "$cache"
# One run builds, another at the same time waits for it. All is made in a folder of its own and moved into place when it
# is whole: an interruption leaves nothing under the final name.
if command -v flock >/dev/null; then
  exec 9>"$cache/llama.cpp.lock"
  flock --nonblock 9 || { say "another run is building it: waiting"; flock 9; }
  if [[ -d "$prefix" ]]; then
    printf '%s\n' "$prefix"
    exit 0
  fi
fi
partial="$(mktemp -d "$cache/partial.XXXXXX")"
trap 'rm -rf "$partial"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "fetching $file from PyPI (about 75 MB)"
# pip would run the sdist's build to learn its metadata, so the file is fetched by the index's own interface (PEP 503,
# 691), from the index that pip is set up with.
if ! python3 - "$file" "$partial/$file" >&2 <<'PYTHON'
import json, os, re, shutil, subprocess, sys, urllib.parse, urllib.request

name, target = sys.argv[1:]
index = os.environ.get("PIP_INDEX_URL", "")
if not index:
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"],
                           capture_output=True, text=True)
    index = asked.stdout.strip() or "https://pypi.org/simple"
page_url = index.rstrip("/") + "/llama-cpp-python/"
wanted = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.5"}
with urllib.request.urlopen(urllib.request.Request(page_url, headers=wanted), timeout=60) as page:
    page_url, kind, text = page.geturl(), page.headers.get("Content-Type", ""), page.read().decode()
links = [f["url"] for f in json.loads(text)["files"]] if "json" in kind else re.findall(r'href="([^"]+)"', text)
links = [link for link in links if urllib.parse.urlparse(link).path.endswith("/" + name)]
if not links:
    sys.exit(f"{page_url} has no {name}")
with urllib.request.urlopen(urllib.parse.urljoin(page_url, links[0]), timeout=60) as source, open(target, "wb") as out:
    shutil.copyfileobj(source, out)
PYTHON
then
  say "the download failed: check the network, or a proxy or mirror in pip's configuration, and run again"
  exit 1
fi
if ! sha256sum --check --status <<<"$sha256  $partial/$file"; then
  say "$file has the SHA-256 $(sha256sum "$partial/$file" | cut -d' ' -f1), not $sha256"
  exit 1
fi
tar --extract --gzip --file "$partial/$file" --directory "$partial" --strip-components 3 \
  "llama_cpp_python-$version/vendor/llama.cpp/"

jobs="$(nproc)"
say "building libllama with $jobs jobs (5 to 8 minutes on two cores)"
# The log is shown where something fails: a build that works has nothing to say.
{
  cmake -S "$partial" -B "$partial/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$prefix" \
    -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_INSTALL_RPATH='$ORIGIN' -DBUILD_SHARED_LIBS=ON \
    "${flags[@]}" -DGGML_NATIVE=ON -DGGML_RPC=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_COMMON=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF &&
    cmake --build "$partial/build" --parallel "$jobs" &&
    cmake --install "$partial/build" --prefix "$partial/installed"
} >"$partial/log" 2>&1 9>&- || {
  tail -n 40 "$partial/log" >&2
  say "the build failed; the end of its log is above"
  exit 1
}
# Without flock two runs may have come this far: the first one to be done stays.
mv -T "$partial/installed" "$prefix" 2>/dev/null || [[ -d "$prefix" ]]
printf '%s\n' "$prefix"
