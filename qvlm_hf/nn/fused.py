"""Norms that get a forward pass of one operator, by a change of their class alone."""

from dataclasses import dataclass

from torch import Tensor, nn

from qvlm_hf.ops import reference, rms_norm

__all__ = ["FusedRMSNorm", "SteppedAside"]


@dataclass(frozen=True)
class SteppedAside:
    """A part of a model that the framework computes because it is not the one known here.

    A model's `stepped_aside` is a tuple of these; `precision_table` shows them.

    Attributes:
        part: what is left to the framework.
        reason: how it differs.
    """

    part: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part} ({self.reason})"


class FusedRMSNorm(nn.Module):
    """Goes before a class that computes what LlamaRMSNorm does, with `weight` [K].

    `reference`: whether plain PyTorch computes it; `set_backend` sets it, files do not hold it.
    """

    reference = False
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        # A wrapper around a forward pass keeps this one when the module has its own class again.
        # `reference` is gone then.
        compute = reference.rms_norm if getattr(self, "reference", True) else rms_norm
        return compute(hidden_states, self.weight, self.variance_epsilon)
