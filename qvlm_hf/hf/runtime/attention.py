"""`attn_implementation="qvlm"`: a CPU kernel for one token, Transformers' `sdpa` for the rest."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from qvlm_hf.hf.runtime.probing import FLOATS, longest, one_of_each
from qvlm_hf.ops import decode_attention
from qvlm_hf.ops.attention import attend_with_pytorch

__all__ = ["ATTENTION", "NAME", "attend", "difference", "plug_in", "take_back"]

ATTENTION = "qvlm"
NAME = "attention of one token"
_CACHE_NAMES = ("cache", "past_key_values")  # from Transformers 5.24 on, and before
# What Transformers passes on, and `sdpa` does not read for one query. Anything else is left to it:
# a new Transformers may pass more.
_UNREAD = {
    *("cache_position", "is_causal", "num_items_in_batch", "output_attentions"),
    *("output_hidden_states", "position_ids", "return_dict", "use_cache"),
}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the arguments of Transformers' attention functions.

    `query` is [B, H, T, D], `key` and `value` are [B, H_kv, S, D].

    Returns:
        [B, T, H, D], and None for the weights, which are not kept.
    """
    ours = all(value is None or name in _UNREAD for name, value in kwargs.items())
    if ours and query.shape[2] == 1 and query.is_cpu and not dropout:
        return decode_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def plug_in(model: Any) -> None:
    """Nothing: the quantizer chose ATTENTION before the model was built, or the user another."""


def take_back(model: Any) -> None:
    """Gives attention to `sdpa`, unless the user chose another implementation."""
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation == ATTENTION:
        text._attn_implementation = "sdpa"


def difference(model: Any) -> str | None:
    """How attention differs from what is known, or None.

    The decoder's must take a cache under a known name, and Transformers' `sdpa` must give what
    `decode_attention` gives for one token of each kind of attention module.
    """
    attentions = [
        module
        for module in model.get_decoder().modules()
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
    ]
    for kind in {type(module) for module in attentions}:
        names = list(inspect.signature(kind.forward).parameters)
        if not any(name in names for name in _CACHE_NAMES):
            return f"{kind.__name__}.forward takes {', '.join(names[1:])}"
    if not attentions:
        return "no module has layer_idx and num_key_value_groups"
    same = all(_same_as_sdpa(module) for module in one_of_each(attentions))
    return None if same else "sdpa computes something else"


@torch.no_grad()
def _same_as_sdpa(module: Any) -> bool:
    """Whether `sdpa` gives what `decode_attention` does for a token of `module`.

    With few keys and with as many as the model has positions (these with short heads: quick),
    without a mask and with both kinds of one, with small scores and with large ones.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = module.config.get_text_config(decoder=True).dtype
    sizes = (
        (module.head_dim, 5, torch.float32),
        (module.head_dim, 5, dtype if dtype in FLOATS else torch.float32),
        (8, longest(module.config), torch.float32),
    )
    for size, length, kind in sizes:
        heads = 2 * module.num_key_value_groups
        query = torch.randn(2, heads, 1, size, generator=generator, device="cpu")
        if kind == torch.float32:
            query[1] *= 30  # scores that a cap would change
        # cheaper than random numbers, and no two positions alike
        states = torch.arange(4 * length * size, device="cpu").mul(0.7).sin()
        states = states.view(2, 1, 2, length, size).expand(-1, 2, -1, -1, -1)
        query, key, value = (one.to(kind) for one in (query, *states))
        shown = torch.arange(length, device="cpu").expand(2, 1, 1, length) > 1
        added = torch.randn(2, 1, 1, length, generator=generator, device="cpu").to(kind)
        tolerance = 1e-4 if kind == torch.float32 else 3e-2
        for mask in (None, shown, added):
            arguments, scale = (query, key, value, mask), module.scaling
            found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *arguments, scaling=scale)
            expected = attend_with_pytorch(*arguments, scale)
            if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance / 10):
                return False
    return True
