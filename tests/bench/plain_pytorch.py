"""How much slower a layer is in plain PyTorch than by the CPU kernels: `python tests/bench/plain_pytorch.py`, W4A8, in turns, median."""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_calls import arguments, cpu_kernel

import qvlm_hf.ops  # noqa: F401 - registers the operators

OPS = torch.ops.qvlm_hf
WAYS = {"kernels": OPS.linear, "plain PyTorch": OPS.linear_reference}


def main() -> None:
    """Prints milliseconds of both ways and their ratio, for layers of two sizes, one token and 64."""
    print(
        cpu_kernel(4096, 4, 8, 128),
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
    )
    for size, tokens, rounds in ((1024, 1, 40), (4096, 1, 15), (4096, 64, 7)):
        rest = arguments(4, 8, "dynamic_token", size, size, 128, tokens, False, torch.float32)
        x = torch.randn(tokens, size)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name, way in WAYS.items():
                start = time.perf_counter()
                way(x, *rest)
                seconds[name].append(time.perf_counter() - start)
        fast, slow = (statistics.median(seconds[name]) for name in WAYS)
        print(
            f"{size} x {size}, {tokens} tokens: {fast * 1e3:.2f} and {slow * 1e3:.2f} ms, "
            f"{slow / fast:.0f} times"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
