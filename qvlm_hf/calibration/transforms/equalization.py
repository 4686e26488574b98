"""Equalization: scales move out of a site's input into the weights that read it.

The model computes the same and its inputs quantize better. An input channel that is larger
than its neighbours takes the whole range of a token. Dividing it by s and multiplying its weight
column by s changes nothing in full precision (SmoothQuant, arXiv 2211.10438). The division is
folded into what writes the channel: the norm before the site, v_proj (attention mixes positions,
not channels), up_proj (which gating multiplies). Here

    s = rms(x)^alpha / rms(w)^(1 - alpha), its geometric mean over the site 1.

Inputs behind a nonlinearity have nothing to fold into.

Left out: powers of two alone, which would change no bit of what the model computes. In a prototype
they left 18 % more divergence (W4A4, four seeds), which is hardly beyond the spread over seeds.

Legend: I in_features of the readers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import observe_inputs, routed, run_model, valid_tokens
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.samples import Batch
from qvlm_hf.models.folds import ScalePath, norm_offset

__all__ = ["equalize"]

# Lowest divergence at W4A4 on the demo model, in a prototype: 0.0051 (five seeds); 0.25 gave 0.0058
# (five), 0.5 gave 0.0057 (three).
_ALPHA = 0.35
_MOST = 8.0  # powers of two, either way: beyond that 16-bit weights would lose range


def equalize(model: nn.Module, paths: Sequence[ScalePath], data: Sequence[Batch]) -> None:
    """Folds the scales of all paths into the weights; every parameter it changes gets a new tensor.

    Paths that none of the batches of this process reaches stay as they are.
    """
    squares = _square_sums(model, paths, data)
    for path in paths:
        if (sums := squares[path.readers[0]]).any():
            _fold(path, _scales(path, sums))


def _fold(path: ScalePath, scale: Tensor) -> None:
    """Divides the channels that the source writes by [heads, width]; the readers undo it."""
    for reader in path.readers:
        repeats = reader.weight.shape[1] // scale.numel()  # a router may be no nn.Linear
        columns = scale.unsqueeze(1).expand(-1, repeats, -1).flatten()
        scaled = reader.weight.detach().float() * columns
        reader.weight.data = keep(scaled.to(reader.weight.dtype))
    for name, parameter in path.source.named_parameters(recurse=False):
        rows = scale.flatten().view(-1, *[1] * (parameter.dim() - 1))
        offset = norm_offset(path.source) if name == "weight" else 0.0
        values = parameter.detach().float().clone()
        values[-path.channels :] = (values[-path.channels :] + offset) / rows - offset
        parameter.data = keep(values.to(parameter.dtype))


def _scales(path: ScalePath, inputs: Tensor) -> Tensor:
    """s of the channels that the source writes, [heads, width]; readers share a channel's scale."""
    readers = [reader.weight.detach().float() for reader in path.readers]
    weights = torch.cat(readers).square().mean(0)
    logs = 0.5 * (_ALPHA * inputs.log2() - (1 - _ALPHA) * weights.log2())
    silent = (inputs == 0) | (weights == 0)
    logs = (logs - logs[~silent].mean()).masked_fill(silent, 0.0)
    heads = logs.unflatten(0, (-1, inputs.numel() // path.channels, path.width)).mean(1)
    return heads.clamp(-_MOST, _MOST).exp2()


def _square_sums(
    model: nn.Module, paths: Sequence[ScalePath], data: Sequence[Batch]
) -> dict[nn.Module, Tensor]:
    """First reader -> sum of squares of its input per channel, float32 [I], over valid tokens.

    Over those of all processes; zeros where none came.
    """
    readers: dict[nn.Module, nn.Linear] = {path.readers[0]: path.readers[0] for path in paths}
    sums = {
        reader: linear.weight.new_zeros(linear.weight.shape[1]).float()
        for reader, linear in readers.items()
    }
    for batch in data:

        def add(reader: nn.Module, args: tuple[Any, ...], _: Any, batch: Batch = batch) -> None:
            mask = batch.inputs["attention_mask"].bool().to(args[0].device)
            x = args[0].detach()
            square = valid_tokens(x, routed(mask, reader, x)).float().square().sum(0)
            sums[reader] += square

        with observe_inputs(readers, add), torch.no_grad():
            run_model(model, batch, logits=False)
    return {reader: ranks.all_reduce(own) for reader, own in sums.items()}
