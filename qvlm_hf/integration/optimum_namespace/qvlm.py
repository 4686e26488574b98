"""`optimum.qvlm`: Q-VLM's quantizer and pipeline where Optimum's users look for them. The code is qvlm_hf/integration/optimum.py."""

from qvlm_hf.integration.config import QVLMConfig
from qvlm_hf.integration.optimum import QVLMOptimumQuantizer, disable, enable, pipeline

__all__ = ["QVLMConfig", "QVLMOptimumQuantizer", "disable", "enable", "pipeline"]
