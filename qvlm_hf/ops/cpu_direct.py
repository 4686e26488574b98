"""Functions that go from Python straight to the CPU kernels, without PyTorch's dispatcher: cpu_direct.cpp, put here by `cpu_operator.load`.

`linears`, `rms_norm` and `decode_attention` take the arguments of the operators of these names and
return what they do, or None for a call that is not an ordinary one: a gradient is recorded, a mode
or a transformation follows single operators, a tensor is anything but a plain one in the CPU's
memory, or the kernels are not there. They must not meet torch.compile, whose graph would break at
them.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["decode_attention", "linears", "rms_norm", "trial_attention", "use"]


def _nothing(*_: object) -> None:
    """Until they are loaded."""


use: Callable[[str, int], None] = _nothing  # name of a kernel, and where it begins
decode_attention: Callable[..., Any] = _nothing
trial_attention: Callable[..., Any] = _nothing  # the same by a kernel that is not checked yet
linears: Callable[..., Any] = _nothing
rms_norm: Callable[..., Any] = _nothing
