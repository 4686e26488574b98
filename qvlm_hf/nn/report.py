"""What really runs: one row per linear module, quantized or not, and the choice of the kernels behind the quantized ones."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

from torch import nn

from qvlm_hf.nn.fused import FusedRMSNorm
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["BACKENDS", "PrecisionRow", "format_precision_table", "precision_table", "set_backend"]

BACKENDS = ("auto", "reference")  # "auto" takes the fastest kernel that fits


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """One linear module.

    Attributes:
        module: its name in the model.
        weight_bits: bits of a weight; those of its dtype in full precision.
        activation_bits: bits of an input value; 16 where a quantized module leaves the input alone,
            those of the dtype in full precision.
        granularity: of the quantized input, "none" for a floating point one.
        kernel: what computes it: a kernel's name, "reference" (with the reason, unless it was asked
            for), or "torch" and the dtype in full precision.
    """

    module: str
    weight_bits: int
    activation_bits: int
    granularity: str
    kernel: str

    def __str__(self) -> str:
        return f"{self.module}: W{self.weight_bits}A{self.activation_bits} {self.granularity} ({self.kernel})"


def precision_table(model: nn.Module) -> list[PrecisionRow]:
    """What computes each linear module of `model`, in model order; `format_precision_table` prints it.

    Behind them stands a row per part that is left to Transformers because it is not the one that
    this version knows (norms, key-value cache, attention); there is none where all is known.
    """
    named = list(model.named_modules())
    rows = [_row(name, module) for name, module in named if isinstance(module, nn.Linear)]
    aside = [part for _, module in named for part in vars(module).get("stepped_aside", ())]
    return rows + [
        PrecisionRow(
            module=part.part,
            weight_bits=16,
            activation_bits=16,
            granularity="none",
            kernel=f"transformers ({part.reason})",
        )
        for part in aside
    ]


def format_precision_table(rows: Iterable[PrecisionRow]) -> str:
    """The rows as text: a line of headings, then a line per row, in columns."""
    table = [
        tuple(field.name for field in fields(PrecisionRow)),
        *(tuple(map(str, astuple(row))) for row in rows),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def set_backend(model: nn.Module, name: str) -> None:
    """Chooses the kernels of every quantized module of `model`, and of its fused norms; saved files do not depend on it.

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
        scheme = module.scheme
        weight_bits, activation_bits, granularity = (
            scheme.weight_bits,
            scheme.activation_bits,
            scheme.granularity,
        )
        return PrecisionRow(
            module=name,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            granularity=granularity,
            kernel=module.kernel,
        )
    bits = 8 * module.weight.dtype.itemsize
    kernel = f"torch {str(module.weight.dtype).removeprefix('torch.')}"
    return PrecisionRow(
        module=name, weight_bits=bits, activation_bits=bits, granularity="none", kernel=kernel
    )
