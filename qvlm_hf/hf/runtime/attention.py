"""`attn_implementation="qvlm"`: one query token on a CPU goes to `ops/attention.py`, everything else to Transformers' `sdpa`."""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from qvlm_hf.ops import decode_attention

__all__ = ["ATTENTION", "attend"]

ATTENTION = "qvlm"
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
    """Attention of `query` [B, H, T, D] over `key` and `value` [B, H_kv, S, D]; arguments as of Transformers' attention functions.

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
