"""torch.compile that rounds where eager PyTorch rounds.

Inductor keeps float32 between the operations it fuses, where eager PyTorch rounds each result to
the model's dtype. A quantizer behind such a chain (norm, rotary embedding, SwiGLU, residual sum)
then finds some inputs on the other side of a rounding boundary, and takes another level. Told to
round alike, it finds the same integers.

`generate` compiles by itself for a static cache on a GPU; there a quantized model brings these
options along. A `compile_config` of the user comes first, and torch.compile takes what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from transformers.generation.configuration_utils import CompileConfig

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["ROUND_AS_EAGER", "compile_as_transformers_does", "round_as_eager"]

ROUND_AS_EAGER: Mapping[str, bool] = MappingProxyType({"emulate_precision_casts": True})
_DEFAULT = "_default_compile_config"  # what generate asks where the user gave no compile_config


def round_as_eager(model: PreTrainedModel) -> None:
    """Makes `generate` compile with `ROUND_AS_EAGER`, unless the user says how to compile.

    Not through `generation_config.compile_config`: with one, Transformers warns wherever it does
    not compile, as with an ordinary cache.
    """
    # private: a Transformers without it compiles as it likes
    default = getattr(model, _DEFAULT, None)
    if default is not None and default().backend == "inductor":
        setattr(model, _DEFAULT, rounding_config)


def compile_as_transformers_does(model: PreTrainedModel) -> None:
    """Takes `round_as_eager` back."""
    model.__dict__.pop(_DEFAULT, None)


def rounding_config() -> CompileConfig:
    """Transformers' default with `ROUND_AS_EAGER`."""
    default = CompileConfig()
    # a mode and options exclude each other, so the mode is spelled out in options
    options = {**torch._inductor.list_mode_options()[default.mode], **ROUND_AS_EAGER}
    return CompileConfig(mode=None, options=options)  # type: ignore[arg-type]  # torch.compile takes None
