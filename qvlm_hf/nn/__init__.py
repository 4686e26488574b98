"""The quantized module, and how it takes the place of nn.Linear."""

from qvlm_hf.nn.linear import QVLMLinear

__all__ = ["QVLMLinear"]
