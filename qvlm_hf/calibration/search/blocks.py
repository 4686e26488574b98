"""The partition into blocks (eq. 7): layers that depend on each other are searched together.

Walk a segment from its first layer; extend the current block while the mean dependency inside it,
the new pair included, exceeds the threshold h0 and the block is not yet `max_block_depth` layers
deep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "partition_layers"]


@dataclass(frozen=True)
class Block:
    """Consecutive layers start ... stop-1 of a segment that are searched jointly."""

    start: int
    stop: int

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.stop - self.start


def partition_layers(
    dependencies: Sequence[float], *, max_block_depth: int, threshold: float | None = None
) -> tuple[tuple[Block, ...], float]:
    """Partitions a segment of len(dependencies) + 1 layers (eq. 7).

    Args:
        dependencies: D(k, k+1) in nats of each pair of consecutive layers.
        max_block_depth: layers of a block at most.
        threshold: h0 in nats; None is the mean of `dependencies`.

    Returns:
        The blocks, in order, every layer in exactly one, and the threshold that was used (0 where
        there is no pair).

    Raises:
        ValueError: a dependency is not finite, or the depth is below 1.
    """
    if max_block_depth < 1:
        raise ValueError(f"max_block_depth={max_block_depth} must be at least 1.")
    if not all(math.isfinite(d) for d in dependencies):
        raise ValueError(
            f"the dependencies {list(dependencies)} must be finite: the hidden states are not."
        )
    if threshold is None:
        threshold = math.fsum(dependencies) / len(dependencies) if dependencies else 0.0
    blocks, start = [], 0
    for layer in range(1, len(dependencies) + 1):
        inside = dependencies[start:layer]
        if layer - start < max_block_depth and math.fsum(inside) / len(inside) > threshold:
            continue
        blocks.append(Block(start, layer))
        start = layer
    return (*blocks, Block(start, len(dependencies) + 1)), threshold
