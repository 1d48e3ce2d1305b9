#!/usr/bin/env python3
"""Draws the pictures of README.md and docs/evaluation.md from the tables of docs/evaluation-tables.md, so that they cannot say anything else.

    tools/plot_answers.py docs/evaluation-tables.md answers docs/answers.svg    right answers against the share that is kept
    tools/plot_answers.py docs/evaluation-tables.md later docs/later.svg        questions that come later, method by method

Needs matplotlib; never needed to build or use the library.
"""

import argparse
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Okabe and Ito's colours, which everybody can tell apart, darkened for text; how far each label is moved up, in per cent.
LINES = {
    "model-wide:window=16": ("model-wide (ours)", "#B0508F", 3),
    "compresskv:window=16": ("CompressKV", "#0072B2", -2),
    "snapkv:window=16": ("SnapKV", "#008060", -4),
    "tova": ("TOVA", "#B07A00", 0),
    "streaming": ("StreamingLLM", "#D55E00", 0),
}


def read(path, heading):
    """(names of the columns, by method the cells) of the table below a heading."""
    text = path.read_text(encoding="utf-8")
    if f"\n{heading}" not in text:
        sys.exit(f"plot_answers: {path} has no line that begins with '{heading}'")
    rows = []
    for line in text.split(f"\n{heading}", 1)[1].split("\n\n", 2)[1].splitlines():
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return rows[0][1:], {name.strip("`"): cells for name, *cells in rows[2:]}


def per_cent(cell):
    """61 of "61 (51-71)"."""
    return int(re.match(r"\d+", cell)[0])


def save(figure, out):
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    if out.suffix == ".svg":
        lines = out.read_text(encoding="utf-8").splitlines()
        out.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
    plt.close(figure)


def draw_answers(columns, table, out):
    shares = [int(re.fullmatch(r"(\d+) %", cell)[1]) for cell in columns]
    missing = [name for name in LINES if name not in table]
    if missing:
        sys.exit(f"plot_answers: there is no row of {', '.join(missing)}")
    answers = {name: [per_cent(cell) for cell in table[name]] for name in LINES}
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
    save(figure, out)


def draw_later(columns, table, out):
    """A row a method, a panel a task: what it answers of a quarter of the cache, and of a half."""
    names = sorted(table, key=lambda name: per_cent(table[name][0]))
    tasks = [match[1] for match in (re.match(r"`([\w-]+)`:", column) for column in columns) if match]
    figure, panels = plt.subplots(1, len(tasks), figsize=(7.2, 0.27 * len(names) + 1.1), sharey=True, facecolor="white")
    for i, (task, axes) in enumerate(zip(tasks, panels)):
        for row, name in enumerate(names):
            quarter, half = (per_cent(cell) for cell in table[name][2 * i : 2 * i + 2])
            axes.plot([quarter, half], [row, row], color="#BBBBBB", linewidth=2, zorder=1)
            axes.scatter(quarter, row, color="#0072B2", s=34, zorder=2, label="25 % kept" if row == 0 else None)
            axes.scatter(half, row, color="#D55E00", s=34, zorder=2, label="50 % kept" if row == 0 else None)
        axes.set_title(task, fontsize=11)
        axes.set_xlim(-3, 103)
        axes.set_xticks(range(0, 101, 25), [f"{part} %" for part in range(0, 101, 25)])
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[-1].legend(loc="lower right", frameon=False, fontsize=9)
    figure.supxlabel("questions answered rightly", fontsize=11)
    figure.tight_layout()
    save(figure, out)


# How each picture is drawn, and how the line begins that stands before its table.
PICTURES = {
    "answers": (draw_answers, "About 2,000 tokens"),
    "later": (draw_later, "First figures: 10 texts a task"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=pathlib.Path, help="docs/evaluation-tables.md")
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("out", type=pathlib.Path, help="the picture: .svg, .png or .pdf")
    arguments = parser.parse_args()
    # Text stays text, and the background is white: legible on a dark page too. No date and no random ids: the same bytes.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "answers", "font.family": "sans-serif", "font.size": 11})
    draw, heading = PICTURES[arguments.picture]
    draw(*read(arguments.tables, heading), arguments.out)


if __name__ == "__main__":
    main()
