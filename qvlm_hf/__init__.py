"""Q-VLM quantization of vision-language models inside Hugging Face Transformers.

    import qvlm_hf
    from transformers import AutoModelForImageTextToText

    config = qvlm_hf.QVLMConfig(scheme="W4A4", dataset="samples.jsonl", processor=processor)
    model = AutoModelForImageTextToText.from_pretrained("llava-hf/llava-1.5-7b-hf", quantization_config=config)

Importing the package registers "qvlm" with Transformers, which is its only side effect; a program that loads a quantized checkpoint must
import it first. Read quantize.py first.
"""

from qvlm_hf.calibration.report import CalibrationReport
from qvlm_hf.calibration.settings import VisionOptimization
from qvlm_hf.integration.config import QVLMConfig
from qvlm_hf.integration.quantizer import QVLMHfQuantizer, quantize_model
from qvlm_hf.integration.saving import save_quantized
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.precision import PrecisionRow, format_precision_table, precision_table, set_backend

__all__ = [
    "CalibrationReport",
    "PrecisionRow",
    "QVLMConfig",
    "QVLMHfQuantizer",
    "QVLMLinear",
    "VisionOptimization",
    "__version__",
    "format_precision_table",
    "precision_table",
    "quantize_model",
    "save_quantized",
    "set_backend",
]

__version__ = "0.1.0"
