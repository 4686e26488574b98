"""What a quantized model computes faster in inference; saved files do not change.

Forward passes of attention, MLP and decoder layers stay Transformers' own. Linear modules that read
one input share an operator (nn/siblings.py). Besides, three parts plug into Transformers:

    norms.py            RMSNorm as one operator, whatever a family calls it
    attention.py        attention of one token, as an attention function
    growing_cache.py    a key-value cache that grows in place

A part is a module with a NAME, a probe `difference`, `plug_in` and `take_back`. A part whose probe
finds Transformers changed is left to Transformers: `precision_table` and a warning say so. A
forward pass that somebody else put on a module (accelerate, `kernelize`) goes first, as usual.
"""

import warnings
from types import ModuleType
from typing import Any

import transformers

from qvlm_hf.hf.runtime import attention, growing_cache, norms
from qvlm_hf.models.families import has_row
from qvlm_hf.models.graph import shared_inputs
from qvlm_hf.nn.fused import SteppedAside
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.nn.siblings import share_inputs

__all__ = ["PARTS", "fuse", "leave_to_transformers", "unfuse"]

PARTS = (norms, growing_cache, attention)


def fuse(model: Any) -> None:
    """Prepares a quantized model, on its devices; leaves one of a family without a row alone."""
    if next(quantized_modules(model), None) is None or not has_row(model):
        return
    share_inputs(shared_inputs(model))
    reasons = {part.NAME: _difference(part, model) for part in PARTS}
    if (unknown := reasons[attention.NAME]) is not None:
        reasons[growing_cache.NAME] = unknown  # who knows what such attention does with a cache
    for part in PARTS:
        (part.plug_in if reasons[part.NAME] is None else part.take_back)(model)
    _step_aside(model, {name: reason for name, reason in reasons.items() if reason is not None})


def unfuse(model: Any) -> None:
    """Takes every part back, and leaves siblings together."""
    for part in PARTS:
        part.take_back(model)
    model.stepped_aside = ()


def leave_to_transformers(model: Any, reason: str) -> None:
    """Takes every part back, and says why."""
    unfuse(model)
    _step_aside(model, {part.NAME: reason for part in PARTS})


def _difference(part: ModuleType, model: Any) -> str | None:
    try:
        return part.difference(model)
    except Exception as error:  # another Transformers: whatever it raises is the reason
        return f"{type(error).__name__}: {error}"


def _step_aside(model: Any, reasons: dict[str, str]) -> None:
    """Writes down, and warns once, what Transformers computes that this package would."""
    model.stepped_aside = tuple(SteppedAside(part, reason) for part, reason in reasons.items())
    if reasons:
        warnings.warn(
            f"Transformers {transformers.__version__} is not as this version of qvlm_hf knows it: "
            f"{'; '.join(map(str, model.stepped_aside))}. Transformers alone computes these parts, "
            "which is slower. A newer qvlm_hf may know them.",
            stacklevel=3,
        )
