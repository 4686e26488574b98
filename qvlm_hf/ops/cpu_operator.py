"""`qvlm_hf::linear` and `linears` on CPUs: registered here, computed by cpu.py, and from the second call on mostly by `linears_cpu`.

`linears_cpu`, `rms_norm_cpu` and `rotary_cpu` are a short C++ file over PyTorch's stable library interface, compiled and kept like the
kernels. It calls them for what decoding does without running Python: of a decoding step of a model with a billion parameters the Python of
the linear calls took a seventh. Where it cannot be compiled (no compiler, PyTorch before 2.10) calls take longer; norms and rotary
embedding are PyTorch's then.
"""

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.ops import cpu, native
from qvlm_hf.ops.schema import LIBRARY

__all__ = ["load"]

_SOURCES = (Path(__file__).with_name("cpu_operator.cpp"), Path(__file__).with_name("cpu_call.h"))
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-I", str(_TORCH / "include"))
_LINKED = ("-L", str(_TORCH / "lib"), "-ltorch_cpu", "-lc10")


@functools.cache
def load() -> str | None:
    """Makes `linears_cpu`, `rms_norm_cpu` and `rotary_cpu` take calls, once per process; returns why they do not, or None."""
    entries = cpu.entries()
    if entries is None:
        return "there are no kernels"
    try:
        library = native.load(_SOURCES, _FLAGS, _LINKED)
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        logging.getLogger(__name__).info("calls of the CPU kernels go through Python: %s", error)
        return str(error)
    library.qvlm_use.argtypes, library.qvlm_use.restype = [ctypes.c_void_p] * len(entries), None
    library.qvlm_use(*entries)
    return None


def _linear(*arguments: Any) -> Any:  # noqa: ANN401 - the schema's arguments
    load()
    return cpu.linear(*arguments)


def _linears(*arguments: Any) -> Any:  # noqa: ANN401 - the schema's arguments
    load()
    return cpu.linears(*arguments)


LIBRARY.impl("linear", _linear, "CPU")
LIBRARY.impl("linears", _linears, "CPU")
