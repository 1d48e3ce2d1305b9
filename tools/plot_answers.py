#!/usr/bin/env python3
"""Draws the picture of README.md: right answers against the share of the cache that is kept.

Reads the figures from the table of docs/evaluation-tables.md (Single needle, about 2,000 tokens), so that the picture cannot say
anything else. Needs matplotlib; never needed to build or use the library.

    tools/plot_answers.py docs/evaluation-tables.md docs/answers.svg
"""

import argparse
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HEADING = "About 2,000 tokens"
# Okabe and Ito's colours, which everybody can tell apart, darkened for text; how far each label is moved up, in per cent.
LINES = {
    "model-wide:window=16": ("model-wide (ours)", "#B0508F", 3),
    "compresskv:window=16": ("CompressKV", "#0072B2", -2),
    "snapkv:window=16": ("SnapKV", "#008060", -4),
    "tova": ("TOVA", "#B07A00", 0),
    "streaming": ("StreamingLLM", "#D55E00", 0),
}


def read(path):
    """(shares kept, per cent right by method) of the table below HEADING."""
    text = path.read_text(encoding="utf-8")
    if f"\n{HEADING}" not in text:
        sys.exit(f"plot_answers: {path} has no line that begins with '{HEADING}'")
    rows = []
    for line in text.split(f"\n{HEADING}", 1)[1].split("\n\n", 2)[1].splitlines():
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    shares = [int(re.fullmatch(r"(\d+) %", cell)[1]) for cell in rows[0][1:]]
    answers = {}
    for name, *cells in rows[2:]:
        answers[name.strip("`")] = [int(re.match(r"\d+", cell)[0]) for cell in cells]
    return shares, answers


def draw(shares, answers, out):
    # Text stays text, and the background is white: legible on a dark page too. No date and no random ids: the same bytes.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "answers", "font.family": "sans-serif", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7.2, 3.4), facecolor="white")
    for name, (label, colour, up) in LINES.items():
        axes.plot(shares, answers[name], color=colour, marker="o", markersize=4, linewidth=2)
        axes.text(shares[-1] * 1.07, answers[name][-1] + up, label, color=colour, va="center")
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share} %" for share in shares])
    axes.minorticks_off()
    axes.set_xlim(shares[0] * 0.93, shares[-1] * 1.03)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25), [f"{part} %" for part in range(0, 101, 25)])
    axes.set_xlabel("share of the KV cache that is kept")
    axes.set_ylabel("right answers")
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.subplots_adjust(left=0.11, right=0.78, top=0.95, bottom=0.17)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    if out.suffix == ".svg":
        lines = out.read_text(encoding="utf-8").splitlines()
        out.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=pathlib.Path, help="docs/evaluation-tables.md")
    parser.add_argument("out", type=pathlib.Path, help="the picture: .svg, .png or .pdf")
    arguments = parser.parse_args()
    shares, answers = read(arguments.tables)
    missing = [name for name in LINES if name not in answers]
    if missing:
        sys.exit(f"plot_answers: {arguments.tables}, {HEADING}: no row of {', '.join(missing)}")
    draw(shares, answers, arguments.out)


if __name__ == "__main__":
    main()
