#!/usr/bin/env python3
"""Each method beside kvpress's press of that name: one float32 layer of Llama-3.1-8B, from keys, values and what shows
the attention to the rows that stay.

Both sides work on the same tensors in one process, in turn, with the same number of threads; the figure is the median of
the ratios of the pairs (bench/peers/peers.py says more). What a press makes of hidden states is not in its time where ours
is shown the same: it projects and rotates nothing, and expected attention has its statistics given.

    bench/peers/run.sh methods --threads 2 --tokens 8192,32768 --out methods.json
"""

import argparse
import ctypes
import json
import math
import pathlib
import types

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
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from peers import Bench, GROUP, HEAD_DIM, KV_HEADS, POOL, QUERY_HEADS, WINDOW, cpu, theirs

SHARE = 8  # one row of so many stays
REPEATED = 1024  # tokens of the stretch that KVzip has repeated, and of its repeat
ATTENTION_TOKENS = 2048  # of H2O: all heads' attention of all tokens takes their square
GOAL = 5


class GivenStatistics(ExpectedAttentionPress):
    """Expected attention with statistics of a calibration, as ours has them and kvpress's own StatsPress."""

    def get_query_statistics(self, module, hidden_states):
        mean = torch.full((1, QUERY_HEADS, HEAD_DIM), 0.125)
        covariance = torch.eye(HEAD_DIM).expand(1, QUERY_HEADS, HEAD_DIM, HEAD_DIM)
        return self.apply_avg_rope(module, mean, covariance, hidden_states.shape[1])


def q_filter():
    press = QFilterPress()
    press.q_filters = torch.ones(1, KV_HEADS, HEAD_DIM)
    return press


def snap(kind=SnapKVPress):
    return kind(window_size=WINDOW, kernel_size=POOL)


PRESSES = {
    "snapkv": snap,
    "pyramidkv": lambda: snap(PyramidKVPress),
    "adakv": lambda: AdaKVPress(snap()),
    "h2o": ObservedAttentionPress,
    "tova": TOVAPress,
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
    "lagkv": LagKVPress,
    "cur": CURPress,
    "chunkkv": lambda: ChunkKVPress(snap()),
    "streaming": StreamingLLMPress,
    "random": RandomPress,
    "kvzip": KVzipPress,
    "expected-attention": GivenStatistics,
    "expected-attention-adaptive": lambda: AdaKVPress(GivenStatistics(epsilon=0.01)),
    "q-filter": q_filter,
}


def rotation(_, positions):
    steps = 10000.0 ** (-2.0 * torch.arange(HEAD_DIM // 2) / HEAD_DIM)
    angles = (positions[0][:, None] * steps).repeat(1, 2)
    return angles.cos()[None], angles.sin()[None]


class Module:
    """What a press asks of an attention module whose hidden states are its queries, unrotated."""

    def __init__(self):
        self.config = types.SimpleNamespace(num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS,
                                            num_hidden_layers=32, _attn_implementation="sdpa")
        self.head_dim, self.layer_idx, self.rotary_emb = HEAD_DIM, 0, rotation

    def q_proj(self, hidden):
        return hidden


def no_rotation(tokens):
    ones = torch.ones(1, tokens, HEAD_DIM)
    return {"position_embeddings": (ones, torch.zeros_like(ones))}


class Theirs:
    """A press on a layer: scores, rows, and the tensors that they leave."""

    def __init__(self, press, tokens, queries, attention=None):
        self.press, self.module, self.attention = press, Module(), attention
        self.press.compression_ratio = 1 - (tokens // SHARE + 0.5) / tokens
        self.hidden = torch.zeros(1, tokens, QUERY_HEADS * HEAD_DIM)
        self.hidden[0, -WINDOW:] = queries.transpose(0, 1).reshape(WINDOW, -1)
        self.kwargs = no_rotation(tokens)

    def __call__(self, keys, values):
        with torch.no_grad():
            return self.press.compress(self.module, self.hidden, keys[None], values[None], self.attention, self.kwargs)


class TheirRepeat:
    """KVzip's scores of one stretch of the context in one layer."""

    def __init__(self, press, tokens, queries):
        self.press, self.module = press, Module()
        self.hidden = queries.transpose(0, 1).reshape(1, REPEATED, -1)
        self.kwargs = no_rotation(REPEATED)
        press.context_length, press.end_idx = tokens - REPEATED, REPEATED
        press.score_val = torch.zeros(1, 1, KV_HEADS, press.context_length)

    def __call__(self, keys, values):
        with torch.no_grad():
            self.press.score_kvzip(self.module, self.hidden, keys[None], values[None], None, self.kwargs)


class Ours:
    """bench/peers/methods.cpp."""

    def __init__(self, c):
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("make", pointer, [ctypes.c_char_p, size, size, ctypes.c_int]),
            ("free", None, [pointer]),
            ("compress", size, [pointer] * 4 + [size]),
            ("compress_by_attention", size, [pointer] * 4),
            ("observe", None, [pointer] * 4 + [size, size]),
        ):
            function = getattr(c, "methods_" + name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


def measure(bench, ours, method, tokens):
    rows = min(tokens, ATTENTION_TOKENS) if method == "h2o" else tokens
    ring, press = bench.ring("float32", rows), PRESSES[method]()
    mine = ours.make(method.encode(), rows, rows // SHARE, bench.threads)
    if method == "kvzip":
        queries = torch.randn(QUERY_HEADS, REPEATED, HEAD_DIM, generator=torch.Generator().manual_seed(2))
        their_work = TheirRepeat(press, rows, queries)
        work = lambda k, v: ours.observe(mine, k.data_ptr(), v.data_ptr(), queries.data_ptr(), REPEATED, REPEATED)
    elif method == "h2o":
        keys = ring.layers[0][0].repeat_interleave(GROUP, 0)
        attention = (keys @ keys.transpose(1, 2) / math.sqrt(HEAD_DIM))
        attention.masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu(1), -math.inf)
        attention = attention.softmax(-1)[None]
        their_work = Theirs(press, rows, ring.queries, attention)
        work = lambda k, v: ours.compress_by_attention(mine, k.data_ptr(), v.data_ptr(), attention.data_ptr())
    else:
        their_work = Theirs(press, rows, ring.queries)
        work = lambda k, v: ours.compress(mine, k.data_ptr(), v.data_ptr(), ring.queries.data_ptr(), WINDOW)
    bench.compare(f"{method}, {rows} tokens", GOAL, theirs(ring, their_work), bench.ours(ring, work))
    bench.results[-1].update(method=method, tokens=rows)
    ours.free(mine)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=pathlib.Path, required=True, help="the shared library of bench/peers")
    parser.add_argument("--threads", default="2", help="numbers of threads, each a table of its own: 1,2")
    parser.add_argument("--tokens", default="8192", help="tokens of the layer, each a table of its own: 8192,32768")
    parser.add_argument("--methods", default=",".join(PRESSES), help="all by default")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, help="results as JSON")
    arguments = parser.parse_args()

    bench = Bench(arguments)
    ours = Ours(bench.library.c)
    print(f"{cpu()}, code path {bench.library.code_path().decode()}, torch {torch.__version__}")
    print(f"float32, {KV_HEADS} KV heads, {QUERY_HEADS} query heads, head dimension {HEAD_DIM}, window {WINDOW}, one row "
          f"of {SHARE} stays; medians of {bench.pairs} pairs, quartiles\n")
    print(f"{'method':72} threads  ratio  (quartiles)   goal          theirs ms    ours ms")
    for bench.threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(bench.threads)
        for tokens in map(int, arguments.tokens.split(",")):
            for method in arguments.methods.split(","):
                measure(bench, ours, method, tokens)
    if arguments.out:
        arguments.out.write_text(json.dumps({"cpu": cpu(), "torch": torch.__version__, "results": bench.results},
                                            indent=1) + "\n")


if __name__ == "__main__":
    main()
