"""Modules of a model that get a forward pass of fused operators, by a change of their class alone."""

from torch import Tensor, nn

from qvlm_hf.ops import reference, rms_norm

__all__ = ["Fused", "FusedRMSNorm"]


class Fused(nn.Module):
    """To be put before a class of the model.

    `reference` (False): whether plain PyTorch computes it; `set_backend` sets it, files do not hold it.
    """

    reference = False


class FusedRMSNorm(Fused):
    """For a class that has `weight` [K] and `variance_epsilon` and rounds as LlamaRMSNorm does."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        # a wrapper around a forward pass keeps this one when the module has its own class again: `reference` is gone then
        compute = reference.rms_norm if getattr(self, "reference", True) else rms_norm
        return compute(hidden_states, self.weight, self.variance_epsilon)
