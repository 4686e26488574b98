"""`attn_implementation="qvlm"`: PyTorch's attention, but one query token on a CPU takes the form that is fastest there.

- Grouped queries (fewer key heads than query heads): the queries of a group become rows of one small product, so that a key head is read
  once; Transformers leaves the grouping to PyTorch, which took 10 times as long (2 in float32; docs/benchmarks.md).
- As many key heads as query heads (LLaVA-1.5), 16-bit: two batched products, where PyTorch's kernel took 3 to 4 times as long.
  They are those of Transformers' `eager` attention: scores in the model's dtype, softmax in float32.

Everything else is Transformers' `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

__all__ = ["ATTENTION", "attend"]

ATTENTION = "qvlm"
_NOT_OURS = ("position_bias", "cache", "softcap")  # arguments of other models


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
    one_token = query.shape[2] == 1 and query.device.type == "cpu" and not any(kwargs.get(name) is not None for name in _NOT_OURS)
    if one_token and key.shape[1] < query.shape[1] and (attention_mask is None or attention_mask.shape[1] == 1):
        rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
        out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
        return out.reshape(query.shape).transpose(1, 2), None
    if one_token and key.shape[1] == query.shape[1] and query.dtype in (torch.bfloat16, torch.float16):
        return _products(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(torch.dropout(weights, dropout, train=dropout > 0), value)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
