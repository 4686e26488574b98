"""Q-VLM quantization of vision-language models inside Hugging Face Transformers.

    import qvlm_hf
    from transformers import AutoModelForImageTextToText

    config = qvlm_hf.QVLMConfig(scheme="W4A4", dataset="samples.jsonl", processor=processor)
    model = AutoModelForImageTextToText.from_pretrained(
        "llava-hf/llava-1.5-7b-hf", quantization_config=config
    )

Importing the package registers "qvlm" with Transformers, which is its only side effect; a program
that loads a quantized checkpoint must import it first. Read quantize.py first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import qvlm_hf.interruption  # noqa: F401 - first, because what follows takes seconds
from qvlm_hf.calibration.options import VisionOptimization
from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.in_memory import quantize_model
from qvlm_hf.hf.quantizer import QVLMHfQuantizer
from qvlm_hf.hf.saving import save_quantized
from qvlm_hf.hub.upload import Published
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.precision_table import (
    PrecisionRow,
    format_precision_table,
    precision_table,
    set_backend,
)

if TYPE_CHECKING:
    from qvlm_hf.hf.publishing import publish, publish_folder

__all__ = [
    "CalibrationReport",
    "PrecisionRow",
    "Published",
    "QVLMConfig",
    "QVLMHfQuantizer",
    "QVLMLinear",
    "VisionOptimization",
    "__version__",
    "format_precision_table",
    "precision_table",
    "publish",
    "publish_folder",
    "quantize_model",
    "save_quantized",
    "set_backend",
]

__version__ = "0.1.0"

# Transformers' modeling code takes a second to import.
_LAZY = {"publish": "qvlm_hf.hf.publishing", "publish_folder": "qvlm_hf.hf.publishing"}


def __getattr__(name: str) -> Any:
    """Imports the names that only some programs need, when they are asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
