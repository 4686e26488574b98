"""Blocks from entropies (eq. 7)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlm_hf.calibration.search.blocks import partition_layers

dependencies = st.lists(st.floats(0, 6, allow_nan=False), max_size=40)
thresholds = st.one_of(
    st.none(), st.floats(-1, 7, allow_nan=False), st.sampled_from([math.inf, -math.inf])
)


def bounds(blocks):
    return [(block.start, block.stop) for block in blocks]


def walk(entropies, depth, h0):
    """Eq. 7 once more, from the words of the paper."""
    blocks, current, inside = [], [0], []
    for layer, entropy in enumerate(entropies, start=1):
        if len(current) + 1 <= depth and math.fsum([*inside, entropy]) / (len(inside) + 1) > h0:
            current, inside = [*current, layer], [*inside, entropy]
        else:
            blocks.append((current[0], current[-1] + 1))
            current, inside = [layer], []
    return [*blocks, (current[0], current[-1] + 1)]


@given(dependencies, st.integers(1, 6), thresholds)
def test_every_layer_is_in_exactly_one_block_in_order_and_no_block_is_too_deep(
    entropies, depth, threshold
):
    blocks, used = partition_layers(entropies, max_block_depth=depth, threshold=threshold)
    layers = [layer for block in blocks for layer in range(block.start, block.stop)]
    assert layers == list(range(len(entropies) + 1))
    assert all(1 <= block.depth == block.stop - block.start <= depth for block in blocks)
    assert threshold is None or used == threshold
    assert partition_layers(tuple(entropies), max_block_depth=depth, threshold=threshold) == (
        blocks,
        used,
    )


@given(dependencies, st.integers(1, 6), thresholds)
def test_blocks_are_those_of_the_walk(entropies, depth, threshold):
    blocks, used = partition_layers(entropies, max_block_depth=depth, threshold=threshold)
    assert bounds(blocks) == walk(entropies, depth, used)


@given(dependencies.filter(bool))
def test_the_default_threshold_is_the_mean(entropies):
    blocks, used = partition_layers(entropies, max_block_depth=3)
    assert used == pytest.approx(math.fsum(entropies) / len(entropies))
    assert blocks == partition_layers(entropies, max_block_depth=3, threshold=used)[0]


def test_the_mean_includes_the_new_pair_and_must_exceed_the_threshold():
    # 3 > 1, (3 + 0) / 2 > 1, (3 + 0 + 0) / 3 = 1 does not exceed 1
    assert bounds(partition_layers([3.0, 0.0, 0.0, 0.0], max_block_depth=9, threshold=1.0)[0]) == [
        (0, 3),
        (3, 4),
        (4, 5),
    ]
    # the pair alone would fail (1 < 2), the mean with it does not: (4 + 1) / 2 > 2
    assert bounds(partition_layers([4.0, 1.0], max_block_depth=3, threshold=2.0)[0]) == [(0, 3)]
    # equal is not enough
    assert bounds(partition_layers([2.0], max_block_depth=3, threshold=2.0)[0]) == [(0, 1), (1, 2)]
    # a new block starts with a fresh mean: the 9 of the first block does not help the second
    assert bounds(partition_layers([9.0, 9.0, 1.0, 1.0], max_block_depth=2, threshold=2.0)[0]) == [
        (0, 2),
        (2, 3),
        (3, 4),
        (4, 5),
    ]


def test_errors():
    with pytest.raises(ValueError, match=r"max_block_depth=0 must be at least 1"):
        partition_layers([1.0], max_block_depth=0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"must be finite: the hidden states are not"):
            partition_layers([1.0, bad], max_block_depth=3, threshold=0.5)
