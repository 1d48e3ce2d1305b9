#!/usr/bin/env python3
"""Draws what `ckv calibrate` found.

Writes into OUT, as PNG and SVG: heads (both scores of every head), budgets (rows a layer as the library shares totals out),
ablation (needle accuracy against masked heads), curves (error of each layer against its budget) and stability (how many
prompts are enough). A picture whose data DIR does not hold is skipped with a line that says so.
Needs numpy and matplotlib; never needed to build or use the library.

    tools/plot_calibration.py DIR OUT
"""

import argparse
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

CHOOSING = 4  # heads a layer that choose tokens, by default
TOTALS = [64, 128, 256, 512]  # mean rows a layer
# Okabe and Ito's colours, which everybody can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
HEADS = {"srh": ("semantic retrieval heads", BLUE, "o"), "classic": ("classic retrieval heads", ORANGE, "s"),
         "random": ("random heads", GREEN, "^")}


def read(directory):
    """calibration.json, with what lies beside it: `scores` and `classic` [layer][head], `errors` [layer]."""
    record = directory / "calibration.json"
    if not record.is_file():
        sys.exit(f"plot_calibration: {record} is not there: give the folder that `ckv calibrate` wrote")
    found = json.loads(record.read_text(encoding="utf-8"))
    for key, ending, value in (("scores", "_head_scores.json", means), ("classic", "_classic_scores.json", means),
                               ("errors", "_layer_score.jsonl", lambda errors: errors["avg_score"])):
        path = directory / (found["model"] + ending)
        if path.is_file():
            found[key] = value(json.loads(path.read_text(encoding="utf-8")))
    return found


def means(scores):
    """[layer][head] of {"<layer>-<head>": [a score a prompt]}."""
    places = {tuple(map(int, key.split("-"))): np.mean(runs) for key, runs in scores.items()}
    grid = np.zeros(np.max(list(places), axis=0) + 1)
    for place, mean in places.items():
        grid[place] = mean
    return grid


def share_out(errors, rows):
    """Rows of each layer, rows * layers in all, as budget::ErrorAware does it for a prompt of at least 3 * rows tokens."""
    errors = np.array(errors)
    total, least, most = rows * len(errors), min(32, rows), 3 * rows
    budgets = np.clip(least + np.rint(errors * (total - least * len(errors))).astype(int), least, most)
    step = 1 if budgets.sum() < total else -1
    order = np.argsort(-step * errors, kind="stable")  # by falling error to grow, by rising error to shrink
    while budgets.sum() != total:
        for layer in order:
            if budgets.sum() != total and least <= budgets[layer] + step <= most:
                budgets[layer] += step
    assert budgets.sum() == total
    return budgets


def draw_heads(found):
    """Both scores side by side; dots: the heads that choose."""
    panels = [("semantic retrieval score", found["scores"])]
    if "classic" in found:
        panels.append(("classic retrieval score", found["classic"]))
    else:
        print("heads: without the classic score, there is no NAME_classic_scores.json")
    layers, heads = found["scores"].shape
    figure, axes = plt.subplots(1, len(panels), figsize=(len(panels) * (1.6 + 0.22 * heads), 1.4 + 0.19 * layers),
                                sharey=True, squeeze=False, layout="constrained")
    for axis, (title, grid) in zip(axes[0], panels):
        image = axis.imshow(grid, vmin=0, cmap="viridis", aspect="auto")
        best = np.argsort(-grid, axis=1, kind="stable")[:, :CHOOSING]
        axis.scatter(best.ravel(), np.repeat(np.arange(layers), best.shape[1]), s=16, color="black", edgecolors="white",
                     linewidths=0.9)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"query head; dots: the first {best.shape[1]} of the layer", fontsize=8)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(16, integer=True))
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(16, integer=True))
        axis.tick_params(labelsize=8)
        figure.colorbar(image, ax=axis, shrink=0.7).ax.tick_params(labelsize=8)
    axes[0][0].set_ylabel("layer")
    return figure


def draw_budgets(found):
    layers = np.arange(len(found["errors"]))
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for rows, color, marker in zip(TOTALS, (BLUE, ORANGE, GREEN, PINK), "os^D"):
        axis.plot(layers, share_out(found["errors"], rows), color=color, marker=marker, markersize=4, linewidth=1.2,
                  label=f"{rows} on average, {rows * len(layers):,} in all")
        axis.axhline(rows, color=color, linewidth=0.8, linestyle=":")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(16, integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("rows kept; dotted: all layers alike")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def draw_ablation(found):
    cells = found["ablation"]
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for heads, (label, color, marker) in HEADS.items():
        # With no head masked all three are one model, which need not stand there three times.
        points = {cell["masked"]: 100 * cell["right"] for cell in cells if cell["heads"] == heads or cell["masked"] == 0}
        draws = max(cell.get("draws", 1) for cell in cells if cell["heads"] == heads)
        axis.plot(*zip(*sorted(points.items())), color=color, marker=marker, linewidth=1.6, markersize=5,
                  label=label + (f", mean of {draws} draws" if draws > 1 else ""))
    axis.set_xticks(sorted({cell["masked"] for cell in cells}))
    axis.set_ylim(-3, 103)
    axis.set_xlabel("heads masked, of all layers")
    axis.set_ylabel("needles found, %")
    axis.set_title(f"{max(cell['prompts'] for cell in cells)} prompts that the whole model answers", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_curves(found):
    rows, errors = found["curves"]["rows"], np.array(found["curves"]["errors"])  # [budget][layer]
    layers = errors.shape[1]
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, max(1, layers - 1)), "viridis")
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for layer in range(layers):
        axis.plot(rows, errors[:, layer], color=colors.to_rgba(layer), linewidth=1.2, marker=".", markersize=4)
    for layer in np.argsort(-errors[0], kind="stable")[:3]:
        axis.annotate(f"layer {layer} ", (rows[0], errors[0, layer]), ha="right", va="center", fontsize=8)
    axis.margins(x=0.12)
    axis.plot(rows, errors.mean(axis=1), color="black", linewidth=2, linestyle="--", label="mean of the layers")
    axis.set_xscale("log")
    axis.set_xticks(rows, [str(r) for r in rows])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("rows that the layer keeps")
    axis.set_ylabel("relative error of its output a decode step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.colorbar(colors, ax=axis, label="layer", ticks=matplotlib.ticker.MaxNLocator(10, integer=True))
    return figure


def draw_stability(found):
    halves, points = found["stability"]["halves"], found["stability"]["by_prompts"]
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    x = [point["prompts"] for point in points]
    axis.plot(x, [100 * point["top4_overlap"] for point in points], color=BLUE, marker="o", linewidth=1.6, markersize=5,
              label="the first prompts with all of them")
    axis.plot(np.mean(halves["prompts"]), 100 * halves["top4_overlap"], color=ORANGE, marker="*", markersize=13, linestyle="",
              label=f"two halves with each other (rank correlation {halves['rank_correlation']:.3f})")
    axis.set_xscale("log")
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()
    axis.set_ylim(top=101.5)
    axis.set_xlabel("prompts that counted")
    axis.set_ylabel("overlap of the first 4 heads a layer, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return figure


PICTURES = {"heads": (draw_heads, "scores", "there is no NAME_head_scores.json"),
            "budgets": (draw_budgets, "errors", "there is no NAME_layer_score.jsonl"),
            "ablation": (draw_ablation, "ablation", "calibration.json has none: ckv calibrate --ablate"),
            "curves": (draw_curves, "curves", "calibration.json has none: ckv calibrate --curves"),
            "stability": (draw_stability, "stability", "calibration.json says nothing of it: calibrate again")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=pathlib.Path, help="what `ckv calibrate --out` wrote")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="where the pictures go; made where it is not there")
    arguments = parser.parse_args()
    found = read(arguments.directory)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (draw, part, absent) in PICTURES.items():
        if part not in found:
            print(f"{name}: skipped, {absent}")
            continue
        figure = draw(found)
        for ending in ("png", "svg"):
            figure.savefig(arguments.out / f"{name}.{ending}", dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main()
