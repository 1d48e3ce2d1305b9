#!/usr/bin/env python3
"""Draws what the benchmarks measured.

Writes into OUT, as PNG and SVG: length (time of a step of compress() against the tokens, from compress_bench's JSON) and
roofline (what a window's attention reaches between memory and arithmetic, from bench/peers/run.sh's JSON). Prints what
prompts of a million tokens would cost.
Needs matplotlib; never needed to build or use the library.

    build/bench/compress_bench --benchmark_out=bench.json --benchmark_out_format=json
    bench/peers/run.sh --out peers.json
    tools/plot_bench.py --bench bench.json --peers peers.json OUT
"""

import argparse
import json
import pathlib
import re
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = {"float": "#0072B2", "half": "#009E73", "bfloat16": "#D55E00"}
NAMES = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Of the layer that both measure: four scoring heads, eight queries each, three KV heads read, head dimension 128.
OPERATIONS_A_KEY = 2 * 4 * 8 * 128
KEYS_BYTES = 3 * 128


def save(figure, out, name):
    for ending in ("png", "svg"):
        figure.savefig(out / f"{name}.{ending}", dpi=130)
    plt.close(figure)
    print(f"{out / name}.png")


def medians(path, model):
    """{(step, element): {tokens: milliseconds}} of compress_bench's JSON: four heads on three KV heads, window 8."""
    times = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        found = re.match(rf"(compress|score|compact)<(\w+)>/model:{model}/tokens:(\d+)/kv_heads:3/k:4/window:8/", run["name"])
        if found and run.get("aggregate_name", "median") == "median":
            step, element, tokens = found.groups()
            times.setdefault((step, element), {})[int(tokens)] = run["real_time"] / 1e3
    return times


def draw_length(path, out):
    times = medians(path, model=0)
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = {"compress": "-o", "score": "--s", "compact": ":^"}
    for (step, element), points in sorted(times.items()):
        tokens = sorted(points)
        axis.plot(tokens, [points[t] for t in tokens], styles[step], color=COLOURS[element], label=f"{step}, {element}")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds a layer, one thread",
             title="A layer of Llama-3.1-8B, 1,024 rows kept")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, out, "length")


def project(path):
    """Prints what compress() of a whole prompt costs beyond what was measured: a line through the shorter lengths, held
    against the longest."""
    times = medians(path, model=1).get(("compress", "bfloat16"), {})
    if len(times) < 4:
        print("projection: skipped, compress<bfloat16>/model:1 has no four lengths")
        return
    *shorter, longest = sorted(times)
    slope, start = statistics.linear_regression(shorter, [times[t] for t in shorter])
    predicted = start + slope * longest
    print(f"Llama-3.1-70B, bfloat16, one thread: {start:.2f} ms + {1e3 * slope:.3f} ms a thousand tokens, a layer, from "
          f"{shorter[0]} to {shorter[-1]} tokens")
    print(f"{longest} tokens: {predicted:.1f} ms predicted, {times[longest]:.1f} ms measured, "
          f"{times[longest] / predicted:.2f} times as long")
    million = times[longest] / predicted * (start + slope * 2**20)
    print(f"{2**20} tokens, 80 layers: {80 * million / 1e3:.1f} s")


def draw_roofline(path, out):
    measured = json.loads(path.read_text(encoding="utf-8"))
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for result in measured["results"]:
        if "read_bytes_per_s" not in result or result["threads"] != 1:
            continue
        element = re.search(r"(float32|float16|bfloat16)", result["what"]).group(1)
        colour = COLOURS[NAMES[element]]
        intensity = OPERATIONS_A_KEY / (KEYS_BYTES * SIZES[element])
        bandwidth, peak = result["read_bytes_per_s"], result["flops_per_s"]
        flops = OPERATIONS_A_KEY * measured["tokens"] / (result["ours_ms"] / 1e3)
        points = [intensity * 2.0**power for power in range(-4, 5)]
        axis.plot(points, [min(x * bandwidth, peak) / 1e9 for x in points], color=colour, alpha=0.5)
        axis.plot([intensity], [flops / 1e9], "o", color=colour,
                  label=f"{element}: {result['ratio']:.2f} of its bound")
    axis.set(xscale="log", yscale="log", xlabel="operations a byte of keys", ylabel="GFLOP/s, one thread",
             title=f"Window attention, {measured['tokens']:,} tokens ({measured['cpu']}, {measured['code_path']})")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, out, "roofline")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=pathlib.Path, help="compress_bench's JSON")
    parser.add_argument("--peers", type=pathlib.Path, help="bench/peers/run.sh's JSON")
    parser.add_argument("out", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.bench:
        draw_length(arguments.bench, arguments.out)
        project(arguments.bench)
    if arguments.peers:
        draw_roofline(arguments.peers, arguments.out)


if __name__ == "__main__":
    main()
