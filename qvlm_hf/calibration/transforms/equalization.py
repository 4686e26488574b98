"""Scales moved out of a site's input into the weights that read it: the model computes the same, its inputs quantize better.

An input channel that is larger than its neighbours takes the whole range of a token. Dividing it by
s and multiplying its weight column by s changes nothing in full precision (SmoothQuant, arXiv
2211.10438). The division is folded into what writes the channel: the norm before the site, v_proj
(attention mixes positions, not channels), up_proj (which gating multiplies). Here

    s = rms(x)^alpha / rms(w)^(1 - alpha), its geometric mean over the site 1.

Inputs behind a nonlinearity have nothing to fold into.

Left out: powers of two alone, which would change no bit of what the model computes. In a prototype
they left 18 % more divergence (W4A4, four seeds), which is hardly beyond the spread over seeds.

Legend: I in_features of the readers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.samples import Batch
from qvlm_hf.models.folds import ScalePath

__all__ = ["equalize"]

_ALPHA = 0.35  # lowest divergence at W4A4 on the demo model, in a prototype: 0.0051 (five seeds); 0.25: 0.0058 (five); 0.5: 0.0057 (three)
_MOST = 8.0  # powers of two, either way: beyond that 16-bit weights would lose range


def equalize(model: nn.Module, paths: Sequence[ScalePath], data: Sequence[Batch]) -> None:
    """Folds the scales of all paths into the weights; every parameter it changes gets a new tensor.

    Args:
        model: in full precision (rotated, if it will be).
        paths: from `folds.scale_paths`.
        data: calibration batches; paths that none of them reaches stay as they are.
    """
    squares = _square_sums(model, paths, data)
    for path in paths:
        if path.readers[0] in squares:
            _fold(path, _scales(path, squares[path.readers[0]]))


def _fold(path: ScalePath, scale: Tensor) -> None:
    """Divides the channels that the source writes by their scales, [heads, width], and undoes it in the readers."""
    for reader in path.readers:
        repeats = reader.in_features // scale.numel()
        columns = scale.unsqueeze(1).expand(-1, repeats, -1).flatten()
        reader.weight.data = (reader.weight.detach().float() * columns).to(reader.weight.dtype)
    for parameter in path.source.parameters(recurse=False):
        rows = scale.flatten().view(-1, *[1] * (parameter.dim() - 1))
        parameter.data = (parameter.detach().float() / rows).to(parameter.dtype)


def _scales(path: ScalePath, inputs: Tensor) -> Tensor:
    """s of the channels that the source writes, [heads, width]; readers that share a channel share its scale."""
    weights = (
        torch.cat([reader.weight.detach().float() for reader in path.readers]).square().mean(0)
    )
    logs = 0.5 * (_ALPHA * inputs.log2() - (1 - _ALPHA) * weights.log2())
    silent = (inputs == 0) | (weights == 0)
    logs = (logs - logs[~silent].mean()).masked_fill(silent, 0.0)
    written = next(path.source.parameters(recurse=False)).shape[0]
    heads = logs.unflatten(0, (-1, inputs.numel() // written, path.width)).mean(1)
    return heads.clamp(-_MOST, _MOST).exp2()


def _square_sums(
    model: nn.Module, paths: Sequence[ScalePath], data: Sequence[Batch]
) -> dict[nn.Module, Tensor]:
    """First reader -> sum of squares of its input per channel, float32 [I], over tokens that count; `_scales` cancels their number."""
    sums: dict[nn.Module, Tensor] = {}
    device = next(model.parameters()).device
    for batch in data:
        mask = batch.inputs["attention_mask"].bool().to(device)
        with _observed(paths, mask, sums), torch.no_grad():
            model(**{key: value.to(device) for key, value in batch.inputs.items()}, use_cache=False)
    return sums


@contextmanager
def _observed(
    paths: Sequence[ScalePath], mask: Tensor, sums: dict[nn.Module, Tensor]
) -> Iterator[None]:
    def observe(reader: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        x = x.detach()[mask] if x.shape[:2] == mask.shape else x.detach().flatten(0, -2)
        square = x.float().square().sum(0)
        sums[reader] = sums[reader] + square if reader in sums else square

    handles = [path.readers[0].register_forward_pre_hook(observe) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
