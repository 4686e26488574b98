"""One W4A8 layer in plain PyTorch beside the CPU kernels, in turns: milliseconds and their ratio.

python tests/bench/plain_pytorch.py
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_calls import arguments, cpu_kernel

import qvlm_hf.ops  # noqa: F401 - registers the operators
from qvlm_hf.bench.turns import summarize, take_turns

OPS = torch.ops.qvlm_hf
WAYS = {"kernels": OPS.linear, "plain PyTorch": OPS.linear_reference}


def main() -> None:
    """Layers of two sizes, one token and 64."""
    kernel, threads = cpu_kernel(4096, 4, 8, 128), torch.get_num_threads()
    print(kernel, f"{threads} threads", f"torch {torch.__version__}")
    for size, tokens, rounds in ((1024, 1, 40), (4096, 1, 15), (4096, 64, 7)):
        rest = arguments(4, 8, "dynamic_token", size, size, 128, tokens, False, torch.float32)
        x = torch.randn(tokens, size)

        def run(name, _turn, x=x, rest=rest):
            start = time.perf_counter()
            WAYS[name](x, *rest)
            return time.perf_counter() - start

        times = take_turns(WAYS, rounds, run)
        found = summarize(times["kernels"], times["plain PyTorch"])
        fast, slow = found.seconds * 1e3, found.seconds * found.speedup * 1e3
        print(
            f"{size} x {size}, {tokens} tokens: {fast:.2f} and {slow:.2f} ms, "
            f"{found.speedup:.0f} times"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
