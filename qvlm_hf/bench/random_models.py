"""Models with random weights, and prompts for them: enough to measure speed and memory, which depend on shapes and not on values.

A tensor is made where it will stay, packed ones as packed bytes, so that a model of 13 billion
parameters never takes more than its quantized size. Values come from one block of a million that is
repeated: drawing each of billions would take minutes and change no time.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.runtime.attention import ATTENTION
from qvlm_hf.hf.runtime.fusion import fuse
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import replace_modules

__all__ = ["random_model", "random_prompt", "random_tensors", "skeleton"]

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
    if modules:
        config = copy.deepcopy(config)
        config._attn_implementation = {"text_config": ATTENTION}  # as a quantized model is loaded
    model = skeleton(config, dtype=dtype, modules=modules or {})
    for name, tensor in random_tensors(model, device):
        parent, _, part = name.rpartition(".")
        setattr(model.get_submodule(parent), part, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.to(device)  # what is left are the few buffers
    fuse(model)
    return model.eval()


def skeleton(config: Any, *, dtype: torch.dtype, modules: Mapping[str, QuantScheme]) -> Any:
    """The model with parameters on the meta device, quantized modules in their place, and real buffers."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    linears = {
        canonical_name(name): (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    replaced: dict[str, nn.Module] = {}
    for canonical, scheme in modules.items():
        name, linear = linears[canonical]
        replaced[name] = QVLMLinear(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=linear.bias is not None,
            dtype=dtype,
            device="meta",
        )
    replace_modules(model, replaced)
    return model


def random_tensors(model: nn.Module, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Name and new tensor of every parameter of a `skeleton`, one after the other; shared ones once."""
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(_BLOCK, device=device, generator=generator)
    words = torch.randint(
        -(2**31), 2**31, (_BLOCK,), device=device, dtype=torch.int32, generator=generator
    )
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


def random_prompt(
    config: Any,
    batch: int,
    *,
    prompt_tokens: int,
    images: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Inputs of a model: prompts of one length, each with its pictures first, noise as pictures and random words as text.

    Args:
        config: of the model.
        batch: prompts.
        prompt_tokens: of each, placeholders of pictures included.
        images: pictures per prompt.
        dtype: of the pictures.
        device: of all tensors.

    Raises:
        ValueError: the pictures do not fit into the prompt, or the prompt not into the model's
            context.
    """
    placeholders, longest = (
        images * config.image_seq_length,
        config.text_config.max_position_embeddings,
    )
    if not placeholders < prompt_tokens <= longest:
        raise ValueError(
            f"--prompt-tokens {prompt_tokens} must be more than the {placeholders} that {images} "
            f"pictures take, and at most {longest}."
        )
    generator = torch.Generator().manual_seed(0)
    special = {config.image_token_id}
    words = torch.tensor(
        [token for token in range(min(1000, config.text_config.vocab_size)) if token not in special]
    )
    text = words[
        torch.randint(len(words), (batch, prompt_tokens - placeholders), generator=generator)
    ]
    ids = torch.cat([torch.full((batch, placeholders), config.image_token_id), text], 1)
    inputs = {"input_ids": ids.to(device)}
    if images:
        side = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(batch * images, 3, side, side, generator=generator).to(
            device, dtype
        )
    return inputs


def _fill_float(tensor: Tensor, part: str, normal: Tensor) -> None:
    if tensor.dim() == 1 and part == "weight":  # of a norm
        tensor.fill_(1)
    elif part == "bias":
        tensor.zero_()
    else:
        _repeat(
            tensor,
            (normal * tensor[0].numel() ** -0.5 if tensor.dim() > 1 else normal).to(tensor.dtype),
        )


def _fill_packed(tensor: Tensor, part: str, module: QVLMLinear, words: Tensor) -> None:
    """Integers uniform on their grids, scales such that inputs of variance 1 give outputs of about variance 1."""
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
