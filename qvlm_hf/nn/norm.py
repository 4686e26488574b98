"""The forward pass that a model's RMSNorm modules get: one operator where inference allows it, the same numbers."""

from torch import Tensor, nn

from qvlm_hf.ops.norm import rms_norm

__all__ = ["FusedRMSNorm"]


class FusedRMSNorm(nn.Module):
    """To be put before an RMSNorm class that has `weight` [K] and `variance_epsilon` and rounds as LlamaRMSNorm does.

    `reference` (False): whether plain PyTorch computes it; `set_backend` sets it.
    """

    reference = False
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, reference_only=self.reference)
