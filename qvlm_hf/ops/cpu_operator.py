"""`qvlm_hf::linear` and `linears` on CPUs: registered here, computed by cpu.py, and from the second call on mostly by `cpu_direct.linears`.

What decoding calls again and again need not pass PyTorch's dispatcher: cpu_direct.cpp holds
functions of Python that check their tensors and call the kernels. They are compiled and kept like
these. Where they cannot be (no headers of Python), calls take longer, and norms and attention are
PyTorch's.
"""

import functools
import logging
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.ops import cpu, cpu_direct, native
from qvlm_hf.ops.schema import LIBRARY

__all__ = ["load"]

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("cpu_direct.cpp", "cpu_call.h", "attention_call.h")
)
_TORCH = Path(torch.__file__).parent
_INCLUDES = (
    _TORCH / "include",
    _TORCH / "include" / "torch" / "csrc" / "api" / "include",
    Path(sysconfig.get_paths()["include"]),
)
_FLAGS = (
    "-O2",
    "-std=c++20",
    "-shared",
    "-fPIC",
    *(word for path in _INCLUDES for word in ("-isystem", str(path))),
)
_LINKED = ("-L", str(_TORCH / "lib"), "-ltorch_cpu", "-ltorch_python", "-lc10")
_FUNCTIONS = ("use", "linears", "rms_norm", "decode_attention", "trial_attention")


@functools.cache
def load() -> str | None:
    """Fills `cpu_direct`, once per process; returns why not, or None."""
    with ThreadPoolExecutor(1) as pool:  # they take a minute to compile, and this a third of it
        with suppress(RuntimeError):  # Python is about to end
            pool.submit(native.compiled, _SOURCES, _FLAGS, _LINKED)
        entries = cpu.entries()
    if entries is None:
        return "there are no kernels"
    try:
        library = native.load_module("cpu_direct", _SOURCES, _FLAGS, _LINKED)
    except (OSError, ImportError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        remedy = (
            " (install the headers of Python: python3-dev or the like)"
            if "Python.h" in str(error)
            else ""
        )
        text = "quantized layers take longer per call than they need, by 0.1 ms (docs/kernels.md): %s%s"
        logging.getLogger(__name__).warning(text, error, remedy)
        return str(error)
    for name in _FUNCTIONS:
        setattr(cpu_direct, name, getattr(library, name))
    for name, address in entries.items():
        cpu_direct.use(name, address)
    return None


def _linear(*arguments: Any) -> Any:
    load()
    return cpu.linear(*arguments)


def _linears(*arguments: Any) -> Any:
    load()
    return cpu.linears(*arguments)


LIBRARY.impl("linear", _linear, "CPU")
LIBRARY.impl("linears", _linears, "CPU")
