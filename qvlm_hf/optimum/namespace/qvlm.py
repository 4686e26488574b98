"""`optimum.qvlm`: Q-VLM's quantizer and pipeline where Optimum's users look for them.

The code is qvlm_hf/optimum/quantizer.py.
"""

from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.optimum.quantizer import QVLMOptimumQuantizer, disable, enable, pipeline

__all__ = ["QVLMConfig", "QVLMOptimumQuantizer", "disable", "enable", "pipeline"]
