"""Functions that go from Python straight to the CPU kernels, past PyTorch's dispatcher.

`linears`, `rms_norm` and `decode_attention` take the arguments of the operators of these names.
They return None for a call that is not an ordinary one: a gradient is recorded, a mode or a
transformation follows single operators, a tensor is more than plain CPU memory, or there are no
kernels. They must not meet torch.compile, whose graph would break at them.

The functions are csrc/cpu_direct.cpp, compiled and kept like the kernels. Where it cannot be
compiled (no headers of Python), calls take longer, and norms and attention are PyTorch's.
"""

import functools
import logging
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.ops import cpu, native

__all__ = ["decode_attention", "linears", "load", "rms_norm", "trial_attention", "use"]

_SOURCES = native.sources("cpu_direct.cpp", "cpu_call.h", "attention_call.h")
_TORCH = Path(torch.__file__).parent
_INCLUDES = (
    _TORCH / "include",
    _TORCH / "include" / "torch" / "csrc" / "api" / "include",
    Path(sysconfig.get_paths()["include"]),
)
_FLAGS = (
    *("-O2", "-std=c++20", "-shared", "-fPIC"),  # -O1 takes a tenth less, calls 5 % longer
    *(word for path in _INCLUDES for word in ("-isystem", str(path))),
)
_LINKED = ("-L", str(_TORCH / "lib"), "-ltorch_cpu", "-ltorch_python", "-lc10")


def _nothing(*_: object) -> None:
    """Until they are loaded."""


use: Callable[[str, int], None] = _nothing  # name of a kernel, and where it begins
linears: Callable[..., Any] = _nothing
rms_norm: Callable[..., Any] = _nothing
decode_attention: Callable[..., Any] = _nothing
trial_attention: Callable[..., Any] = _nothing  # the same by a kernel that is not checked yet


@functools.cache
def load() -> str | None:
    """Puts the functions in place, once per process; returns why not, or None."""
    with ThreadPoolExecutor(1) as pool:  # they compile side by side
        with suppress(RuntimeError):  # Python is about to end
            pool.submit(native.load, Path, _SOURCES, _FLAGS, _LINKED)
        entries = cpu.entries()
    if entries is None:
        return "there are no kernels"
    try:
        library = native.load(partial(native.module, "cpu_direct"), _SOURCES, _FLAGS, _LINKED)
    except (*native.ERRORS, ImportError) as error:
        remedy = ""
        if "Python.h" in str(error):
            remedy = " (install the headers of Python: python3-dev or the like)"
        logging.getLogger(__name__).warning(
            "quantized layers take longer per call than they need, by 0.1 ms (docs/kernels.md): "
            "%s%s",
            error,
            remedy,
        )
        return str(error)
    for name in ("use", "linears", "rms_norm", "decode_attention", "trial_attention"):
        globals()[name] = getattr(library, name)
    for name, address in entries.items():
        library.use(name, address)
    return None
