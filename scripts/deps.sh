#!/usr/bin/env bash
# Installs what the build, the tests and the demo need and is not there yet; with --fuzz what the fuzzers need besides.
# As root on Debian or Ubuntu it uses apt-get; anywhere else it only says what is missing. Quick when nothing is.
set -euo pipefail

say() { printf 'deps: %s\n' "$*" >&2; }

# Debian package | what else shows that it is there: a command, or a pkg-config module | name and version upstream
needed=(
  'g++             | command:g++           | g++ 12 or newer, or clang++ 14 or newer'
  'cmake           | command:cmake         | CMake 3.25 or newer'
  'ninja-build     | command:ninja         | Ninja'
  'pkg-config      | command:pkg-config    | pkg-config'
  'libeigen3-dev   | module:eigen3         | Eigen 3.4'
  'nlohmann-json3-dev | module:nlohmann_json | nlohmann-json 3.10 or newer'
  'libcli11-dev    | module:CLI11          | CLI11 2'
  'libfmt-dev      | module:fmt            | fmt 9 or newer'
  'libpcre2-dev    | module:libpcre2-8     | PCRE2 10'
  'libssl-dev      | module:libcrypto      | OpenSSL 3 (libcrypto)'
  'libgtest-dev    | module:gtest          | GoogleTest 1.11 or newer'
  'libbenchmark-dev | module:benchmark     | Google Benchmark 1.7 or newer'
  'bible-kjv       | command:bible         | bible-kjv, the King James text (haystack of the demo and of ckv calibrate)'
  'python3         | command:python3       | Python 3.9 or newer'
  'python3-venv    | python:ensurepip      | the Python module venv with ensurepip'
  'unzip           | command:unzip         | unzip'
  'ca-certificates | any:                  | CA certificates'
)

if [[ "${1:-}" == --fuzz ]]; then
  needed+=(
    'clang           | command:clang++       | clang++ 14 or newer'
    "libclang-rt-dev | fuzzer:               | clang's runtimes, libFuzzer among them"
  )
fi

trim() { local text="$1"; text="${text#"${text%%[![:space:]]*}"}"; printf '%s' "${text%"${text##*[![:space:]]}"}"; }

# Whether the probe finds it: "command:g++", "module:eigen3", "python:ensurepip"; "any:" cannot be probed.
present() {
  local what="${1#*:}"
  case "$1" in
    command:*) command -v "$what" >/dev/null ;;
    module:*) pkg-config --exists "$what" 2>/dev/null ;;
    fuzzer:*) echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
      clang++ -x c++ -fsanitize=fuzzer,address,undefined -o /dev/null - 2>/dev/null ;;
    python:*) python3 -c "import venv, $what" 2>/dev/null ;;
    *) true ;;
  esac
}

is_debian=false
if command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; then is_debian=true; fi

packages=() probes=() names=()
for line in "${needed[@]}"; do
  IFS='|' read -r package probe name <<<"$line"
  packages+=("$(trim "$package")") probes+=("$(trim "$probe")") names+=("$(trim "$name")")
done

missing=()
if $is_debian; then
  installed="$(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' "${packages[@]}" 2>/dev/null | sed -n 's/^ii *//p' || true)"
  for i in "${!packages[@]}"; do
    # A compiler or CMake that was not installed as a package will do as well.
    grep -qxF -- "${packages[$i]}" <<<"$installed" && continue
    [[ ${probes[$i]} != any: ]] && present "${probes[$i]}" && continue
    missing+=("${packages[$i]}")
  done
  if ((${#missing[@]})); then
    if ((EUID != 0)); then
      say "missing: ${missing[*]}"
      say "not root, so nothing was installed; run: sudo apt-get install --no-install-recommends ${missing[*]}"
      exit 1
    fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # One source that cannot be reached need not matter; if it does, the installation below says so.
    apt-get update -q >&2 || say "apt-get update failed; going on with the package lists that are there"
    apt-get -o DPkg::Lock::Timeout=120 install -q -y --no-install-recommends "${missing[@]}" >&2
  fi
else
  for i in "${!packages[@]}"; do
    present "${probes[$i]}" || missing+=("${names[$i]}")
  done
  if ((${#missing[@]})); then
    say "this is not Debian or Ubuntu; install these by hand and run again (libraries are looked for with pkg-config):"
    printf '  %s\n' "${missing[@]}" >&2
    exit 1
  fi
fi

version="$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')"
if [[ "$(printf '%s\n' 3.25 "$version" | sort -V | head -n 1)" != 3.25 ]]; then
  say "CMake $version is too old, 3.25 or newer is needed; install a newer one, for example with: python3 -m pip install cmake"
  exit 1
fi
