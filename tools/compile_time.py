#!/usr/bin/env python3
"""Compares how long programs take to compile that include the library at two commits.

    tools/compile_time.py OLD NEW [--rounds 7] [--compiler g++]

Each program is compiled once with each commit's headers, in turn, so that what else the machine does hits both. Printed
is the least processor time of each, and its ratio to that of <Eigen/Core> alone, which tells machines apart.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EIGEN = "/usr/include/eigen3"

PROGRAMS = {
    "all headers": "#include <compresskv/compresskv.hpp>\n",
    "one compressor": """
#include <compresskv/compresskv.hpp>
#include <vector>
namespace ckv = compresskv;
int main() {
  const ckv::ModelShape model{.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64};
  const ckv::Plan plan{model, ckv::score::SnapKv{}, ckv::select::GroupedTopK{},
                       ckv::budget::Uniform{ckv::Budget::kept_ratio(0.1)}};
  ckv::Compressor compressor{plan};
  compressor.begin(1000);
  std::vector<float> keys(2 * 1000 * 64), values(keys.size());
  const std::vector<float> queries(4 * 8 * 64);
  const ckv::StridedKv kv{keys.data(), values.data(), ckv::KvShape{.kv_heads = 2, .rows = 1000, .head_dim = 64},
                          ckv::layout::head_token_dim};
  const ckv::QueryShape shown{.query_heads = 4, .queries = 8, .head_dim = 64};
  return static_cast<int>(compressor.compress(0, kv, ckv::QueryWindow{queries.data(), shown}).rows());
}
""",
}


def processor_seconds(compiler, source, include):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [compiler, "-std=c++20", "-O2", "-isystem", EIGEN, "-c", str(source), "-o", "/dev/null"]
    subprocess.run(command + (["-I", str(include)] if include else []), check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiler", default="g++")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for side in ("old", "new"):
            (folder / side).mkdir()
            archive = subprocess.run(["git", "-C", ROOT, "archive", getattr(arguments, side), "include"],
                                     check=True, stdout=subprocess.PIPE).stdout
            subprocess.run(["tar", "x", "-C", folder / side], input=archive, check=True)
        eigen = folder / "eigen.cpp"
        eigen.write_text("#include <Eigen/Core>\n")
        least = {}
        for _ in range(arguments.rounds):
            jobs = [("Eigen", "", eigen, None)]
            for name, text in PROGRAMS.items():
                source = folder / (name.replace(" ", "_") + ".cpp")
                source.write_text(text)
                jobs += [(name, side, source, folder / side / "include") for side in ("old", "new")]
            for name, side, source, include in jobs:
                seconds = processor_seconds(arguments.compiler, source, include)
                least[name, side] = min(seconds, least.get((name, side), seconds))

    base = least["Eigen", ""]
    print(f"{'program':16} {'old s':>6} {'new s':>6} {'new/old':>8} {'old/Eigen':>10} {'new/Eigen':>10}")
    for name in PROGRAMS:
        old, new = least[name, "old"], least[name, "new"]
        print(f"{name:16} {old:6.2f} {new:6.2f} {new / old:8.2f} {old / base:10.2f} {new / base:10.2f}")
    print(f"{'<Eigen/Core>':16} {base:6.2f}")


if __name__ == "__main__":
    sys.exit(main())
