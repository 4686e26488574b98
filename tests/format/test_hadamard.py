import re

import numpy as np
import pytest
import torch

from qvlm_hf.format.hadamard import block_hadamard, largest_block


def matrix(block):
    """From the definition: the sign of (i, j) is the parity of the bits that i and j share."""
    index = np.arange(block)
    shared = index[:, None] & index[None, :]
    parity = np.zeros_like(shared)
    while shared.any():
        parity ^= shared & 1
        shared = shared >> 1
    return (1.0 - 2.0 * parity) / np.sqrt(block)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 32, 128, 4096])
@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_the_explicit_matrix_which_is_its_own_inverse(block, blocks):
    x = torch.randn(2, 3, blocks, block, dtype=torch.float64)
    expected = (x.numpy() @ matrix(block).T).reshape(2, 3, -1)
    x = x.flatten(-2)
    y = block_hadamard(x, block)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        block_hadamard(x.float(), block).numpy(), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(block_hadamard(y, block), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("in_features", "block"),
    [
        *[(344, 8), (11008, 256), (4304, 16), (4096, 4096), (8192, 4096), (1024, 1024)],
        *[(13824, 512), (7, 1), (2, 2)],
    ],
)
def test_largest_block(in_features, block):
    assert largest_block(in_features) == block


def test_returns_a_new_tensor_and_takes_views_and_empty_input():
    x = torch.randn(16, 6).T
    before = x.clone()
    for block in (1, 8):
        y = block_hadamard(x, block)
        assert torch.equal(x, before)
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(y, block_hadamard(x.contiguous(), block))
    for dtype in (torch.bfloat16, torch.float16):
        empty = block_hadamard(torch.zeros(0, 16, dtype=dtype), 8)
        assert (empty.shape, empty.dtype) == ((0, 16), dtype)


@pytest.mark.parametrize(("block", "length"), [(0, 8), (-2, 8), (3, 9), (6, 12), (8, 12), (16, 8)])
def test_refuses_other_blocks(block, length):
    message = f"a Hadamard block of {block} must be a power of two that divides {length}."
    with pytest.raises(ValueError, match=re.escape(message)):
        block_hadamard(torch.zeros(2, length), block)
