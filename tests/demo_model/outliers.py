"""Plant outlier channels in a LLaVA without changing what it computes.

Large language models have a few activation channels that are tens of times larger than the others;
a small model trained for minutes has none, and round-to-nearest would be flattered on it. For a
linear map W behind a normalisation with weight g (and bias b),

    W (g * n + b) = (W / s) ((s * g) * n + s * b)        s = factor on the planted channels, 1 elsewhere

so scaling a channel of g and b up and the same input column of every reader of it down leaves the
function as it is. The same holds between up_proj and down_proj, because the gate multiplies channel
by channel. Planted are, in every layer, for a seeded choice of channels:

    Llama   input_layernorm -> q, k, v;   post_attention_layernorm -> gate, up;   up_proj (rows) -> down_proj
    CLIP    layer_norm1 -> q, k, v;       layer_norm2 -> fc1

Left out: the inputs of o_proj, out_proj, fc2 and the projector, which follow no per-channel scale
that could be moved exactly.
"""

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["plant_outliers"]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# layers, producer in a layer, its readers
_SITES = (
    ("model.language_model.layers", "input_layernorm", _QKV),
    ("model.language_model.layers", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("model.language_model.layers", "mlp.up_proj", ("mlp.down_proj",)),
    ("model.vision_tower.encoder.layers", "layer_norm1", _QKV),
    ("model.vision_tower.encoder.layers", "layer_norm2", ("mlp.fc1",)),
)


def _scale(tensor: torch.Tensor, channels: torch.Tensor, factor: float, dim: int) -> None:
    """Multiply some channels of a parameter in place, in float64."""
    scale = torch.ones(tensor.shape[dim], dtype=torch.float64, device=tensor.device)
    scale[channels] = factor
    tensor.copy_(tensor.double() * scale.view([-1 if d == dim else 1 for d in range(tensor.ndim)]))


def _plant(
    producer: nn.Module, readers: Sequence[nn.Module], channels: torch.Tensor, factor: float
) -> None:
    """Scale the output channels of `producer` (a norm or a linear module) up and the input columns
    of `readers` down.
    """
    for parameter in producer.parameters():  # weight, and bias where there is one
        _scale(parameter, channels, factor, dim=0)
    for reader in readers:
        _scale(reader.get_parameter("weight"), channels, 1 / factor, dim=1)


@torch.no_grad()
def plant_outliers(
    model: nn.Module, factor: float = 20.0, fraction: float = 0.03, seed: int = 0
) -> dict[str, list[int]]:
    """Give a LLaVA (CLIP and Llama) outlier channels, in place; its logits stay the same up to
    rounding.

    Args:
        model: a `LlavaForConditionalGeneration` in float32 (rounding in float16 would add its own
            error).
        factor: how much larger the planted channels become; above 1.
        fraction: share of the channels of each site, in (0, 1); at least one channel each.
        seed: of the choice of channels.

    Returns:
        For each scaled module (canonical name) the planted channels, ascending.

    Raises:
        ValueError: for a factor or fraction out of range.
    """
    if not factor > 1:
        raise ValueError(
            f"factor={factor}: outliers are larger than their neighbours, so it must be above 1; "
            f"pass 20, for instance."
        )
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: must be in (0, 1); pass 0.03, for instance.")
    generator = torch.Generator().manual_seed(seed)
    planted = {}
    for layers, producer, readers in _SITES:
        for index, layer in enumerate(model.get_submodule(layers).children()):
            module = layer.get_submodule(producer)
            width = len(module.get_parameter("weight"))
            channels = (
                torch.randperm(width, generator=generator)[: max(1, round(fraction * width))]
                .sort()
                .values
            )
            _plant(module, [layer.get_submodule(reader) for reader in readers], channels, factor)
            planted[f"{layers}.{index}.{producer}"] = channels.tolist()
    return planted
