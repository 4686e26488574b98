"""Fills Triton's cache before anything is timed: every variant that the other programs launch.

    python tests/gpu/precompile.py --capability 90 --processes 14

Processes compile side by side and none has a CUDA context. Prints how many calls were compiled, how
long it took, and what does not compile.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from compiled_triton import compiled

from qvlm_hf.ops import gpu

SCHEMES = (
    (4, 4, "channel"),
    (4, 8, "dynamic_token"),
    (8, 8, "dynamic_token"),
    (4, 16, "none"),
    (6, 6, "channel"),
)
# out_features, in_features, modules of one launch: LLaVA-1.5-7B's decoder, head and vision encoder
SHAPES = (
    (4096, 4096, 3),
    (4096, 4096, 1),
    (11008, 4096, 2),
    (11008, 4096, 1),
    (4096, 11008, 1),
    (32064, 4096, 1),
    (1024, 1024, 3),
    (1024, 1024, 1),
    (4096, 1024, 1),
    (1024, 4096, 1),
)
TOKENS = (1, 16, 64, 577, 608)
TILES = [
    *itertools.product((16,), (32, 64, 128), (2, 4, 8), (3, 4, 5)),
    *itertools.product((64,), (64, 128), (4, 8), (3, 4)),
    *itertools.product((128,), (64, 128), (4, 8), (2, 3, 4)),
]


def work(job: tuple) -> str | None:
    """Compiles one call; what went wrong, or None."""
    capability, tile, case = job
    table = gpu.TILES if tile is None else {(8, 0): {tile[0]: tile[1:]}}
    gpu._plan.cache_clear()
    try:
        with patch.object(gpu, "TILES", table):
            compiled(capability, *case)
    except Exception as error:  # one variant must not end the rest
        return f"{tile} {case}: {type(error).__name__} {str(error)[:80]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--every", type=int, default=1, help="compile every so manieth call only")
    options = parser.parse_args()
    start = time.monotonic()
    calls = [
        (*scheme, tokens, n, k, 128, "bfloat16", modules)
        for tokens in TOKENS
        for (n, k, modules) in SHAPES
        for scheme in SCHEMES
    ]
    jobs = [(options.capability, None, case) for case in calls]
    for tile in TILES:
        tokens = 1 if tile[0] == 16 else tile[0] if tile[0] == 64 else 608
        jobs += [
            (options.capability, tile, (*scheme, tokens, n, 4096))
            for scheme in SCHEMES[:3]
            for n in (4096, 11008)
        ]
    jobs = jobs[:: options.every]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        wrong = [one for one in pool.imap_unordered(work, jobs, chunksize=4) if one]
    print(f"{len(jobs)} calls compiled in {time.monotonic() - start:.0f} s; {len(wrong)} failed")
    for one in wrong[:10]:
        print("   ", one)


if __name__ == "__main__":
    main()
