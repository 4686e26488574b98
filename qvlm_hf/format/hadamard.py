"""The normalised Hadamard transform in consecutive blocks of the last dimension.

Sylvester's construction, H_2b = [[H_b, H_b], [H_b, -H_b]], divided by sqrt(b): symmetric and its
own inverse, so the same function transforms inputs, folds into weights and undoes both. Computed as
log2(b) butterfly passes, never as a matrix.
"""

import math

from torch import Tensor

from qvlm_hf.format.scheme import MAX_HADAMARD_BLOCK

__all__ = ["block_hadamard", "largest_block"]


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Multiplies each run of `block` values by the normalised Hadamard matrix.

    Args:
        x: [..., K], floating point.
        block: a power of two that divides K.

    Returns:
        New tensor of x's shape and dtype.

    Raises:
        ValueError: `block` is no power of two or does not divide K.
    """
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(
            f"a Hadamard block of {block} must be a power of two that divides {x.shape[-1]}."
        )
    y = x
    width = 1
    while width < block:
        pairs = y.unflatten(-1, (-1, 2, width))
        first, second = pairs.select(-2, 0), pairs.select(-2, 1)
        y = pairs.new_empty(pairs.shape)
        y.select(-2, 0).copy_(first + second)
        y.select(-2, 1).copy_(first - second)
        y = y.flatten(-3)
        width *= 2
    root = math.sqrt(block)
    # CUDA multiplies by the reciprocal of a number; 16 bits do not hold this one
    return y / (y.new_full((), root) if y.itemsize >= 4 else root)


def largest_block(in_features: int) -> int:
    """Returns the largest power of two that divides `in_features`, at most 4096."""
    return min(in_features & -in_features, MAX_HADAMARD_BLOCK)
