"""GPTQ (arXiv 2210.17323) on the folded weights and the quantized inputs.

With inputs a (what the site really multiplies) and H = sum a a^T, rounding column after column and
spreading each column's error over the columns that are still to come minimises ||(W' - W_hat) a||^2
greedily. Columns go in the order of falling diagonal of H; the groups' grids are fixed beforehand,
so the order leaves the format alone.

Legend: O out_features, I in_features, G groups.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import (
    LayerInput,
    Reached,
    observe_inputs,
    routed,
    run_layer,
    valid_tokens,
)
from qvlm_hf.calibration.search.sites import QuantizedSite
from qvlm_hf.format.grids import QuantizedWeight
from qvlm_hf.models.experts import rows_of

__all__ = ["gptq_round", "gptq_round_layer"]

# Share of the mean diagonal that is added to it (the value of the GPTQ paper); raised tenfold until
# the factorisation succeeds.
_DAMPING = 0.01
_CHUNK = 64  # columns whose corrections are applied at once; only speed depends on it


def gptq_round_layer(
    layer: nn.Module,
    sites: Sequence[QuantizedSite],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
) -> None:
    """Rounds a layer's sites anew, each on the input that the sites before it now produce.

    Experts that saw few tokens stay rounded to nearest.

    Args:
        layer: in the compute dtype, its sites installed, their candidates final.
        sites: in execution order.
        inputs: per batch, masks and other arguments of the segment.
        hidden: per batch [B, T, H], what enters the layer.
        weights: per batch [B, T], how much a token's error counts; None is all alike.
    """
    tokens = weights or [torch.ones(h.shape[:-1], device=h.device) for h in hidden]
    for site in sites:
        parts = [part for part in site.parts if not part.few_tokens]
        for part, hessian in zip(
            parts, _hessians(layer, parts, inputs, hidden, tokens), strict=True
        ):
            part.set_weights(_round_siblings(part, hessian))


def _round_siblings(site: QuantizedSite, hessian: Tensor) -> list[QuantizedWeight]:
    """Rounds the modules that share an input as one: rows do not depend on each other."""
    starts = site.quantized_weights()
    values, scale, zero_point = (
        torch.cat(parts)
        for parts in zip(*((q.values, q.scale, q.zero_point) for q in starts), strict=True)
    )
    weight = torch.cat([site.folded_weight(index) for index in range(len(starts))])
    start = QuantizedWeight(values, scale, zero_point, starts[0].group_length)
    integers = gptq_round(weight, hessian, start, site.scheme.weight_bits).values
    rows = [len(own.values) for own in starts]
    return [
        replace(own, values=part.clone())
        for own, part in zip(starts, integers.split(rows), strict=True)
    ]


def _hessians(
    layer: nn.Module,
    sites: Sequence[QuantizedSite],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    tokens: Sequence[Tensor],
) -> list[Tensor]:
    """Of each site the weighted sum of a a^T over valid tokens, float32 [I, I].

    W' is multiplied by a. The layer runs no further than to the input of a site; experts are
    several, and a batch may not reach each.
    """
    modules = {index: site.linears[0] for index, site in enumerate(sites)}
    totals = [
        torch.zeros(first.in_features, first.in_features, device=first.weight.device)
        for first in modules.values()
    ]
    for entry, h, weight in zip(inputs, hidden, tokens, strict=True):

        def add(
            index: int,
            args: tuple[Any, ...],
            _: Any,
            entry: LayerInput = entry,
            weight: Tensor = weight,
        ) -> None:
            x, first = args[0], modules[index]
            a, counts = sites[index].multiplied_input(x), routed(weight, first, x)
            if counts is not None:
                a = a * counts.sqrt().unsqueeze(-1)
            a = valid_tokens(a, routed(entry.valid, first, x))
            totals[index].addmm_(a.T, a)
            if len(sites) == 1 and rows_of(first) is None:
                raise Reached

        with observe_inputs(modules, add), suppress(Reached):
            run_layer(layer, [entry], [h])
    return totals


def gptq_round(
    weight: Tensor, hessian: Tensor, start: QuantizedWeight, bits: int
) -> QuantizedWeight:
    """Rounds a folded weight column by column with second-order compensation.

    Args:
        weight: [O, I], folded.
        hessian: float32 [I, I], sum of a a^T over calibration tokens.
        start: the weight rounded to nearest; its grids stay.
        bits: of the integers.

    Returns:
        Integers on the grids of `start`.

    Raises:
        ValueError: the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian of the inputs holds NaN or infinity: check weights and data.")
    length, top = weight.shape[1], 2**bits - 1
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    rest, integers = weight.float()[:, order], torch.empty_like(start.values)
    for begin in range(0, length, _CHUNK):
        end = min(begin + _CHUNK, length)
        columns = order[begin:end]
        groups = columns // start.group_length
        # columns as rows: what an operation touches lies together in memory
        chunk, scales, zeros = (
            part.T.contiguous().float()
            for part in (rest[:, begin:end], start.scale[:, groups], start.zero_point[:, groups])
        )
        values, errors = torch.empty_like(chunk), torch.empty_like(chunk)
        for k in range(end - begin):
            column = begin + k
            values[k] = (torch.div(chunk[k], scales[k]).round_() + zeros[k]).clamp_(0, top)
            error = chunk[k] - (values[k] - zeros[k]) * scales[k]
            torch.div(error, factor[column, column], out=errors[k])
            chunk[k + 1 :] -= errors[k] * factor[column, column + 1 : end, None]
        integers[:, columns] = values.T.to(torch.uint8)
        rest[:, end:] -= errors.T.contiguous() @ factor[begin:end, end:]
    return replace(start, values=integers)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, float32 [I, I].

    With rows and columns in reverse order, the factor of H itself is the inverse of that factor.
    """
    h = hessian.double()
    diagonal = torch.diagonal(h).clone()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = _DAMPING
    while True:
        torch.diagonal(h).copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not failed:
            identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
        damping *= 10
