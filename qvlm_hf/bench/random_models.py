"""Models with random weights, and prompts for them: speed and memory depend on shapes alone.

Each tensor is made where it will stay, packed ones as packed bytes, so that a model of 13 billion
parameters never takes more than its quantized size. Values repeat one block of a million: drawing
billions would take minutes and change no time.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.processor_fit import count_features, usual_picture
from qvlm_hf.hf.quantizer import QVLMHfQuantizer
from qvlm_hf.hf.runtime.fusion import fuse
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import replace_modules

__all__ = ["picture_tokens", "random_model", "random_prompt", "random_tensors", "skeleton"]

_BLOCK = 2**20
_WORD = 32
_RANGE = 8.0  # width of a static input range: inputs behind a norm have a standard deviation of 1


def random_model(
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    modules: Mapping[str, QuantScheme] | None = None,
) -> Any:
    """A model in eval mode, on `device`, with finite outputs.

    Args:
        config: of the model; not changed.
        dtype: of everything in full precision.
        device: of all tensors.
        modules: canonical names of quantized modules and their schemes ("token" is not possible);
            default: none.
    """
    if modules:  # as a quantized model is loaded
        config = copy.deepcopy(config)
        config._attn_implementation = None
        config = QVLMHfQuantizer(QVLMConfig()).update_attn_implementation(config)
    model = skeleton(config, dtype=dtype, modules=modules or {})
    for name, tensor in random_tensors(model, device):
        parent, _, part = name.rpartition(".")
        setattr(model.get_submodule(parent), part, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.to(device)  # what is left are the few buffers
    fuse(model)
    return model.eval()


def skeleton(config: Any, *, dtype: torch.dtype, modules: Mapping[str, QuantScheme]) -> Any:
    """The model with quantized modules: parameters on the meta device, real buffers."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for name, linear in list(model.named_modules()):
        scheme = modules.get(canonical_name(name))
        if scheme is not None:
            sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
            packed = QVLMLinear(*sizes, scheme, bias=bias, dtype=dtype, device="meta")
            replace_modules(model, {name: packed})
    return model


def random_tensors(model: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and new tensor of every parameter of a `skeleton`; shared ones once."""
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(_BLOCK, device=device, generator=generator)
    bounds: tuple[int, int] = (-(2**31), 2**31)
    words = torch.randint(*bounds, (_BLOCK,), device=device, dtype=torch.int32, generator=generator)
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            tensor = torch.empty_like(parameter, device=device)
            if isinstance(module, QVLMLinear) and part != "bias":
                _fill_packed(tensor, part, module, words)
            else:
                _fill_float(tensor, part, normal)
            yield f"{prefix}.{part}" if prefix else part, tensor


def picture_tokens(model: Any) -> int | None:
    """Counts the tokens that a picture of the configured size becomes.

    Returns:
        None where pictures come in another form than [pictures, 3, side, side].
    """
    picture = usual_picture(model.config)
    if picture is None or getattr(model.config, "image_token_id", None) is None:
        return None
    with suppress(ValueError):  # the model takes pictures of another size
        return count_features(model, {"pixel_values": picture}) or None
    return None


def random_prompt(
    config: Any,
    batch: int,
    *,
    prompt_tokens: int,
    image_tokens: int,
    images: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Prompts of one length: noise as pictures, then random words.

    Args:
        config: of the model.
        batch: prompts.
        prompt_tokens: of each, placeholders of pictures included.
        image_tokens: of a picture.
        images: pictures per prompt.
        dtype: of the pictures.
        device: of all tensors.

    Raises:
        ValueError: the pictures do not fit into the prompt.
    """
    placeholders, text = images * image_tokens, config.get_text_config(decoder=True)
    if prompt_tokens <= placeholders:
        raise ValueError(
            f"--prompt-tokens {prompt_tokens} must be more than the {placeholders} that {images} "
            f"pictures take."
        )
    generator = torch.Generator().manual_seed(0)
    picture: Any = getattr(config, "image_token_id", None)
    words = [token for token in range(min(1000, text.vocab_size)) if token != picture]
    drawn = torch.randint(len(words), (batch, prompt_tokens - placeholders), generator=generator)
    pictures = torch.full((batch, placeholders), picture if images else 0)
    inputs = {"input_ids": torch.cat([pictures, torch.tensor(words)[drawn]], 1).to(device)}
    usual = usual_picture(config)
    if images and usual is not None:
        pixels = torch.randn(batch * images, *usual.shape[1:], generator=generator)
        inputs["pixel_values"] = pixels.to(device, dtype)
    return inputs


def _fill_float(tensor: Tensor, part: str, normal: Tensor) -> None:
    if tensor.dim() == 1 and part == "weight":  # of a norm
        tensor.fill_(1)
    elif part == "bias":
        tensor.zero_()
    else:
        scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 1
        _repeat(tensor, (normal * scale).to(tensor.dtype))


def _fill_packed(tensor: Tensor, part: str, module: QVLMLinear, words: Tensor) -> None:
    """Integers uniform on their grids; scales such that outputs keep the inputs' variance."""
    scheme = module.scheme
    grid = 2**scheme.weight_bits
    input_scale = _RANGE / 2**scheme.activation_bits if scheme.granularity == "channel" else 1.0
    if part == "weight":
        _repeat(tensor, words)
        if used := module.in_features * scheme.weight_bits % _WORD:
            tensor[:, -1] &= 2**used - 1  # the rest of a row's last word is zero
    elif part == "weight_scale":
        deviation = grid / 12**0.5  # of integers uniform on the grid
        # for "channel" the weight holds the input's scale
        tensor.fill_(module.in_features**-0.5 / deviation * input_scale)
    elif part == "weight_zero_point":
        tensor.fill_(grid // 2)
    elif part == "input_scale":
        tensor.fill_(input_scale)
    else:
        tensor.fill_(2 ** (scheme.activation_bits - 1))


def _repeat(tensor: Tensor, block: Tensor) -> None:
    flat = tensor.view(-1)
    whole = flat.numel() // block.numel() * block.numel()
    flat[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
    flat[whole:].copy_(block[: flat.numel() - whole])
