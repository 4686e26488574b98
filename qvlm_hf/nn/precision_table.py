"""The precision table: what computes each linear module; and the choice of its kernels."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

from torch import nn

from qvlm_hf.nn.fused import FusedRMSNorm
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["BACKENDS", "PrecisionRow", "format_precision_table", "precision_table", "set_backend"]

BACKENDS = ("auto", "reference")  # "auto" takes the fastest kernel that fits


@dataclass(frozen=True)
class PrecisionRow:
    """One linear module.

    Attributes:
        module: its name in the model.
        weight_bits: bits of a weight.
        activation_bits: bits of an input value; 16 where a quantized module leaves the input alone.
        granularity: of the quantized input, "none" for a floating point one.
        kernel: a kernel's name, "reference" (with the reason, unless it was asked for), or "torch"
            and the dtype in full precision.
    """

    module: str
    weight_bits: int
    activation_bits: int
    granularity: str
    kernel: str

    def __str__(self) -> str:
        bits = f"W{self.weight_bits}A{self.activation_bits}"
        return f"{self.module}: {bits} {self.granularity} ({self.kernel})"


def precision_table(model: nn.Module) -> list[PrecisionRow]:
    """Tells what computes each linear module of `model`, in model order.

    Below stands a row per part (norms, key-value cache, attention) that is left to Transformers
    because it is not the one that this version knows. `format_precision_table` prints the rows.
    """
    named = list(model.named_modules())
    rows = [_row(name, module) for name, module in named if isinstance(module, nn.Linear)]
    aside = [part for _, module in named for part in vars(module).get("stepped_aside", ())]
    return rows + [
        PrecisionRow(part.part, 16, 16, "none", f"transformers ({part.reason})") for part in aside
    ]


def format_precision_table(rows: Iterable[PrecisionRow]) -> str:
    """Formats the rows as text: a line of headings, then a line per row, in columns."""
    table = [tuple(field.name for field in fields(PrecisionRow))]
    table += [tuple(map(str, astuple(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def set_backend(model: nn.Module, name: str) -> None:
    """Chooses the kernels of every quantized module and fused norm; files do not depend on it.

    Args:
        model: holds quantized modules.
        name: "auto" (the fastest that fits) or "reference" (plain PyTorch, what every kernel is
            tested against).

    Raises:
        ValueError: there is no such backend, or nothing in `model` is quantized.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"backend {name!r} does not exist: this version has {', '.join(BACKENDS)}."
        )
    if next(quantized_modules(model), None) is None:
        raise ValueError("set_backend needs a quantized model: nothing in this one is quantized.")
    for module in model.modules():
        if isinstance(module, QVLMLinear | FusedRMSNorm):
            module.reference = name == "reference"


def _row(name: str, module: nn.Linear) -> PrecisionRow:
    if isinstance(module, QVLMLinear):
        s = module.scheme
        return PrecisionRow(name, s.weight_bits, s.activation_bits, s.granularity, module.kernel)
    dtype = module.weight.dtype
    bits = 8 * dtype.itemsize
    return PrecisionRow(name, bits, bits, "none", f"torch {str(dtype).removeprefix('torch.')}")
