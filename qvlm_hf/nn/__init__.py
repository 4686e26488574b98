"""The quantized module and how it takes the place of nn.Linear. Depends on torch, core and ops."""

from qvlm_hf.nn.linear import QVLMLinear

__all__ = ["QVLMLinear"]
