#!/usr/bin/env python3
"""Writes tests/data/dequantise.json: random blocks of every tensor type and the floats that PyPI `gguf` decodes.

The test engine/dequantise_test.cpp holds the engine's decoders against it, bit for bit.

    pip install gguf numpy
    tools/check_dequantise.py [--blocks 3] [--seed 1]
"""

import argparse
import json
import pathlib

import gguf
import numpy as np

TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split()

# Where a block keeps its half-precision scales. They are drawn as numbers, since random bits would often be NaN, which
# has many bit patterns; everything else is random bits.
HALVES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_halves(rng: np.random.Generator, count: int) -> np.ndarray:
    """Finite halves over the whole range, zero and subnormal ones among them."""
    values = rng.standard_normal(count) * 10.0 ** rng.integers(-7, 4, count)
    return values.astype(np.float16)


def random_blocks(rng: np.random.Generator, name: str, count: int) -> np.ndarray:
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    if name in ("F16", "F32"):
        values = random_halves(rng, 32 * count).astype(np.float16 if name == "F16" else np.float32)
        return values.view(np.uint8).reshape(-1, size)
    if name == "BF16":
        values = random_halves(rng, 32 * count).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1, size)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = random_halves(rng, count).view(np.uint8).reshape(count, 2)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each quantised type")
    parser.add_argument("--seed", type=int, default=1)
    default_out = pathlib.Path(__file__).resolve().parent.parent / "tests/data/dequantise.json"
    parser.add_argument("--out", type=pathlib.Path, default=default_out)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    rows = []
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        blocks = random_blocks(rng, name, args.blocks)
        floats = gguf.quants.dequantize(blocks.reshape(-1), kind).astype(np.float32).reshape(-1)
        row = {"type": name, "code": int(kind), "bytes": blocks.tobytes().hex(), "floats": floats.tobytes().hex()}
        rows.append(json.dumps(row))
    head = json.dumps(f"tools/check_dequantise.py --blocks {args.blocks} --seed {args.seed}")
    args.out.write_text('{"made_by": ' + head + ',\n "types": [\n' + ",\n".join(rows) + "\n]}\n")
    print(f"wrote {args.out}: {len(rows)} types")


if __name__ == "__main__":
    main()
