"""Cross-layer dependency: conditional entropy of a layer's output given the one before (eq. 4-6).

    p_m(x) = softmax_m( -(x/Delta - q_m/Delta)^2 )                  soft assignment (eq. 5)
    P[m, m'] = mean over elements of p_m(x^(k)) p_m'(x^(k+1))       same position, same channel
    D(k, k+1) = - sum P[m, m'] log( P[m, m'] / sum_m' P[m, m'] )    in nats (eq. 4)
    D(k_r, k_s) = sum of D(k, k+1) between them                     (eq. 6)

Delta is the step of a grid of M levels over the smallest and largest value of each channel (or of
each position). Both hidden states must have one shape, so D never crosses a segment. The M x M
histogram is accumulated in chunks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvlm_hf.calibration.layers import (
    count_tokens,
    live_layers,
    run_layer,
    valid_tokens,
    working_precision,
)
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.models.graph import Segment

__all__ = [
    "HISTOGRAM_VALUES",
    "DependencyHistogram",
    "conditional_entropy",
    "layer_dependencies",
    "soft_assignment",
    "value_bounds",
]

# Elements x levels of one chunk, and of a whole pair of layers: beyond that tokens are subsampled
# evenly. On the demo model 16 levels stay below the budget; at 256 levels the subsample moved the
# entropies by at most 0.007 nats.
_CHUNK = 2**23
HISTOGRAM_VALUES = 2**26


def soft_assignment(units: Tensor, levels: int) -> Tensor:
    """p_m of eq. 5, [n, levels], for values [n] in steps of the grid, 0 ... levels - 1."""
    grid = torch.arange(levels, device=units.device, dtype=torch.float32)
    return torch.softmax(-((units.float().unsqueeze(-1) - grid) ** 2), dim=-1)


def conditional_entropy(joint: Tensor) -> Tensor:
    """D(k, k+1) of eq. 4 in nats, a float64 scalar, of P[m, m'] ([M, M], first layer's rows).

    0 log 0 is 0.
    """
    joint = joint.double()
    marginal = joint.sum(1, keepdim=True).expand_as(joint)
    mass = joint > 0
    return -(joint[mass] * torch.log(joint[mass] / marginal[mass])).sum()


def layer_dependencies(calibration: Calibration, segment: Segment) -> list[float]:
    """D(k, k+1) of a segment's consecutive live layers in nats (eq. 4), from one forward pass.

    The model runs as it is now, on the `inputs` of the calibration. There is one number less than
    live layers.

    Raises:
        ValueError: a layer's output is not finite.
    """
    inputs = calibration.inputs[segment.name]
    per_position = calibration.per_position(segment)
    live = live_layers(segment)
    hidden = [entry.hidden for entry in inputs]
    (tokens_in_all,) = ranks.all_reduce_numbers(count_tokens(inputs))
    previous: list[Tensor] | None = None
    dependencies = []
    for layer in live if len(live) > 1 else ():
        with working_precision([layer], inputs):
            hidden = run_layer(layer.module, inputs, hidden)
        tokens = [
            keep(valid_tokens(h, entry.valid)) for h, entry in zip(hidden, inputs, strict=True)
        ]
        for entry, values in zip(inputs, tokens, strict=True):
            entry.require_finite(values, f"the output of {layer.name}")
        current = hidden if per_position else tokens
        if previous is not None:
            histogram = DependencyHistogram(
                value_bounds(previous, per_position),
                value_bounds(current, per_position),
                levels=calibration.settings.entropy_levels,
                elements=tokens_in_all * hidden[0].shape[-1],
            )
            seen = ranks.offsets(
                calibration.reached(segment), [v.shape[:-1].numel() for v in current]
            )
            for first, second, before in zip(previous, current, seen, strict=True):
                histogram.update(first, second, seen=before)
            dependencies.append(float(histogram.entropy()))
        previous = current
    return dependencies


class DependencyHistogram:
    """P[m, m'] of two consecutive hidden states, streamed over batches.

    It is differentiable where the values are.

    Args:
        first_range: (smallest, largest) of the first layer's values, broadcastable against [tokens,
            H].
        second_range: the same of the second layer.
        levels: M: 2^activation_bits, or 256 when activations stay in floating point.
        elements: values that will come in all.
        budget: elements x levels beyond which values are subsampled by an even stride over tokens;
            None is 2^26.
    """

    def __init__(
        self,
        first_range: tuple[Tensor, Tensor],
        second_range: tuple[Tensor, Tensor],
        *,
        levels: int,
        elements: int,
        budget: int | None = None,
    ) -> None:
        self._ranges, self._levels = (first_range, second_range), levels
        self._stride = -(-elements * levels // (budget or HISTOGRAM_VALUES))
        self._sum = torch.zeros(levels, levels, dtype=torch.float64, device=first_range[0].device)
        self._count = self._seen = 0

    def update(self, first: Tensor, second: Tensor, *, seen: int | None = None) -> None:
        """Adds [..., tokens, H] values of both layers.

        `seen`: tokens of the batches before; None: those that came here.

        Raises:
            ValueError: the shapes differ.
        """
        if first.shape != second.shape:
            raise ValueError(
                f"hidden states of shapes {tuple(first.shape)} and {tuple(second.shape)} have no "
                f"common elements."
            )
        # The stride runs on across batches: restarting it would sample every batch's first token,
        # the attention sink, too often.
        start = -(self._seen if seen is None else seen) % self._stride
        self._seen += first.shape[:-1].numel()
        a, b = (
            self._units(x, bounds).flatten(0, -2)[start :: self._stride].reshape(-1)
            for x, bounds in zip((first, second), self._ranges, strict=True)
        )
        rows = max(1, _CHUNK // self._levels)
        for start in range(0, a.numel(), rows):
            p, q = (soft_assignment(x[start : start + rows], self._levels) for x in (a, b))
            self._sum = self._sum + (p.T @ q).double()
        self._count += a.numel()

    def entropy(self) -> Tensor:
        """D(k, k+1) in nats, float64 scalar, of what all processes added."""
        (count,) = ranks.all_reduce_numbers(self._count)
        return conditional_entropy(ranks.all_reduce(self._sum) / max(count, 1))

    def _units(self, x: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
        low, high = bounds
        step = (high - low).float() / (self._levels - 1)
        return (x.float() - low) / torch.where(step > 0, step, torch.ones_like(step))


def value_bounds(values: Sequence[Tensor], per_position: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per channel, [H], or per position, [T, 1] (of [B, T, H]).

    Over the batches of all processes.
    """
    axes = (0, 2) if per_position else (0,)
    low = ranks.all_reduce(torch.stack([v.amin(axes) for v in values]).amin(0), "min")
    high = ranks.all_reduce(torch.stack([v.amax(axes) for v in values]).amax(0), "max")
    return (low[:, None], high[:, None]) if per_position else (low, high)
