"""Tries tiles of `multiply` on this device and prints a measured row for `gpu.TILES`.

    python tests/gpu/tune_tiles.py --minutes 8

For each number of tokens of a tile: sizes, numbers of warps and of stages, in a random order, as
many as its share of the minutes allows, over W4A4, W4A8 and W8A8 layers with 4096 inputs; the score
is the geometric mean of the times over those of the table. Weights rotate past the L2 cache, one
CUDA graph per time. Every try is a line of JSON at once, in --output.
"""

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path
from unittest.mock import patch

import torch
from bench_kernels import DEVICE, captured, milliseconds, ours

from qvlm_hf.ops import gpu

SCHEMES = (("W4A4", "channel"), ("W4A8", "dynamic_token"), ("W8A8", "channel"))
TOKENS = {16: 1, 32: 32, 64: 64, 128: 608}  # tokens of a tile -> tokens that it is timed at


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="after which no further tile is tried"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="on a CPU; its times mean nothing")
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.dry:
        parser.error("needs a CUDA device: PyTorch finds none")
    deadline = time.monotonic() + 60 * options.minutes
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
    k, outputs = (256, (256,)) if options.dry else (4096, (4096, 11008))
    ways = [
        ours(torch.empty(n, k, device="meta"), bits, granularity, 128)
        for bits, granularity in SCHEMES
        for n in outputs
    ]
    row = {}
    for done, (tile_tokens, tokens) in enumerate(TOKENS.items()):
        share = time.monotonic() + (deadline - time.monotonic()) / (len(TOKENS) - done)
        x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)

        def taken(table, x=x):
            gpu._plan.cache_clear()  # plans hold tiles
            with patch.object(gpu, "TILES", table):
                runs = [captured(way, x)[0] for way in ways]
                return [sorted(milliseconds(run) for _ in range(9))[4] for run in runs]

        base, best = taken(gpu.TILES), (1.0, None)
        sizes = list(itertools.product((32, 64, 128, 256), (4, 8), (2, 3, 4, 5)))
        random.Random(0).shuffle(sizes)
        for tried, (out_features, warps, stages) in enumerate(sizes):
            if time.monotonic() > share:
                print(
                    f"{tile_tokens:4d} out of time: {len(sizes) - tried} of {len(sizes)} were not "
                    f"tried",
                    flush=True,
                )
                break
            try:
                times = taken({capability: {tile_tokens: (out_features, warps, stages)}})
            except Exception as error:  # too much shared memory, mostly
                print(f"{tile_tokens:4d} {(out_features, warps, stages)}  {type(error).__name__}")
                continue
            score = math.exp(
                sum(math.log(b / t) for b, t in zip(base, times, strict=True)) / len(times)
            )
            print(
                f"{tile_tokens:4d} {(out_features, warps, stages)!s:14s} x{score:.3f}  "
                f"{' '.join(f'{t * 1e3:.1f}' for t in times)} us",
                flush=True,
            )
            tried_row = {
                "tokens": tile_tokens,
                "tile": (out_features, warps, stages),
                "score": score,
            }
            with options.output.open("a") as file:
                file.write(json.dumps(tried_row | {"milliseconds": times}) + "\n")
            best = max(best, (score, (out_features, warps, stages)), key=lambda pair: pair[0])
        row[tile_tokens] = best[1] or gpu.TILES[max(c for c in gpu.TILES if c <= capability)].get(
            tile_tokens
        )
        print(
            f"{tile_tokens:4d} best: {best[1] or 'as it is'}, {best[0]:.3f} times as fast as the "
            f"table",
            flush=True,
        )
    print(f"    {capability}: { ({size: tile for size, tile in row.items() if tile}) },")


if __name__ == "__main__":
    main()
