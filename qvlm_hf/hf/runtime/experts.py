"""`routed_experts` among Transformers' experts functions, under the name "qvlm".

Modules of split experts ask for it by themselves (models/experts.py).
"""

from torch import nn

from qvlm_hf.models.experts import IMPLEMENTATION, find_experts, routed_experts

__all__ = ["register_experts"]


def register_experts(model: nn.Module) -> None:
    """Registers the function if a model has experts, whose code has imported the table then."""
    if find_experts(model):
        # not at the top: it takes most of a second
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
