"""GPTQ (arXiv 2210.17323) on the folded weights and the quantized inputs.

With inputs a (what the site really multiplies) and H = sum a a^T, rounding column after column and
spreading each column's error over the columns that are still to come minimises ||(W' - W_hat) a||^2
greedily. Columns go in the order of falling diagonal of H; the groups' grids are fixed beforehand,
so the order leaves the format alone.

Legend: O out_features, I in_features, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import LayerInput, run_until, valid_tokens
from qvlm_hf.calibration.search.sites import QuantizedSite
from qvlm_hf.format.grids import QuantizedWeight, group_expand

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

    Args:
        layer: in the compute dtype, its sites installed, their candidates final.
        sites: in execution order.
        inputs: per batch, masks and other arguments of the segment.
        hidden: per batch [B, T, H], what enters the layer.
        weights: per batch [B, T], how much a token's error counts; None is all alike.
    """
    tokens = weights or [torch.ones(h.shape[:-1], device=h.device) for h in hidden]
    for site in sites:
        hessian = _hessian(layer, site, inputs, hidden, tokens)
        site.set_weights(
            [
                gptq_round(site.folded_weight(index), hessian, start, site.scheme.weight_bits)
                for index, start in enumerate(site.quantized_weights())
            ]
        )


def _hessian(
    layer: nn.Module,
    site: QuantizedSite,
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    tokens: Sequence[Tensor],
) -> Tensor:
    """Weighted sum of a a^T over valid tokens, float32 [I, I]; W' is multiplied by a."""
    first = site.linears[0]
    total = torch.zeros(first.in_features, first.in_features, device=first.weight.device)
    for entry, h, weight in zip(inputs, hidden, tokens, strict=True):
        a = site.multiplied_input(run_until(layer, first, entry, h))
        if a.shape[:-1] == weight.shape:
            a = a * weight.sqrt().unsqueeze(-1)
        a = valid_tokens(a, entry.valid)
        total.addmm_(a.T, a)
    return total


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
    length = weight.shape[1]
    scale = group_expand(start.scale, start.group_length, length).float()
    zero = group_expand(start.zero_point, start.group_length, length).float()
    top = 2**bits - 1
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    rest, scale, zero = weight.float()[:, order].clone(), scale[:, order], zero[:, order]
    values = torch.empty_like(rest)
    for begin in range(0, length, _CHUNK):
        end = min(begin + _CHUNK, length)
        # columns as rows: what an operation touches lies together in memory
        chunk, scales, zeros = (part[:, begin:end].T.contiguous() for part in (rest, scale, zero))
        errors = torch.empty_like(chunk)
        for k in range(end - begin):
            column = begin + k
            value = (torch.div(chunk[k], scales[k]).round_() + zeros[k]).clamp_(0, top)
            values[:, column] = value
            error = chunk[k] - (value - zeros[k]) * scales[k]
            torch.div(error, factor[column, column], out=errors[k])
            chunk[k + 1 :] -= errors[k] * factor[column, column + 1 : end, None]
        rest[:, end:] -= errors.T.contiguous() @ factor[begin:end, end:]
    integers = torch.empty_like(start.values)
    integers[:, order] = values.to(torch.uint8)
    return QuantizedWeight(integers, start.scale, start.zero_point, start.group_length)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, float32 [I, I]."""
    h = hessian.double()
    mean = torch.diagonal(h).mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = _DAMPING
    while True:
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        damping *= 10
