#!/usr/bin/env python3
"""Holds the engine's logits against transformers, which loads the same GGUF file in float32.

Both get the same token ids. Fails when a logit differs by more than 1e-2, or when the most likely token is the same at
fewer than 99.9 % of the positions. With --write it also records some logits, which the test engine/model_test.cpp
checks.

    pip install torch transformers gguf numpy
    cmake --build build --target engine_probe
    bible -f Gen1:1-6:22 > text.txt            # Debian's bible-kjv, or any text of some 10 KB
    tools/compare_logits.py --model M.gguf --text text.txt --probe build/examples/engine/engine_probe [--write FILE]
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LARGEST_DIFFERENCE = 1e-2
SAME_TOP = 0.999

# The recorded test: so many tokens, of which so many are the prompt and the rest are decoded one by one.
RECORDED_TOKENS = 400
RECORDED_PROMPT = 390
RECORDED_POSITIONS = [0, 1, 7, 63, 64, 100, 128, 200, 255, 256, 300, 388, 389, 390, 391, 399]


def engine_logits(probe: pathlib.Path, model: pathlib.Path, ids: list[int], threads: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        ids_file = pathlib.Path(folder) / "ids.txt"
        out_file = pathlib.Path(folder) / "logits.f32"
        ids_file.write_text(" ".join(map(str, ids)))
        subprocess.run([probe, "logits", model, ids_file, out_file, str(threads)], check=True)
        return np.fromfile(out_file, np.float32).reshape(len(ids), -1)


def reference_logits(model: AutoModelForCausalLM, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def record(path: pathlib.Path, model: AutoModelForCausalLM, ids: list[int]) -> None:
    ids = ids[:RECORDED_TOKENS]
    logits = reference_logits(model, ids)
    rng = np.random.default_rng(1)
    rows = []
    for position in RECORDED_POSITIONS:
        top = np.argsort(-logits[position], kind="stable")[:8]
        others = rng.integers(0, logits.shape[1], 8)
        chosen = np.concatenate([top, others])
        values = [round(float(logits[position][i]), 5) for i in chosen]
        rows.append(json.dumps({"position": position, "ids": chosen.tolist(), "logits": values}))
    head = {
        "made_by": "tools/compare_logits.py --write",
        "reference": "transformers, float32",
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "prompt": RECORDED_PROMPT,
        "tokens": ids,
    }
    path.write_text(json.dumps(head)[:-1] + ',\n"positions": [\n' + ",\n".join(rows) + "\n]}\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--probe", type=pathlib.Path, required=True, help="the built engine_probe")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=pathlib.Path, help="record logits for the test here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    folder, name = str(args.model.resolve().parent), args.model.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    ids = tokenizer(args.text.read_text())["input_ids"][: args.tokens]
    if len(ids) < args.tokens:
        sys.exit(f"{args.text} gives {len(ids)} tokens, {args.tokens} are needed")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()

    expected = reference_logits(model, ids)
    found = engine_logits(args.probe, args.model, ids, args.threads)
    difference = np.abs(found - expected).max(axis=1)
    same = (found.argmax(axis=1) == expected.argmax(axis=1)).mean()
    worst = int(difference.argmax())
    print(f"{len(ids)} positions: largest difference {difference[worst]:.2e} at position {worst}, "
          f"median of the positions' largest {np.median(difference):.2e}, same most likely token at {100 * same:.2f} %")
    if args.write:
        record(args.write, model, ids)
    if difference[worst] > LARGEST_DIFFERENCE or same < SAME_TOP:
        sys.exit(f"too far apart: at most {LARGEST_DIFFERENCE} and at least {100 * SAME_TOP} % are asked for")


if __name__ == "__main__":
    main()
