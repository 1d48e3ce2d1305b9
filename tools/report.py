#!/usr/bin/env python3
"""Draws tables and plots from the records that `ckv evaluate` writes.

Writes into DIR: report.md and report.html (a table a task and length: mean, 95 % bootstrap interval, share of what the
full cache reaches, KV bytes, ms), accuracy against budget, and for each method length x depth and which tokens each layer
kept of one prompt, as PNG and SVG.
Only prompts that the full cache answers are counted; where a text is asked several questions, those whose every question it
answers. Needs numpy and matplotlib; never needed to build or use the library.

    tools/report.py results.jsonl report
    tools/report.py results.jsonl report --methods compresskv,snapkv --draws 2000
"""

import argparse
import collections
import html
import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLUMNS = ["budget", "method", "prompts", "result", "95 % interval", "of full", "KV MiB", "compress ms"]
LABELS = {
    "perplexity": "loss of what follows, nats a token",
    "later-loss": "loss of the passage quoted, nats a token",
    "long-loss": "loss of 1,024 tokens on a budget, nats a token",
    "error": "relative error of attention outputs",
}
ASKED = {"rules": "rule followed, %", "later": "single questions right, %", "later-many": "single questions right, %",
         "long-names": "recalls right, %", "long-tally": "recalls right, %"}


def place(record):
    return record["task"], record["length"], record["prompt"]


def once(pairs):
    """A JSON object whose keys all differ; Python would keep the last of two in silence."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice")
    return record


def finite(text):
    raise ValueError(f"{text} is no number of JSON")


def lines_of(path):
    """(number, object) of each line; what stands behind the last line break is of a run that was stopped, or is still running."""
    if not path.is_file():
        sys.exit(f"report: {path} is not a regular file that is there: give what `ckv evaluate --out` wrote")
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                record = json.loads(line, object_pairs_hook=once, parse_constant=finite)
                if not isinstance(record, dict):
                    raise ValueError("a line is no object")
                yield number, record


def read(path):
    """The header, and the records of prompts that the full cache answers. Ends the program where two records are the same."""
    number, header, records, numbers = 0, None, [], {}
    try:
        for number, record in lines_of(path):
            if header is None:
                header = record
                if header.get("file") != "ckv evaluate":
                    break
                continue
            key = *place(record), record["method"], json.dumps(record["budget"])
            if key in numbers:
                sys.exit(f"report: {path}: lines {numbers[key]} and {number} are both the record "
                         f"{key[0]}, {key[1]} tokens, prompt {key[2]}, {key[3]}, budget {key[4]}: counted twice, it would narrow "
                         f"the intervals; keep one of the two")
            numbers[key] = number
            records.append(record)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        sys.exit(f"report: {path}: line {number + isinstance(error, (ValueError, RecursionError))} is no record: {error!r:.200}")
    if header is None or header.get("file") != "ckv evaluate":
        sys.exit(f"report: {path} is not what `ckv evaluate` wrote")
    answered = {place(r) for r in records if r["method"] == "full" and r.get("right", True)}
    return header, [r for r in records if place(r) in answered]


def budget_text(budget):
    if budget is None:
        return "all"
    return f"{100 * budget['ratio']:g} %" if "ratio" in budget else f"{budget['tokens']} rows"


def budget_key(budget):
    """Small budgets first, the full cache before all."""
    return (0, 0.0) if budget is None else (1 + ("tokens" in budget), next(iter(budget.values())))


def label(task):
    return LABELS.get(task) or ASKED.get(task, "right, %")


def score(record):
    """Per cent where questions were asked, else what was measured: perplexities as losses, whose mean means something."""
    if "questions" in record:
        return 100.0 * sum(question["right"] for question in record["questions"]) / len(record["questions"])
    if "right" in record:
        return 100.0 * record["right"]
    return np.log(record["perplexity"]) if "perplexity" in record else record["error"]


def interval(values, draws, generator):
    """95 % of the means of so many samples drawn with replacement. One value a prompt: questions to one text are drawn together."""
    means = generator.choice(values, (draws, len(values))).mean(axis=1)
    return np.percentile(means, [2.5, 97.5])


def tables(records, draws):
    """(task, length, overview, rows): mean and interval a method and budget, and all that is known of each such cell."""
    generator = np.random.default_rng(0)
    for task, length in sorted({(r["task"], r["length"]) for r in records}):
        own = [r for r in records if (r["task"], r["length"]) == (task, length)]
        methods = list(dict.fromkeys(r["method"] for r in own))
        cells = collections.defaultdict(list)
        for record in own:
            cells[budget_key(record["budget"]), methods.index(record["method"])].append(record)
        full = np.mean([score(r) for r in own if r["method"] == "full"])
        rows, overview = [], {}
        for (budget, method), cell in sorted(cells.items()):
            values = np.array([score(r) for r in cell])
            low, high = interval(values, draws, generator)
            asked = "right" in cell[0]
            digits = 0 if asked else 3
            rows.append([budget_text(cell[0]["budget"]), cell[0]["method"], str(len(cell)),
                         f"{values.mean():.{digits}f}{' %' if asked else ''}", f"{low:.{digits}f} to {high:.{digits}f}",
                         f"{100 * values.mean() / full:.0f} %" if asked else f"{values.mean() - full:+.3f}",
                         f"{np.mean([r['kv_bytes'] for r in cell]) / 2**20:.2f}",
                         f"{np.mean([r['compress_ms'] for r in cell]):.1f}"])
            if cell[0]["method"] != "full":
                overview[methods[method], budget] = f"{values.mean():.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
        budgets = sorted({budget for _, budget in overview})
        texts = {budget_key(r["budget"]): budget_text(r["budget"]) for r in own}
        pivot = [["method"] + [texts[b] for b in budgets]]
        pivot += [[f"`{m}`"] + [overview.get((m, b), "") for b in budgets] for m in methods if m != "full"]
        prompts = sum(r["method"] == "full" for r in own)
        yield task, length, f"{label(task)}, {prompts} prompts (full: {full:.{0 if task not in LABELS else 3}f})", pivot, rows


def settings_text(header):
    settings = ", ".join(f"{name} {value}" for name, value in header["settings"].items() if value is not None)
    return (f"Model {header['model']} (SHA-256 {header['model_sha256']}), version {header['version']}, code path "
            f"{header['code_path']}; {settings}. Prompts that the full cache answers wrongly are dropped, also for one "
            f"question of several; of long-names and long-tally single recalls are. Every method held the same bytes at each budget.")


def markdown(header, parts, pictures):
    lines = ["# Evaluation", "", settings_text(header), ""]
    for task, length, title, pivot, rows in parts:
        lines += [f"## {task}, {length} tokens", "", f"{title[0].upper()}{title[1:]}, with 95 % intervals:", ""]
        lines += ["| " + " | ".join(pivot[0]) + " |", "| --- |" + " ---: |" * (len(pivot[0]) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in pivot[1:]] + [""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * 6]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [f"![{name}]({name}.svg)\n" for name in pictures]
    return "\n".join(lines)


def page(header, parts, pictures):
    cell = lambda tag, texts: "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)  # noqa: E731
    body = [f"<h1>Evaluation</h1><p>{html.escape(settings_text(header))}</p>"]
    for task, length, title, pivot, rows in parts:
        body.append(f"<h2>{html.escape(task)}, {length} tokens</h2><p>{html.escape(title)}, with 95 % intervals</p>")
        body.append(f"<table><tr>{cell('th', pivot[0])}</tr>")
        body += [f"<tr>{cell('td', row)}</tr>" for row in pivot[1:]] + ["</table>"]
        body.append(f"<table><tr>{cell('th', COLUMNS)}</tr>")
        body += [f"<tr>{cell('td', row)}</tr>" for row in rows] + ["</table>"]
    body += [f'<p><img src="{name}.svg" alt="{name}"></p>' for name in pictures]
    style = "body{font-family:sans-serif;margin:2em}td,th{padding:2px 10px;text-align:right}img{max-width:100%}"
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{style}</style>'
            + "\n".join(body) + "</html>\n")


def curves(records, unit):
    """Accuracy against budget, a panel a task and length; None where the file has no budgets of this unit."""
    own = [r for r in records if r["budget"] and unit in r["budget"]]
    panels = sorted({(r["task"], r["length"]) for r in own})
    if not panels:
        return None
    methods = list(dict.fromkeys(r["method"] for r in own))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels) + 1.8, 4.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels):
        for i, method in enumerate(methods):
            points = collections.defaultdict(list)
            for record in own:
                if (record["task"], record["length"]) == panel and record["method"] == method:
                    points[record["budget"][unit]].append(score(record))
            x = sorted(points)
            axis.plot(x, [np.mean(points[b]) for b in x], label=method, color=plt.cm.tab20(i % 20), linewidth=1.6,
                      marker="osD^vP*X"[i % 8], markersize=5)
        axis.set_xscale("log")
        ticks = sorted({r["budget"][unit] for r in own})
        axis.set_xticks(ticks, [f"{100 * t:g} %" if unit == "ratio" else str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_title(f"{panel[0]}, {panel[1]} tokens", fontsize=10)
        axis.set_xlabel("share of the cache kept" if unit == "ratio" else "rows a layer kept")
        axis.set_ylabel(label(panel[0]))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def panels(count, cell, margin):
    """A figure of `count` panels, four a row; sizes in inches."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(cell[0] * columns + margin[0], cell[1] * rows + margin[1]),
                                sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def heat_maps(records, budget):
    """Length x depth for each method at one budget."""
    own = [r for r in records if r["budget"] == budget]
    methods = list(dict.fromkeys(r["method"] for r in own))
    lengths, depths = sorted({r["length"] for r in own}), sorted({r["depth"] for r in own})
    figure, axes = panels(len(methods), (3.0, 1.0 + 0.4 * len(lengths)), (0.8, 0.6))
    for axis, method in zip(axes.flat, methods):
        grid = np.full((len(lengths), len(depths)), np.nan)
        for i, length in enumerate(lengths):
            for j, depth in enumerate(depths):
                values = [score(r) for r in own if (r["method"], r["length"], r["depth"]) == (method, length, depth)]
                grid[i, j] = np.mean(values) if values else np.nan
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths], fontsize=7)
        axis.set_yticks(range(len(lengths)), lengths, fontsize=7)
        axis.set_title(method, fontsize=9)
    figure.supxlabel("depth of the needle, %", fontsize=9)
    figure.supylabel("tokens", fontsize=9)
    figure.suptitle(f"right, %, at {budget_text(budget)}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7)
    return figure


def kept_maps(records, length, budget):
    """Which tokens each layer kept of one prompt, the first whose needle lies in the middle; None where none was recorded."""
    own = [r for r in records if "kept" in r and r["length"] == length and r["budget"] == budget]
    if not own:
        return None
    prompt = min(own, key=lambda r: (abs(r["depth"] - 0.5), r["prompt"]))["prompt"]
    own = [r for r in own if r["prompt"] == prompt]
    full = next(r for r in records if r["method"] == "full" and (r["length"], r["prompt"]) == (length, prompt))
    tokens, layers, stretches = full["prompt_tokens"], len(own[0]["kept"]), len(own[0]["kept"][0])
    # Of all KV heads together: the positions p of a stretch are those with the same p * stretches / tokens, rounded down.
    whole = np.bincount(np.arange(tokens) * stretches // tokens, minlength=stretches) * full["rows"] / (tokens * layers)
    figure, axes = panels(len(own), (3.4, 1.7), (0.6, 0.8))
    for axis, record in zip(axes.flat, own):
        image = axis.imshow(np.array(record["kept"]) / whole, vmin=0, vmax=1, cmap="Blues", aspect="auto",
                            interpolation="nearest", extent=(0, tokens, layers - 0.5, -0.5))
        axis.axvspan(*record["fact"], color="tab:red", alpha=0.3, linewidth=0)
        axis.set_title(f"{record['method']}, {'right' if record['right'] else 'wrong'}", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.supxlabel("position in the prompt; red: the needle", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.suptitle(f"share kept, {length} tokens at {budget_text(budget)}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=pathlib.Path, help="what `ckv evaluate --out` wrote")
    parser.add_argument("directory", type=pathlib.Path, help="where the report goes; made where it is not there")
    parser.add_argument("--methods", help="only these, comma-separated")
    parser.add_argument("--draws", type=int, default=10000, help="bootstrap samples")
    arguments = parser.parse_args()
    header, records = read(arguments.records)
    if arguments.methods:
        wanted = arguments.methods.split(",") + ["full"]
        records = [r for r in records if r["method"] in wanted]
    if not records:
        sys.exit("report: the file holds no prompt that the full cache answers")
    arguments.directory.mkdir(parents=True, exist_ok=True)

    figures = {f"{unit}_curves": curves(records, unit) for unit in ("ratio", "tokens")}
    needles = [r for r in records if r["task"] == "needle"]
    budgets = sorted({json.dumps(r["budget"]) for r in needles if r["budget"]}, key=lambda b: budget_key(json.loads(b)))
    for text in budgets:
        budget = json.loads(text)
        name = budget_text(budget).replace(" %", "pc").replace(" ", "_").replace(".", "_")
        figures[f"needle_{name}"] = heat_maps(needles, budget)
        for length in sorted({r["length"] for r in needles}):
            figures[f"kept_{length}_{name}"] = kept_maps(needles, length, budget)
    figures = {name: figure for name, figure in figures.items() if figure}
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            figure.savefig(arguments.directory / f"{name}.{ending}", dpi=150)
        plt.close(figure)
    parts = list(tables(records, arguments.draws))
    (arguments.directory / "report.md").write_text(markdown(header, parts, figures), encoding="utf-8")
    (arguments.directory / "report.html").write_text(page(header, parts, figures), encoding="utf-8")


if __name__ == "__main__":
    main()
