#!/usr/bin/env python3
"""Times the engine's prefill beside transformers' in float32, on the same GGUF file, ids and number of threads.

The two take turns, so that a busy moment of the machine hits both; medians are compared. transformers computes the
logits of the last token alone, as the engine does, and fills its cache.

    pip install torch transformers gguf numpy
    cmake --build build --target engine_probe
    bible -f Gen1:1-6:22 > text.txt
    tools/bench_prefill.py --model M.gguf --text text.txt --probe build/examples/engine/engine_probe
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--probe", type=pathlib.Path, required=True, help="the built engine_probe")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.3, help="fail above this ratio")
    args = parser.parse_args()

    folder, name = str(args.model.resolve().parent), args.model.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    ids = tokenizer(args.text.read_text())["input_ids"][: args.tokens]
    if len(ids) < args.tokens:
        sys.exit(f"{args.text} gives {len(ids)} tokens, {args.tokens} are needed")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    batch = torch.tensor([ids])
    print(f"{len(ids)} tokens, load average {os.getloadavg()[0]:.2f}, torch {torch.__version__}")

    too_slow = False
    with tempfile.TemporaryDirectory() as temporary:
        ids_file = pathlib.Path(temporary) / "ids.txt"
        ids_file.write_text(" ".join(map(str, ids)))
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours, theirs = [], []
            for turn in range(args.rounds + 1):
                command = [args.probe, "prefill", args.model, ids_file, str(threads), "1"]
                engine = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                start = time.perf_counter()
                with torch.no_grad():
                    model(batch, use_cache=True, logits_to_keep=1)
                other = 1000 * (time.perf_counter() - start)
                if turn > 0:  # the first turn warms both up
                    ours.append(engine)
                    theirs.append(other)
            ratio = statistics.median(ours) / statistics.median(theirs)
            too_slow = too_slow or ratio > args.limit
            print(f"{threads} thread{'s' if threads > 1 else ''}: engine {statistics.median(ours):.0f} ms "
                  f"({min(ours):.0f} to {max(ours):.0f}), transformers {statistics.median(theirs):.0f} ms "
                  f"({min(theirs):.0f} to {max(theirs):.0f}), ratio {ratio:.2f}")
    if too_slow:
        sys.exit(f"the engine takes more than {args.limit} times as long")


if __name__ == "__main__":
    main()
