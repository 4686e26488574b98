"""The byte layout of a packed weight, drawn here alone.

A row of unsigned integers becomes a bit stream in int32 words, lowest bits first:

    value k of the row occupies bits k*bits ... k*bits+bits-1 of the stream,
    bit i of the stream is bit i % 32 of word i // 32, the rest of the last word is zero.

    bits = 4:  word 0 = | v7 | v6 | v5 | v4 | v3 | v2 | v1 | v0 |      (v0 in the low nibble)
    bits = 6:  v5 lies in bits 30..35: its low 2 bits end word 0, its high 4 bits begin word 1

For 4 and 8 bits this is the layout of compressed-tensors' pack-quantized. Rows never share a word.
"""

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

_WORD = 32


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs unsigned integers into int32 words.

    Args:
        values: [rows, in_features], any integer dtype, each from 0 to 2^bits - 1.
        bits: bits of one value, 1 to 8.

    Returns:
        int32 [rows, ceil(in_features * bits / 32)].

    Raises:
        ValueError: `values` is not 2-D or a value does not fit into `bits`.
    """
    if values.dim() != 2:
        raise ValueError(f"values of shape {tuple(values.shape)} must be [rows, in_features].")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**bits):
        raise ValueError(
            f"values from {int(values.min())} to {int(values.max())} do not fit into {bits} bits."
        )
    rows, length = values.shape
    word, offset = _places(length, bits, values.device)
    words = -(-length * bits // _WORD)
    # one spare word takes the spill of the last value
    stream = values.new_zeros((rows, words + 1), dtype=torch.int64)
    shifted = values.to(torch.int64) << offset
    # No two values share a bit, so adding is or-ing.
    stream.index_add_(1, word, shifted & 0xFFFFFFFF)
    stream.index_add_(1, word + 1, shifted >> _WORD)
    return _as_int32(stream[:, :words])


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Reads the integers of `pack` back.

    Args:
        packed: int32 [rows, ceil(length * bits / 32)].
        bits: bits of one value, 1 to 8.
        length: values per row.

    Returns:
        uint8 [rows, length].

    Raises:
        ValueError: the number of words does not belong to `length` values.
    """
    words = -(-length * bits // _WORD)
    if packed.dim() != 2 or packed.shape[1] != words:
        raise ValueError(
            f"a packed weight of shape {tuple(packed.shape)} does not hold {length} values of "
            f"{bits} bits ({words} words a row)."
        )
    mask = 2**bits - 1
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, device=packed.device, dtype=torch.int32)
        values = ((packed.unsqueeze(-1) >> shifts) & mask).to(torch.uint8)
        return values.flatten(1)[:, :length].contiguous()
    word, offset = _places(length, bits, packed.device)
    stream = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    low, high = stream[:, word], stream[:, word + 1]
    return (((low >> offset) | (high << (_WORD - offset))) & mask).to(torch.uint8)


def _places(length: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Word index and bit offset, both int64 [length], of every value of a row."""
    position = torch.arange(length, device=device, dtype=torch.int64) * bits
    return position // _WORD, position % _WORD


def _as_int32(words: Tensor) -> Tensor:
    """int64 words 0 ... 2^32-1 to the int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
