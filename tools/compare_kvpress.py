#!/usr/bin/env python3
"""Holds our methods against those of PyPI `kvpress` on the same random tensors, and says why they differ where they do.

Prints a table: how far apart the scores are once the stated difference is undone, in how many cases the rows kept are
then the same, and how many rows are the same as they come. Exits with 1 where a stated difference does not explain it.

    pip install kvpress==0.5.5
    cmake --build build --target score_probe
    tools/compare_kvpress.py build/tests/score_probe
    tools/compare_kvpress.py build/tests/score_probe --record     # also writes tests/data/kvpress_scores.json

The test score/kvpress_test.cpp holds the library against the recorded case.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import types

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    QFilterPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)

POOL_WIDTH = 5
SAFEGUARD = 0.2  # Ada-KV's, on both sides
SINKS = 4  # likewise
ROTARY_BASE = 10000.0
FILTER_POSITIONS = 2048  # over which ours takes a query's rotation to be spread

REASONS = {
    "snapkv": "ours is the sum over the window's rows, kvpress's the mean: w times as large, the same order",
    "tova": "none",
    "knorm": "ours keeps the window whatever its keys",
    "keydiff": "ours keeps the window whatever its keys",
    "h2o": "kvpress divides token t's sum by the S - t queries that see it, the paper does not; ours keeps the window",
    "streaming": "scores mean nothing but order; ours keeps the window first, then the sinks",
    "adakv": "kvpress's safeguard counts the window, ours (as the authors' code) is a share of what is left beside it",
    "lagkv": "ours ranks sinks and tail among themselves, and keeps the window",
    "cur": "ours keeps the window",
    "chunkkv": "ours has chunks a KV head, of what is evictable, and keeps the window",
    "expected-attention": "ours keeps the window; statistics are given, here those that kvpress takes of its prompt",
    "expected-attention-adaptive": "as expected-attention and adakv",
    "q-filter": "ours keeps the window; the filter is given, here the main direction of the same queries",
    "kvzip": "ours holds scores as half floats until all are there, and keeps the window",
}
# Where no scores are compared but rows: a press gives none, or they mean nothing.
ROWS_ALONE = ("streaming", "adakv", "chunkkv", "expected-attention-adaptive", "kvzip")
# Sums that may be as near to 0 as they like: there the difference itself counts.
NEAR_0 = ("keydiff", "q-filter")


@dataclasses.dataclass
class Case:
    query_heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    window: int
    capacity: int
    lag: int
    chunk: int
    seed: int = 0

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


CASES = [
    Case(4, 2, 40, 8, 8, 16, lag=4, chunk=4),  # the one that is recorded
    Case(9, 3, 333, 64, 8, 40, lag=16, chunk=7),
    Case(32, 8, 512, 128, 8, 64, lag=8, chunk=20),
    Case(8, 1, 200, 20, 16, 50, lag=64, chunk=10),
    Case(4, 4, 700, 64, 32, 128, lag=32, chunk=20),
]


def inner(press):
    """The press that a wrapper wraps."""
    return inner(press.press) if hasattr(press, "press") else press


class Layer:
    """Tensors of one layer, and what a press asks of an attention module: queries are its hidden states, unrotated."""

    def __init__(self, case: Case):
        self.case = case
        rng = torch.Generator().manual_seed(1000 + case.seed)
        shape = (case.tokens, case.head_dim)
        self.keys = 1.5 * torch.randn(1, case.kv_heads, *shape, generator=rng)
        self.queries = torch.randn(1, case.query_heads, *shape, generator=rng)
        self.values = torch.randn(1, case.kv_heads, *shape, generator=rng)
        # Queries before rotary embedding, of which statistics are: one direction, that turns least, stands out.
        self.calibration = self.queries.clone()
        self.calibration[..., -1] *= 2.0
        ones = torch.ones(1, *shape)
        self.kwargs = {"position_embeddings": (ones, torch.zeros_like(ones))}
        self.module = types.SimpleNamespace(
            config=types.SimpleNamespace(
                num_attention_heads=case.query_heads,
                num_key_value_heads=case.kv_heads,
                num_hidden_layers=1,
                _attn_implementation="sdpa",
            ),
            head_dim=case.head_dim,
            layer_idx=0,
            q_proj=lambda hidden: hidden,
            rotary_emb=lambda x, positions: tuple(t[None] for t in rotation(case.head_dim, positions[0])),
        )

    def hidden(self, queries: torch.Tensor) -> torch.Tensor:
        return queries.transpose(1, 2).reshape(1, queries.shape[2], -1)

    def attention(self) -> torch.Tensor:
        keys = self.keys.repeat_interleave(self.case.group, dim=1)
        logits = self.queries @ keys.transpose(2, 3) / math.sqrt(self.case.head_dim)
        future = torch.ones(self.case.tokens, self.case.tokens, dtype=torch.bool).triu(1)
        return logits.masked_fill(future, -math.inf).softmax(-1)

    def arguments(self, press):
        attention = self.attention() if isinstance(press, ObservedAttentionPress) else None
        of_future = isinstance(inner(press), ExpectedAttentionPress)
        hidden = self.hidden(self.calibration if of_future else self.queries)
        return self.module, hidden, self.keys, self.values, attention, self.kwargs

    def scores(self, press) -> np.ndarray:
        return press.score(*self.arguments(press))[0].numpy()

    def rows(self, press) -> list:
        """Rows that the press keeps of each KV head at the case's capacity."""
        if isinstance(press, KVzipPress):
            return self.masked_rows(self.repeated(press).shape[1])
        press.compression_ratio = 1.0 - (self.case.capacity + 0.5) / self.case.tokens
        _, values = press.compress(*self.arguments(press))
        if isinstance(press, AdaKVPress):
            return self.masked_rows(self.case.tokens)
        # A press returns rows, not which rows they are: their values tell.
        return [
            sorted((values[0, h, :, None] == self.values[0, h, None]).all(-1).nonzero()[:, 1].tolist())
            for h in range(self.case.kv_heads)
        ]

    def masked_rows(self, tokens: int) -> list:
        """Of a press that masks what it evicts."""
        _, heads, evicted = self.module.masked_key_indices
        everything = set(range(tokens))
        return [sorted(everything - set(evicted[heads == h].tolist())) for h in range(self.case.kv_heads)]

    def repeated(self, press: KVzipPress) -> np.ndarray:
        """KVzip's scores of the context where the last quarter of the tokens repeats the others, and its choice."""
        fed = self.case.tokens // 4
        context = self.case.tokens - fed
        press.compression_ratio = 1.0 - self.case.capacity / context + 1e-9
        press.context_length = press.end_idx = context
        press.score_val = torch.zeros(1, 1, self.case.kv_heads, context)
        ones = torch.ones(1, fed, self.case.head_dim)
        kwargs = {"position_embeddings": (ones, torch.zeros_like(ones))}
        press.score_kvzip(self.module, self.hidden(self.queries[:, :, -fed:]), self.keys, self.values, None, kwargs)
        scores = press.score_val[0, 0].clone()
        layers = [types.SimpleNamespace(self_attn=self.module)]
        press.compress_post(types.SimpleNamespace(model=types.SimpleNamespace(layers=layers)))
        return scores.numpy()


def rotation(head_dim: int, positions: torch.Tensor) -> tuple:
    """Cosines and sines of rotary embedding, `[position][element]`, the halves of a row turning together."""
    steps = ROTARY_BASE ** (-2.0 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    angles = (positions[:, None].double() * steps).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def query_filters(layer: Layer) -> torch.Tensor:
    """Of each KV head: the mean of its query heads' main directions, those of E q q^T over rotated queries."""
    case = layer.case
    half = case.head_dim // 2
    cosines, sines = (t.double() for t in rotation(case.head_dim, torch.arange(FILTER_POSITIONS)))
    mean = lambda a, b: a.T @ b / FILTER_POSITIONS
    # What rotates a row x is  x cos + (swap x) sin.
    swap = torch.zeros(case.head_dim, case.head_dim, dtype=torch.float64)
    swap[:half, half:], swap[half:, :half] = -torch.eye(half), torch.eye(half)
    directions = []
    for queries in layer.calibration[0, :, SINKS:].double():
        moment, middle = queries.T @ queries / len(queries), queries.mean(0)
        turned = mean(cosines, cosines) * moment + mean(sines, sines) * (swap @ moment @ swap.T)
        mixed = mean(cosines, sines) * (moment @ swap.T)
        main = torch.linalg.eigh(turned + mixed + mixed.T).eigenvectors[:, -1]
        along = main @ (cosines.mean(0) * middle + sines.mean(0) * (swap @ middle))
        directions.append(-main if along < 0 else main)
    return torch.stack(directions).view(case.kv_heads, case.group, -1).mean(1).float()


@dataclasses.dataclass
class KeepWindow(ScorerPress):
    """Any press with the most recent tokens above all others, as ours keeps them."""

    press: ScorerPress = None
    window: int = 0

    def score(self, *arguments):
        scores = self.press.score(*arguments)
        scores[..., -self.window :] = scores.max() + 1.0
        return scores


class Ours:
    def __init__(self, probe: pathlib.Path, folder: pathlib.Path):
        self.probe, self.folder = probe, folder

    def __call__(self, method: str, layer: Layer, capacity: int, layers: int = 1) -> dict:
        case = layer.case
        for name in ("keys", "values", "queries", "calibration"):
            getattr(layer, name).numpy().astype("<f4").tofile(self.folder / name)
        numbers = [layers, case.query_heads, case.kv_heads, case.tokens, case.head_dim, case.window, capacity]
        command = [self.probe, method, *map(str, [*numbers, case.lag, case.chunk]), self.folder]
        out = {"scores": [], "rows": []}
        for line in subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines():
            name, *values = line.split()
            if name == "capacities":
                out[name] = [int(v) for v in values]
            else:
                out[name].append([float(v) if name == "scores" else int(v) for v in values])
        return out


def safeguard(case: Case) -> float:
    """The share of all rows that comes to the window and our share of the others."""
    own = case.window + math.floor(SAFEGUARD * (case.capacity - case.window))
    return (own + 0.5) / case.capacity


def press_of(method: str, case: Case, layer: Layer, undone: bool = False):
    """kvpress's press of this name; where it is wrapped, `undone` keeps the window as ours does."""
    snap = {"window_size": case.window, "kernel_size": POOL_WIDTH}
    if method == "adakv":
        return AdaKVPress(SnapKVPress(**snap), alpha_safeguard=safeguard(case))
    if method == "expected-attention-adaptive":
        press = ExpectedAttentionPress(epsilon=0.01)
        press = KeepWindow(press=press, window=case.window) if undone else press
        return AdaKVPress(press, alpha_safeguard=safeguard(case))
    if method == "q-filter":
        press = QFilterPress()
        press.q_filters = -query_filters(layer)[None]
        return press
    return {
        "snapkv": lambda: SnapKVPress(**snap),
        "tova": TOVAPress,
        "knorm": KnormPress,
        "keydiff": KeyDiffPress,
        "h2o": ObservedAttentionPress,
        "streaming": StreamingLLMPress,
        "lagkv": lambda: LagKVPress(n_sink=SINKS, lag_size=case.lag),
        "lagkv-cross": lambda: LagKVPress(n_sink=SINKS, lag_size=case.lag, cross_scoring=True),
        "cur": lambda: CURPress(num_sinks=SINKS),
        "chunkkv": lambda: ChunkKVPress(SnapKVPress(**snap), chunk_length=case.chunk),
        "expected-attention": ExpectedAttentionPress,
        "kvzip": lambda: KVzipPress(n_sink=SINKS),
    }[method]()


def as_ours(method: str, case: Case, scores: np.ndarray) -> np.ndarray:
    """kvpress's scores with the stated differences undone."""
    if method == "snapkv":
        return scores * case.window
    if method == "h2o":
        return scores * np.arange(case.tokens, 0, -1)
    if method == "expected-attention":
        return np.concatenate([np.full_like(scores[:, :SINKS], np.finfo(np.float32).max / 2), scores[:, SINKS:]], 1)
    if method == "lagkv":
        evictable = case.tokens - case.window
        stretches = min((case.tokens - SINKS) // case.lag - 1, (evictable - SINKS) // case.lag)
        tail = SINKS + stretches * case.lag
        behind = np.arange(2, case.tokens - tail + 2)[None].repeat(len(scores), 0)  # the most recent first
        sinks = np.full_like(scores[:, :SINKS], evictable - tail + 2)
        return np.concatenate([sinks, scores[:, SINKS:tail], behind], 1)
    return scores


def chunks_as_ours(layer: Layer, ours) -> bool:
    """ChunkKVPress on what is evictable of one KV head at a time, against ours with room for as many rows."""
    case = layer.case
    evictable = case.tokens - case.window
    scores = torch.from_numpy(layer.scores(press_of("snapkv", case, layer)))[None, :, :evictable]
    given = SnapKVPress()
    press = ChunkKVPress(given, chunk_length=case.chunk)
    chunks = -(-evictable // case.chunk)
    press.compression_ratio = 1.0 - ((case.capacity - case.window) // case.chunk + 0.5) / chunks
    same = True
    for head in range(case.kv_heads):
        given.score = lambda *_: scores[:, head : head + 1]
        # Values that hold their position, as an image of a row.
        positions = torch.arange(evictable)[None, None, :, None].expand(1, 1, -1, case.head_dim)
        _, kept = press.compress(layer.module, None, positions, positions, None, {})
        theirs = kept[0, 0, :, 0].tolist() + list(range(evictable, case.tokens))
        same &= ours("chunkkv", layer, len(theirs))["rows"][head] == theirs
    return same


def repeats_as_ours(case: Case, scores: np.ndarray) -> list:
    """The rows of all KV heads by these scores, the window and the sinks beside the best."""
    heads, context = scores.shape
    scores = scores.astype(np.float16).astype(np.float64)
    scores[:, :SINKS] = 3.0
    scores[:, context - case.window :] = 2.0
    best = sorted((-scores[h, t], t, h) for h in range(heads) for t in range(context))[: heads * case.capacity]
    return [sorted(t for _, t, h in best if h == head) for head in range(heads)]


def window_and_best(scores: np.ndarray, case: Case, window: int) -> list:
    evictable = case.tokens - window
    best = np.argsort(-scores[:, :evictable], axis=1, kind="stable")[:, : case.capacity - window]
    return [sorted(row.tolist()) + list(range(evictable, case.tokens)) for row in best]


def common(a: list, b: list) -> float:
    return sum(len(set(x) & set(y)) for x, y in zip(a, b)) / sum(len(x) for x in a)


def compare(method: str, ours: Ours, cases: list) -> bool:
    difference, same, shared = 0.0, 0, 0.0
    for case in cases:
        layer = Layer(case)
        mine = ours(method, layer, case.capacity)
        theirs = layer.rows(press_of(method, case, layer))
        shared += common(theirs, mine["rows"]) / len(cases)
        if method == "chunkkv":
            same += chunks_as_ours(layer, ours)
            continue
        if method == "kvzip":
            same += mine["rows"] == repeats_as_ours(case, layer.repeated(press_of(method, case, layer)))
            continue
        if method in ROWS_ALONE:
            same += mine["rows"] == layer.rows(press_of(method, case, layer, undone=True))
            continue
        window = case.tokens - len(mine["scores"][0])
        scores = as_ours(method, case, layer.scores(press_of(method, case, layer)))
        rows = window_and_best(scores, case, window)
        same += mine["rows"] == rows
        theirs_evictable = scores[: len(mine["scores"]), : case.tokens - window]
        size = np.abs(theirs_evictable)
        size[(size == 0.0) | (method in NEAR_0)] = 1.0
        difference = max(difference, np.max(np.abs(mine["scores"] - theirs_evictable) / size))
    good = same == len(cases) and difference < 1e-4
    shown = "-" if method in ROWS_ALONE else f"{difference:.1e}"
    print(f"{method:28} {shown:>8} {same:>4}/{len(cases)} {shared:>7.0%}   {REASONS[method]}")
    return good


PYRAMIDS = [  # layers, tokens, rows a layer, window
    (30, 2000, 250, 8),
    (32, 4096, 1400, 32),
    (5, 700, 400, 8),
    (2, 900, 300, 8),
    (30, 1000, 60, 8),
]


def pyramid(press_rows: int, layers: int, tokens: int, window: int) -> list:
    press = PyramidKVPress(compression_ratio=1.0 - press_rows / tokens, window_size=window)
    config = types.SimpleNamespace(num_hidden_layers=layers)
    return [
        press.get_layer_budget(types.SimpleNamespace(config=config, layer_idx=l), tokens) for l in range(layers)
    ]


def compare_pyramids(ours: Ours) -> bool:
    print("\npyramidkv: rows of the first and last layer, and in all (asked for)")
    good = True
    for layers, tokens, rows, window in PYRAMIDS:
        theirs = pyramid(rows, layers, tokens, window)
        layer = Layer(Case(1, 1, tokens, 2, window, rows, lag=128, chunk=20))
        mine = ours("pyramidkv", layer, rows, layers)["capacities"]
        # kvpress's rows have no window on top: with it, and before ours are moved to the total, they are the same.
        with_window = ours("pyramidkv", layer, rows + window, layers)["capacities"]
        flat = len(set(theirs)) == 1
        off = max(abs(a - window - b) for a, b in zip(with_window, theirs))
        fits = sum(mine) == rows * layers and (flat or off <= 1)
        good = good and fits
        print(
            f"  L {layers} S {tokens} p {rows} w {window}: kvpress {theirs[0]}..{theirs[-1]}, {sum(theirs)}; "
            f"ours {mine[0]}..{mine[-1]}, {sum(mine)} ({rows * layers})"
            + ("; kvpress falls back to flat: its top layer would have less than w rows" if flat else
               f"; its own rule with the window on top, moved to the total: within {off} row")
        )
    return good


def record(ours: Ours, path: pathlib.Path, command: str) -> None:
    case = CASES[0]
    layer = Layer(case)
    rows = ("snapkv", "tova", "streaming", "adakv", "chunkkv", "expected-attention-adaptive")
    compared = ("snapkv", "tova", "knorm", "keydiff", "h2o", "lagkv", "lagkv-cross", "cur", "expected-attention")
    names = ["query_heads", "kv_heads", "tokens", "head_dim", "window", "capacity", "lag", "chunk"]
    data = {
        "made_by": command,
        "kvpress": importlib.metadata.version("kvpress"),
        **{name: getattr(case, name) for name in names},
        "pool_width": POOL_WIDTH,
        "keys": layer.keys.numpy().astype("<f4").tobytes().hex(),
        "values": layer.values.numpy().astype("<f4").tobytes().hex(),
        "queries": layer.queries.numpy().astype("<f4").tobytes().hex(),
        "scores": {},
        "rows": {m: layer.rows(press_of(m, case, layer, undone=True)) for m in rows},
        "pyramids": [
            {"layers": l, "tokens": s, "rows": p, "window": w, "budgets": pyramid(p, l, s, w)}
            for l, s, p, w in PYRAMIDS
        ],
    }
    for method in (*compared, "q-filter", "kvzip"):
        press = press_of(method, case, layer)
        scores = layer.repeated(press) if method == "kvzip" else layer.scores(press)
        data["scores"][method] = [[float(f"{x:.9g}") for x in row] for row in scores]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probe", type=pathlib.Path, help="the program built from tools/score_probe.cpp")
    parser.add_argument("--seeds", type=int, default=3, help="tensors of each shape")
    parser.add_argument("--record", action="store_true", help="write tests/data/kvpress_scores.json")
    args = parser.parse_args()

    cases = [dataclasses.replace(case, seed=seed) for case in CASES for seed in range(args.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(args.probe.resolve(), pathlib.Path(folder))
        print(f"kvpress {importlib.metadata.version('kvpress')}, {len(cases)} cases")
        print(f"{'method':28} {'scores':>8} {'rows':>6} {'as is':>7}   what differs on purpose")
        good = all([compare(method, ours, cases) for method in REASONS])
        good = compare_pyramids(ours) and good
        if args.record:
            out = pathlib.Path(__file__).resolve().parent.parent / "tests/data/kvpress_scores.json"
            record(ours, out, "tools/compare_kvpress.py PROBE --record")
    if not good:
        sys.exit("compare_kvpress: a difference is left that no reason explains")


if __name__ == "__main__":
    main()
