"""`attn_implementation="qvlm"`: PyTorch's attention, but for one query token on a CPU two matrix products where those are faster.

PyTorch's CPU kernel walks over the keys head by head. With 16-bit keys of as many heads as queries (LLaVA-1.5) it took 8 times as long
as two batched products (docs/benchmarks.md, "Attention of one token"); with grouped queries, or float32 keys, it is the faster one.

The products are those of Transformers' `eager` attention: scores in the model's dtype, softmax in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

__all__ = ["ATTENTION", "attend"]

ATTENTION = "qvlm"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,  # noqa: ANN401 - what Transformers passes on
) -> tuple[Tensor, None]:
    """Attention of `query` [B, H, T, D] over `key` and `value` [B, H_kv, S, D]; arguments as of Transformers' attention functions.

    Returns:
        [B, T, H, D], and None for the weights, which are not kept.
    """
    if not _products_win(query, key, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        boolean = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, float("-inf")) if boolean else scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.dropout(weights, dropout, train=dropout > 0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def _products_win(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
    plain = kwargs.get("position_bias") is None and kwargs.get("cache") is None and kwargs.get("softcap") is None
    one_token = query.shape[2] == 1 and query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return one_token and query.shape[1] == key.shape[1] and plain


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
