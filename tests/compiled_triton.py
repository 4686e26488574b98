"""Compiles what `qvlm_hf.ops.gpu` would launch, for devices that are not there; run as a program,
prints JSON.

A driver that only names its target takes the place of the CUDA driver, and every launch becomes a
compilation (`JITFunction.warmup`): signature, alignment and sizes are those of a real call.
Registers come from the machine code, instructions from its disassembly.
"""

import collections
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from qvlm_hf.ops import gpu, triton_kernels
from qvlm_hf.ops.call import CallScheme, Packed

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[\dT]+ )?\s*([A-Z0-9]+)", re.MULTILINE)


class NamedTarget(DriverBase):
    """A driver that knows for what to compile, and nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError


@contextlib.contextmanager
def compiling(capability):
    """Launches compile for `capability` instead; yields {name: CompiledKernel} of those that there
    were.
    """
    kernels = {}

    def compile_only(self, grid):
        def launch(*args, **kwargs):
            kernels[self.__name__] = self.warmup(*args, grid=grid, **kwargs)

        return launch

    triton.runtime.driver.set_active(NamedTarget(capability))
    original, JITFunction.__getitem__ = JITFunction.__getitem__, compile_only
    try:
        yield kernels
    finally:
        JITFunction.__getitem__ = original


def compiled(
    capability,
    weight_bits,
    activation_bits,
    granularity,
    tokens,
    out_features=4096,
    in_features=4096,
    group_length=128,
    dtype="bfloat16",
    modules=1,
):
    """The kernels of one call, {name: CompiledKernel}."""
    groups, words = -(-in_features // group_length), -(-in_features * weight_bits // 32)
    statics = {"channel": in_features, "token": tokens}.get(granularity)
    grid = (None, None)
    if statics is not None:
        grid = torch.empty(statics), torch.empty(statics, dtype=torch.int32)
    packed = Packed(
        torch.empty(out_features, words, dtype=torch.int32),
        torch.empty(out_features, groups, dtype=torch.bfloat16),
        torch.empty(out_features, groups, dtype=torch.uint8),
        None,
    )
    x = torch.empty(tokens, in_features, dtype=getattr(torch, dtype))
    numbers = (in_features, weight_bits, activation_bits, group_length, granularity, 0)
    with compiling(capability) as kernels:
        device = gpu.Device(divmod(capability, 10), PROCESSORS[capability])
        gpu.compute(triton_kernels, device, x, [packed] * modules, CallScheme(*grid, *numbers))
    return kernels


def facts(kernel):
    """What the machine code says of itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([TOOLS / "cuobjdump", "-res-usage", file.name]).stdout
        code = run([TOOLS / "nvdisasm", "-c", file.name]).stdout
    count = collections.Counter(_INSTRUCTION.findall(code))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "divisions": sorted(set(re.findall(r"\bdiv\.[a-z.]+f32", kernel.asm["ptx"]))),
        "instructions": dict(count.most_common()),
    }


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    calls = [compiled(*case) for case in cases]
    print(
        json.dumps([{name: facts(kernel) for name, kernel in kernels.items()} for kernels in calls])
    )
