"""GPTQ (arXiv 2210.17323) on the folded weights and the quantized inputs.

With inputs a (what the site really multiplies) and H = sum a a^T, rounding column after column and
spreading each column's error over the columns that are still to come minimises ||(W' - W_hat) a||^2
greedily. Columns go in the order of falling diagonal of H; the groups' grids are fixed beforehand,
so the order leaves the format alone.

Few samples show correlations of inputs that other samples do not have, and compensation by these
adds errors. So correlations count as far as two halves of the samples agree (`agreed_hessian`).

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
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.search.sites import QuantizedSite
from qvlm_hf.format.grids import QuantizedWeight
from qvlm_hf.models.experts import rows_of

__all__ = ["agreed_hessian", "gptq_round", "gptq_round_layer"]

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
        inputs: per own batch, masks and other arguments of the segment.
        hidden: per own batch [B, T, H], what enters the layer.
        weights: per own batch [B, T], how much a token's error counts; None is all alike.
    """
    tokens = weights or [torch.ones_like(h[..., 0], dtype=torch.float32) for h in hidden]
    for site in sites:
        parts = [part for part in site.parts if not part.few_tokens]
        found = _hessians(layer, parts, inputs, hidden, tokens)
        for part in parts:  # a Hessian goes when it was used: wide inputs have large ones
            part.set_weights(_round_siblings(part, agreed_hessian(found.pop(0))))


def _round_siblings(site: QuantizedSite, hessian: Tensor) -> list[QuantizedWeight]:
    """Rounds the modules that share an input as one: rows do not depend on each other.

    So every process rounds a part of them.
    """
    starts = site.quantized_weights()
    values, scale, zero_point = (
        torch.cat(parts)
        for parts in zip(*((q.values, q.scale, q.zero_point) for q in starts), strict=True)
    )
    weight = torch.cat([site.folded_weight(index) for index in range(len(starts))])
    own = ranks.shard(len(weight))
    start = QuantizedWeight(values[own], scale[own], zero_point[own], starts[0].group_length)
    rounded = gptq_round(weight[own], hessian, start, site.scheme.weight_bits)
    integers = torch.cat(ranks.all_gather(rounded.values))
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
    """Of each site the weighted sum of a a^T over valid tokens, float32 [2, I, I].

    Over the batches of all processes. W' is multiplied by a. Every second sample is in the second
    half. The layer runs no further than to the input of a site; experts are several, and a batch
    may not reach each.
    """
    modules = {index: site.linears[0] for index, site in enumerate(sites)}
    totals = [
        torch.zeros(
            (2, first.in_features, first.in_features),
            dtype=torch.float32,
            device=first.weight.device,
        )
        for first in modules.values()
    ]
    for batch, (entry, h, weight) in enumerate(zip(inputs, hidden, tokens, strict=True)):
        second = _in_second_half(weight, batch)

        def add(
            index: int,
            args: tuple[Any, ...],
            _: Any,
            entry: LayerInput = entry,
            weight: Tensor = weight,
            second: Tensor = second,
        ) -> None:
            x, first = args[0], modules[index]
            a, counts = sites[index].multiplied_input(x), routed(weight, first, x)
            if counts is not None:
                a = a * counts.sqrt().unsqueeze(-1)
            valid, half = (routed(rows, first, x) for rows in (entry.valid, second))
            if half is None:  # rows that are no tokens: every second one
                half = (torch.arange(x.shape[:-1].numel(), device=x.device) % 2 > 0).view(
                    x.shape[:-1]
                )
            halves = valid_tokens(half.unsqueeze(-1), valid)[:, 0]
            a = valid_tokens(a, valid)
            for total, rows in zip(totals[index], (a[~halves], a[halves]), strict=True):
                total.addmm_(rows.T, rows)
            if len(sites) == 1 and rows_of(first) is None:
                raise Reached

        with observe_inputs(modules, add), suppress(Reached):
            run_layer(layer, [entry], [h])
    return [ranks.all_reduce(sums) for sums in totals]


def _in_second_half(weight: Tensor, batch: int) -> Tensor:
    """Bool, shaped like `weight` [B, T] or [B, height, width], by sample; packed [T] are one."""
    if weight.dim() < 2:
        return torch.full(weight.shape, batch % 2 > 0, device=weight.device)
    odd = (torch.arange(len(weight), device=weight.device) + batch) % 2 > 0
    return odd.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)


def agreed_hessian(halves: Tensor) -> Tensor:
    """The Hessian of all samples, its off-diagonal times what two halves of them agree on.

    With C1 and C2 the off-diagonal correlations of the halves, r = <C1, C2> / mean(|C1|^2, |C2|^2)
    is the share of a half that is no chance. Of both together it is 2 r / (1 + r) (Spearman and
    Brown), and that factor has the lowest expected squared error.

    Args:
        halves: float32 [2, I, I], sums of a a^T; a half without tokens says nothing, and the other
            one stays as it is.
    """
    whole = halves.sum(0)
    if not (torch.diagonal(halves, dim1=1, dim2=2).sum(-1) > 0).all():
        return whole
    first, second = (_correlations(half) for half in halves)
    own = (first.square().sum() + second.square().sum()) / 2
    agreement = ((first * second).sum() / own).clamp(0, 1) if own > 0 else own
    factor = 2 * agreement / (1 + agreement)
    diagonal = torch.diagonal(whole).clone()
    whole *= factor
    whole.diagonal().copy_(diagonal)
    return whole


def _correlations(hessian: Tensor) -> Tensor:
    """Cosines between inputs, zero on the diagonal."""
    scale = torch.diagonal(hessian).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    return (hessian * scale * scale[:, None]).fill_diagonal_(0)


def gptq_round(
    weight: Tensor, hessian: Tensor, start: QuantizedWeight, bits: int
) -> QuantizedWeight:
    """Rounds a folded weight column by column with second-order compensation.

    Args:
        weight: [O, I], folded.
        hessian: float32 [I, I], sum of a a^T over calibration tokens.
        start: the weight rounded to nearest; its grids stay.
        bits: of the integers.

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
    diagonal = torch.diagonal(hessian).double()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = _DAMPING
    while True:
        # of a wide input each such matrix takes a gigabyte: few are alive at a time
        damped = hessian.flip(0, 1).double()
        torch.diagonal(damped).copy_((diagonal + damping * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            del hessian
            upper = lower.flip(0, 1)
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).T
            del lower
            return torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse).float()
        damping *= 10
