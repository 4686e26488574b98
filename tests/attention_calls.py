"""Calls of `decode_attention`, the exact answer, and how far from it one may be."""

import torch
from torch import Tensor

from qvlm_hf.ops import fast_path

__all__ = ["compare", "exact", "tensors"]


def tensors(heads=4, key_heads=4, keys=9, size=32, dtype=torch.float32, batch=2, seed=0):
    """Query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, 1, size), (batch, key_heads, keys, size), (batch, key_heads, keys, size)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, 1, H, D] in float64, and the largest score of a head that counts [B, 1, H, 1]."""
    key, value = (
        t.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value)
    )
    scores = (query.double() @ key.transpose(-1, -2)) * scale
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else scores + mask.double()
        )
    weights = scores.softmax(-1).nan_to_num(0)  # no key counts: zero, as PyTorch has it
    largest = scores.masked_fill(scores < -1e30, 0).abs().amax(-1, keepdim=True)
    return (weights @ value).transpose(1, 2), largest.transpose(1, 2)


def compare(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
    """The kernel takes the call and errs by float32 arithmetic, and by rounding the output once."""
    with torch.no_grad():
        ours = fast_path.decode_attention(query, key, value, mask, scale)
    expected, largest = exact(query, key, value, mask, scale)
    assert ours.dtype == query.dtype
    assert ours.shape == expected.shape
    assert ours.is_contiguous()
    # a score errs by some roundings of its size, and so does the logarithm of its weight
    arithmetic = (16 + 8 * largest) * torch.finfo(torch.float32).eps * value.double().abs().max()
    rounding = (
        0 if query.dtype == torch.float32 else torch.finfo(query.dtype).eps / 2 * expected.abs()
    )
    assert ((ours.double() - expected).abs() <= arithmetic + rounding).all()
