#!/usr/bin/env python3
"""compresskv beside plain PyTorch, beside kvpress, and beside what this machine can do at all.

Both sides of every ratio work on the same tensors, in this process, with the same number of threads, in turn; each call
gets a layer from a ring that is larger than twice the last-level cache. A figure is the median of the ratios of the
pairs, printed with its quartiles, beside the ratio that it is to reach. bench/peers/run.sh installs what this needs and
builds what it calls.

    bench/peers/run.sh --threads 1,2 --out results.json
"""

import argparse
import ctypes
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import types

import torch

KV_HEADS, QUERY_HEADS, HEAD_DIM, WINDOW, CAPACITY, POOL = 8, 32, 128, 8, 1024, 5
GROUP = QUERY_HEADS // KV_HEADS
HEADS = [4, 5, 13, 30]  # four heads of three KV heads, the commonest spread in the published ranking of Llama-3.1-8B
TYPES = {"float32": (0, torch.float32), "float16": (1, torch.float16), "bfloat16": (2, torch.bfloat16)}
TOKENS, LONG = 32768, 131072
SHARE = 0.03


class Library:
    """bench/peers/peers.cpp."""

    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
        for name, result, arguments in (
            ("make", pointer, [ctypes.c_char_p, ctypes.c_int, size, ctypes.c_int, pointer, size]),
            ("free", None, [pointer]),
            ("compress", size, [pointer] * 4),
            ("attention", number, [pointer] * 4),
            ("logits", number, [pointer] * 4 + [ctypes.c_int]),
            ("moves", None, [pointer] * 3 + [ctypes.c_int]),
            ("decode", number, [pointer] * 4 + [size]),
            ("extra_memory", ctypes.c_double, [pointer]),
            ("code_path", ctypes.c_char_p, []),
            ("force", ctypes.c_int, [ctypes.c_char_p]),
            ("read", number, [pointer, size, size, ctypes.c_int]),
            ("flops", number, [ctypes.c_double, ctypes.c_int, ctypes.c_int]),
        ):
            function = getattr(self.c, "peers_" + name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def layer(self, method, type_name, tokens, threads):
        heads = (ctypes.c_uint32 * len(HEADS))(*HEADS)
        return self.make(method.encode(), TYPES[type_name][0], tokens, threads, heads, len(HEADS))


class Ring:
    """Layers with the same contents, together larger than twice the last-level cache; `next()` is the coldest."""

    def __init__(self, type_name, tokens, cache_bytes):
        self.dtype, self.tokens = TYPES[type_name][1], tokens
        rng = torch.Generator().manual_seed(1)
        keys = torch.rand(KV_HEADS, tokens, HEAD_DIM, generator=rng).mul_(2).sub_(1).to(self.dtype)
        layer_bytes = 2 * keys.numel() * keys.element_size()
        self.layers = [(keys.clone(), keys.clone()) for _ in range(max(2, 2 * cache_bytes // layer_bytes + 1))]
        # Logits some 3 apart: a few tokens get most of the attention, as in a model.
        self.queries = torch.rand(QUERY_HEADS, WINDOW, HEAD_DIM, generator=rng).mul_(16).sub_(8).to(self.dtype)
        self.at = 0

    def next(self):
        self.at = (self.at + 1) % len(self.layers)
        return self.layers[self.at]


def plain_torch(keys, values, queries):
    """The method (select the retrieval heads' tokens, keep them in all heads) as one writes it in PyTorch: by indexing."""
    evictable = keys.shape[1] - WINDOW
    logits = (queries[HEADS] @ keys[[head // GROUP for head in HEADS]].transpose(-1, -2)).float() / math.sqrt(HEAD_DIM)
    logits[:, :, evictable:] += torch.full((WINDOW, WINDOW), -math.inf).triu(1)
    sums = logits.softmax(-1)[:, :, :evictable].sum(1)
    return keep(keys, values, torch.nn.functional.avg_pool1d(sums, POOL, 1, POOL // 2).sum(0))


def tuned_torch(keys, values, queries):
    """The same with one product for each KV head that is asked, so that no key is copied."""
    tokens = keys.shape[1]
    evictable = tokens - WINDOW
    future = torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1)
    total = None
    for kv_head in sorted({head // GROUP for head in HEADS}):
        own = [head for head in HEADS if head // GROUP == kv_head]
        logits = (queries[own].reshape(-1, HEAD_DIM) @ keys[kv_head].T).float().mul_(1 / math.sqrt(HEAD_DIM))
        logits = logits.view(len(own), WINDOW, tokens)
        logits[:, :, evictable:].masked_fill_(future, -math.inf)
        sums = logits.softmax(-1)[:, :, :evictable].sum(1)
        pooled = torch.nn.functional.avg_pool1d(sums, POOL, 1, POOL // 2).sum(0)
        total = pooled if total is None else total + pooled
    return keep(keys, values, total)


def keep(keys, values, scores):
    """The rows of the best tokens and of the window."""
    best = scores.topk(CAPACITY - WINDOW).indices.sort().values
    rows = torch.cat([best, torch.arange(len(scores), keys.shape[1])])
    return keys.index_select(1, rows), values.index_select(1, rows)


class Kvpress:
    """SnapKVPress on our tensors: the queries are its module's hidden states, which it neither projects nor rotates."""

    def __init__(self, tokens, queries):
        from kvpress import SnapKVPress

        self.press = SnapKVPress(window_size=WINDOW, kernel_size=POOL, compression_ratio=1 - (CAPACITY + 0.5) / tokens)
        self.hidden = torch.zeros(1, tokens, QUERY_HEADS * HEAD_DIM, dtype=queries.dtype)
        self.hidden[0, -WINDOW:] = queries.transpose(0, 1).reshape(WINDOW, -1)
        ones = torch.ones(1, tokens, HEAD_DIM, dtype=queries.dtype)
        self.kwargs = {"position_embeddings": (ones, torch.zeros_like(ones))}
        config = types.SimpleNamespace(num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS,
                                       num_hidden_layers=1, _attn_implementation="sdpa")
        self.module = types.SimpleNamespace(config=config, head_dim=HEAD_DIM, layer_idx=0, q_proj=lambda x: x)

    def __call__(self, keys, values):
        return self.press.compress(self.module, self.hidden, keys[None], values[None], None, self.kwargs)


class Bench:
    def __init__(self, arguments):
        self.library = Library(arguments.library)
        self.pairs = arguments.pairs
        self.results = []
        self.cache_bytes = last_level_cache()
        self.rings = {}
        self.threads = 1

    def ring(self, type_name, tokens=TOKENS):
        if (type_name, tokens) not in self.rings:
            self.rings.clear()  # two may not fit
            self.rings[type_name, tokens] = Ring(type_name, tokens, self.cache_bytes)
        return self.rings[type_name, tokens]

    def compare(self, what, goal, theirs, ours, at_most=False):
        """`theirs` and `ours`, which say how long they took, in turn; two warm rounds before; the ratio of their times."""
        times = []
        for i in range(self.pairs + 2):
            pair = []
            # Who goes first takes turns as well.
            for call in (theirs, ours) if i % 2 else (ours, theirs):
                if self.threads > 1:
                    time.sleep(0.02)  # idle threads of the other side's OpenMP spin for some milliseconds
                pair.append(call())
            times.append(pair if i % 2 else pair[::-1])
        times = times[2:]
        low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
        their_ms, our_ms = (1e3 * statistics.median(t[side] for t in times) for side in (0, 1))
        self.record(what, goal, middle, f"({low:.2f}-{high:.2f})  ", f"  {their_ms:9.3f}  {our_ms:9.3f}", at_most,
                    quartiles=[low, high], theirs_ms=their_ms, ours_ms=our_ms)

    def record(self, what, goal, ratio, quartiles_text, times_text, at_most, **more):
        """A row of the table, and of the JSON."""
        good = goal is None or (ratio <= goal if at_most else ratio >= goal)
        self.results.append({"what": what, "threads": self.threads, "goal": goal, "at_most": at_most, "ratio": ratio, **more,
                             "pass": good})
        sign = "  " if goal is None else "<=" if at_most else ">="
        verdict = "" if goal is None else "pass" if good else "short"
        digits = 2 if ratio >= 0.01 else 4
        print(f"{what:72} {self.threads}  {ratio:8.{digits}f}  {quartiles_text}{sign} {goal or '':<5} {verdict:5}{times_text}",
              flush=True)

    def compress_call(self, ring, layer):
        def work(keys, values):
            rows = self.library.compress(layer, keys.data_ptr(), values.data_ptr(), ring.queries.data_ptr())
            assert rows == CAPACITY

        return self.ours(ring, work)

    def layer(self, type_name, tokens=TOKENS, method="compresskv"):
        return self.library.layer(method, type_name, tokens, self.threads)

    def wake(self):
        """Wakes the library's threads: those of an engine are awake at the end of a prefill."""
        self.library.flops(2e8, 0, self.threads)

    def ours(self, ring, work):
        return cold(ring, work, self.wake)

    def compress(self, type_name, goal, note=""):
        ring, layer = self.ring(type_name), self.layer(type_name)
        sides = (("plain", plain_torch, goal), ("tuned", tuned_torch, None))
        if not self.results:  # later the ring's layers are no longer alike
            for _, torch_side, _ in sides:
                self.check_same(ring, layer, torch_side)
        for name, torch_side, wanted in sides:
            self.compare(f"compress(), {type_name}{note}, against {name} PyTorch", wanted,
                         theirs(ring, lambda keys, values, side=torch_side: side(keys, values, ring.queries)),
                         self.compress_call(ring, layer))
        what = f"memory of the compressor, {type_name}, against the model's cache"
        if not note and all(result["what"] != what for result in self.results):
            self.record(what, 0.01, self.library.extra_memory(layer), f"{'':13}  ", "", at_most=True)
        self.library.free(layer)

    def check_same(self, ring, layer, torch_side):
        """Both keep the same rows, but for ties in the last bits."""
        keys, values = (t.clone() for t in ring.layers[0])
        wanted, _ = torch_side(keys, values, ring.queries)
        self.library.compress(layer, keys.data_ptr(), values.data_ptr(), ring.queries.data_ptr())
        same = (keys[:, :CAPACITY] == wanted).all(-1).float().mean().item()
        if same < 0.99:
            sys.exit(f"peers: only {same:.0%} of the rows are those that PyTorch keeps")

    def snapkv(self):
        ring, layer = self.ring("bfloat16"), self.layer("bfloat16", method="snapkv")
        self.compare("SnapKV compress(), bfloat16, against kvpress SnapKVPress", 10,
                     theirs(ring, Kvpress(TOKENS, ring.queries)), self.compress_call(ring, layer))
        self.library.free(layer)

    def bound(self, type_name):
        """The kernel beside the longer of: reading the keys, and the arithmetic; all three in turn."""
        ring, layer = self.ring(type_name), self.layer(type_name)
        kv_heads = sorted({head // GROUP for head in HEADS})
        flops = 2.0 * len(HEADS) * WINDOW * TOKENS * HEAD_DIM
        read, spent = [], []

        def attention(keys, values):
            self.library.attention(layer, keys.data_ptr(), values.data_ptr(), ring.queries.data_ptr())

        def bound():
            keys, _ = ring.next()
            self.wake()
            pieces = (ctypes.c_void_p * len(kv_heads))(*(keys[h].data_ptr() for h in kv_heads))
            size = keys[0].numel() * keys.element_size()
            read.append(timed(lambda: self.library.read(pieces, len(kv_heads), size, self.threads)))
            spent.append(timed(lambda: self.library.flops(flops, int(type_name == "bfloat16"), self.threads)))
            return max(read[-1], spent[-1])

        self.compare(f"window attention, {type_name}: its bound / its time", 0.6, bound,
                     self.ours(ring, attention))
        size = len(kv_heads) * TOKENS * HEAD_DIM * TYPES[type_name][1].itemsize
        self.results[-1]["read_bytes_per_s"] = size / statistics.median(read)
        self.results[-1]["flops_per_s"] = flops / statistics.median(spent)
        self.library.free(layer)

    def moves(self, type_name):
        ring, layer = self.ring(type_name), self.layer(type_name)

        def side(raw):
            return self.ours(ring, lambda keys, values: self.library.moves(
                layer, keys.data_ptr(), values.data_ptr(), raw))

        self.compare(f"row moves, {type_name}, against memcpy of each row", 0.9, side(1), side(0))
        self.library.free(layer)

    def view(self, type_name):
        ring, layer = self.ring(type_name), self.layer(type_name)

        def side(view):
            return self.ours(ring, lambda keys, values: self.library.logits(
                layer, keys.data_ptr(), values.data_ptr(), ring.queries.data_ptr(), view))

        self.compare(f"logits through a view, {type_name}, against a pointer and a stride", 0.95, side(0), side(1))
        self.library.free(layer)

    def decode(self, type_name):
        ring, layer = self.ring(type_name), self.layer(type_name)
        query = torch.ones(QUERY_HEADS, HEAD_DIM)

        def side(rows):
            return self.ours(ring, lambda keys, values: self.library.decode(
                layer, keys.data_ptr(), values.data_ptr(), query.data_ptr(), rows))

        self.compare(f"decode attention, {type_name}: full cache / {SHARE:.0%} of it", 20, side(TOKENS),
                     side(round(SHARE * TOKENS)))
        self.library.free(layer)

    def growth(self, type_name):
        """Both lengths live at once, so their rings are short: even one layer is larger than the caches."""
        layers = [self.layer(type_name, tokens) for tokens in (LONG, TOKENS)]
        rings = [Ring(type_name, tokens, 0) for tokens in (LONG, TOKENS)]
        self.compare(f"compress(), {type_name}: {LONG} tokens / {TOKENS}", 4.3,
                     *map(self.compress_call, rings, layers), at_most=True)
        for layer in layers:
            self.library.free(layer)


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cold(ring, work, wake):
    """A call that says how long `work(keys, values)` takes on the layer that was used longest ago, after `wake()`."""

    def call():
        keys, values = ring.next()
        wake()
        return timed(lambda: work(keys, values))

    return call


def theirs(ring, work):
    """Like `cold`, with PyTorch's threads awake."""
    ones = torch.ones(1 << 20)
    return cold(ring, work, lambda: [ones.sum() for _ in range(10)])


def last_level_cache():
    sizes = []
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=32 << 20)


def cpu():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=pathlib.Path, required=True, help="the shared library of peers.cpp")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, each a table of its own: 1,2")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--out", type=pathlib.Path, help="results as JSON")
    arguments = parser.parse_args()

    bench = Bench(arguments)
    fastest = bench.library.code_path().decode()
    print(f"{cpu()}, code path {fastest}, torch {torch.__version__}, last-level cache {bench.cache_bytes >> 20} MiB")
    print(f"{TOKENS} tokens, {KV_HEADS} KV heads, head dimension {HEAD_DIM}, heads {HEADS}, window {WINDOW}, "
          f"capacity {CAPACITY}; medians of {bench.pairs} pairs, quartiles\n")
    print(f"{'what':72} threads  ratio  (quartiles)   goal          theirs ms    ours ms")
    for bench.threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(bench.threads)
        for type_name in TYPES:
            dots = type_name == "bfloat16" and fastest == "avx512_bf16"
            bench.compress(type_name, 15 if dots else 7)
            if dots:
                bench.library.force(b"avx512")
                bench.compress("bfloat16", 7, " without its instructions")
                bench.library.force(fastest.encode())
            bench.bound(type_name)
            bench.decode(type_name)
            if bench.threads == 1:
                bench.moves(type_name)
                bench.view(type_name)
        bench.snapkv()
        bench.rings.clear()
        bench.growth("bfloat16")
    if arguments.out:
        arguments.out.write_text(json.dumps({"cpu": cpu(), "code_path": fastest, "torch": torch.__version__,
                                             "tokens": TOKENS, "results": bench.results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
