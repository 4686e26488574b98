"""What the product does to one linear module: transform, ranges, fold, round, pack."""

from torch import Tensor, nn

from qvlm_hf.format.grids import choose_qparams, quantize_weight
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors

__all__ = ["pack_linear", "pack_weight"]


def pack_weight(
    linear: nn.Linear,
    scheme: QuantScheme,
    x: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of a module.

    Args:
        linear: in full precision.
        scheme: how.
        x: inputs [B, T, I] whose ranges the static granularities take.
        input_scale: [I], what "none" divides the input by.
    """
    weight = linear.weight.detach().float()
    if scheme.hadamard:
        weight = block_hadamard(weight, scheme.hadamard)
        x = None if x is None else block_hadamard(x, scheme.hadamard)
    axes = {"channel": (0, 1), "token": (0, 2)}.get(scheme.granularity)
    qparams = None
    if axes is not None:
        assert x is not None
        qparams = choose_qparams(x.amin(axes), x.amax(axes), scheme.activation_bits)
        input_scale = qparams.scale if scheme.granularity == "channel" else None
    if input_scale is not None:
        weight = weight * input_scale
    tensors = packed_tensors(quantize_weight(weight, scheme), scheme, qparams)
    if scheme.granularity == "none" and input_scale is not None:
        tensors["input_scale"] = input_scale
    return tensors


def pack_linear(
    linear: nn.Linear,
    scheme: QuantScheme,
    x: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> QVLMLinear:
    """The quantized module, as `pack_weight`."""
    return QVLMLinear.from_packed(linear, scheme, pack_weight(linear, scheme, x, input_scale))
