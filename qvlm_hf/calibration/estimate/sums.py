"""What time and memory of a calibration depend on: its samples, and sums over a segment's layers.

Legend: I in_features of a site, O out_features, T tokens of all samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.search.sensitivity import gradient_draws
from qvlm_hf.models.graph import Layer, Segment

__all__ = ["Data", "Sums", "add_up", "directions"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The samples of a calibration, as far as they cost time or memory.

    Attributes:
        samples: how many.
        batch_size: samples of a batch.
        tokens: component -> tokens of an average sample, padding included.
        context: component -> tokens that see each other.
        answers: tokens of an answer.
        checks: samples of the self-check.
    """

    samples: int
    batch_size: int
    tokens: Mapping[str, float]
    context: Mapping[str, float]
    answers: float = 8
    checks: int = 16

    @property
    def batches(self) -> int:
        """How many batches."""
        return -(-self.samples // self.batch_size)

    @property
    def half(self) -> float:
        """The share of the batches that candidates are judged on (`held_out_half`)."""
        return (self.batches // 2) / self.batches if self.batches > 1 else 1.0


class Sums:
    """Sums over the live layers of a segment, for all samples.

    Attributes:
        layers, sites: how many.
        operations: of a pass; a multiplication and an addition are two.
        hidden: values that enter the layers, of one layer.
        values: that enter the sites.
        weights, spread: O I and O I^2 of the sites.
        squares, cubes: I^2 and I^3.
        hessians: operations of all Hessians, 2 T I^2.
    """

    def __init__(self, segment: Segment, data: Data, active: float) -> None:
        tokens = data.samples * data.tokens[segment.component]
        layers = live_layers(segment)
        self.layers, self.sites = len(layers), sum(len(layer.sites) for layer in layers)
        self.hidden = tokens * (_width(layers[0]) if layers else 0)
        self.operations = self.values = self.weights = self.hessians = 0.0
        self.spread = self.squares = self.cubes = 0.0
        for layer in layers:
            context = data.context[segment.component]
            weights = _active_weights(layer, active)
            self.operations += 2 * tokens * weights + 4 * tokens * context * _width(layer)
            for site in layer.sites:
                routed = tokens * (active if site.experts else 1)
                for part in site.parts:
                    inputs = part.linears[0].in_features
                    outputs = sum(linear.out_features for linear in part.linears)
                    self.values += routed * inputs
                    self.weights += outputs * inputs
                    self.spread += outputs * inputs**2
                    self.squares += inputs**2
                    self.cubes += inputs**3
                    self.hessians += 2 * routed * inputs**2


def add_up(model: Any, segments: Sequence[Segment], data: Data) -> list[Sums]:
    """The sums of every segment; `model` may be on the meta device."""
    active = _active_share(model)
    return [Sums(segment, data, active) for segment in segments]


def directions(sums: Sequence[Sums], data: Data) -> int:
    """Of the gradients of sensitivity."""
    values = data.half * sum(one.hidden * one.layers for one in sums)
    return gradient_draws(values, data.samples * data.half)


def _width(layer: Layer) -> int:
    return layer.sites[0].linears[0].in_features if layer.sites else 0


def _active_weights(layer: Layer, active: float) -> float:
    """Weights of a layer that a token meets."""
    every = sum(weight.numel() for weight in layer.module.parameters() if weight.dim() > 1)
    sites = [site for site in layer.sites if site.experts]
    return every - (1 - active) * sum(
        linear.weight.numel() for site in sites for linear in site.linears
    )


def _active_share(model: Any) -> float:
    """The share of a layer's experts that a token goes through; 1 without experts."""
    text = model.config.get_text_config()
    taken = getattr(text, "num_experts_per_tok", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if taken and (count := getattr(text, name, None)):
            return min(1.0, taken / count)
    return 1.0
