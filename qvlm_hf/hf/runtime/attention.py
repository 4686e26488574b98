"""`attn_implementation="qvlm"`: one query token on a CPU goes to `ops/attention.py`, everything else to Transformers' `sdpa`."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from qvlm_hf.ops import decode_attention

__all__ = ["ATTENTION", "attend"]

ATTENTION = "qvlm"
# Arguments that change what `sdpa` computes for one query; a new Transformers may name more.
_KNOWN = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
_NOT_OURS = {*inspect.signature(sdpa_attention_forward).parameters} - _KNOWN - {"kwargs"}
_NOT_OURS |= {"cache", "softcap"}  # read from its kwargs, now or in 5.21 to 5.23


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
    if query.shape[2] == 1 and query.is_cpu and not dropout and not any(kwargs.get(name) is not None for name in _NOT_OURS):
        return decode_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
