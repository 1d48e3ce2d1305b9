#!/usr/bin/env python3
"""Draws which tokens each layer kept, from the file that `ckv demo --json` writes.

One panel a method and share of the cache: layers from top to bottom, the prompt from left to right, dark where the
layer kept the token. The needle's place is marked. Needs matplotlib; never needed to build or use the library.

    tools/plot_kept.py demo.json kept.png      # or .svg, .pdf
"""

import argparse
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402


def kept_grid(run, layers, tokens):
    """[layer][token], 1 where kept."""
    grid = np.zeros((layers, tokens), dtype=np.float32)
    for layer, positions in enumerate(run["kept_positions"]):
        grid[layer, positions] = 1.0
    return grid


def share_per_column(grid, columns):
    """Tokens are more than pixels: the share kept of each bin, so that no single token falls between two pixels."""
    edges = np.linspace(0, grid.shape[1], columns + 1).astype(int)
    return np.stack([grid[:, a:b].mean(axis=1) for a, b in zip(edges[:-1], edges[1:])], axis=1)


def draw(demo):
    layers, tokens = demo["layers"], demo["prompt_tokens"]
    runs = [run for run in demo["runs"] if run["method"] != "full"]
    if not runs:
        sys.exit("plot_kept: the file holds no compressed run")
    methods = list(dict.fromkeys(run["method"] for run in runs))
    shares = list(dict.fromkeys(run["kept"] for run in runs))
    figure, axes = plt.subplots(
        len(shares), len(methods), figsize=(6.2 * len(methods), 2.1 * len(shares) + 0.6),
        sharex=True, sharey=True, squeeze=False, layout="constrained")
    for run in runs:
        axis = axes[shares.index(run["kept"])][methods.index(run["method"])]
        columns = min(tokens, 620)
        axis.imshow(share_per_column(kept_grid(run, layers, tokens), columns), aspect="auto", cmap="Blues",
                    vmin=0.0, vmax=0.6, interpolation="nearest", extent=(0, tokens, layers - 0.5, -0.5))
        if demo["needle"]:
            axis.axvspan(demo["needle"]["first"], demo["needle"]["last"], color="tab:red", alpha=0.35, linewidth=0)
        verdict = {True: ", right", False: ", wrong", None: ""}[run["right"]]
        axis.set_title(f"{run['method']}, {100 * run['kept']:.0f} % kept{verdict}", fontsize=9)
    for row in axes:
        row[0].set_ylabel("layer", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("position in the prompt" + (" (red: the needle)" if demo["needle"] else ""), fontsize=8)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=pathlib.Path, help="what `ckv demo --json` wrote")
    parser.add_argument("picture", type=pathlib.Path, help="file to write: .png, .svg or .pdf")
    arguments = parser.parse_args()
    demo = json.loads(arguments.demo.read_text(encoding="utf-8"))
    draw(demo).savefig(arguments.picture, dpi=150)


if __name__ == "__main__":
    main()
