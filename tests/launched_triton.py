"""Launches of a decoder layer's quantized modules, and what they take of the host, without a GPU.

    python tests/launched_triton.py [repetitions]

Triton compiles for compute capability 9.0, a driver that launches nothing counts. Prints JSON:
launches by kernel for one token of a layer of LLaVA-1.5-7B's shape, and for each of its four calls
the median of the host's microseconds from the operator's arguments to the last launch, prepared
and by Triton's own way. PyTorch's dispatcher (about 10 us), its allocator on a device and the
driver's own launch are not in it.
"""

import collections
import functools
import json
import statistics
import sys
import time
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from compiled_triton import NamedTarget
from linear_calls import arguments, lists

from qvlm_hf.ops import gpu, launches, linear, triton_kernels

CAPABILITY = 90
HIDDEN, MIDDLE = 4096, 11008
CALLS = {
    "q, k, v": (HIDDEN, (HIDDEN, HIDDEN, HIDDEN)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate, up": (HIDDEN, (MIDDLE, MIDDLE)),
    "down": (MIDDLE, (HIDDEN,)),
}


class Counting(NamedTarget):
    """Loads and launches nothing; `launches` counts by kernel."""

    def __init__(self) -> None:
        super().__init__(CAPABILITY)
        self.launches = collections.Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 1, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, source, metadata):
        def launch(*_):
            self.launches[metadata.name] += 1

        return launch


def call(in_features, outputs, scheme=(4, 8, "dynamic_token"), tokens=1):
    """What runs one call of modules that share an input."""
    cases = [arguments(*scheme, n, in_features, 128, tokens, dtype=torch.bfloat16) for n in outputs]
    flat = (torch.randn(1, tokens, in_features).bfloat16(), *lists(*cases))
    device = gpu.Device(divmod(CAPABILITY, 10), 132)
    compute = functools.partial(gpu.compute, triton_kernels, device)
    kernel = linear.Kernel(gpu.misfit, lambda _: ("stub", compute))
    return lambda: linear._compute_many(kernel, *flat)


def microseconds(run, repetitions):
    times = []
    for _ in range(repetitions):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


@torch.no_grad()
def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    driver = Counting()
    triton.runtime.driver.set_active(driver)
    runs = {name: call(*sizes) for name, sizes in CALLS.items()}
    for run in runs.values():
        run()
    driver.launches.clear()
    for run in runs.values():
        run()
    counted = dict(driver.launches)
    taken = {name: round(microseconds(run, repetitions), 1) for name, run in runs.items()}
    with patch.object(launches.Launch, "ready", False):
        slow = {name: round(microseconds(run, repetitions), 1) for name, run in runs.items()}
    print(json.dumps({"launches": counted, "microseconds": taken, "by_triton": slow}))


if __name__ == "__main__":
    main()
