import re

import numpy as np
import pytest
import torch

from qvlm_hf.format.hadamard import block_hadamard, largest_block


def matrix(block):
    """The +-1 matrix from its definition: the sign of (i, j) is the parity of the bits that i and j share."""
    index = np.arange(block)
    shared = index[:, None] & index[None, :]
    parity = np.zeros_like(shared)
    while shared.any():
        parity ^= shared & 1
        shared = shared >> 1
    return 1.0 - 2.0 * parity


@pytest.mark.parametrize("block", [1, 2, 4, 8, 32, 128, 4096])
@pytest.mark.parametrize("blocks", [1, 3])
def test_equals_the_explicit_matrix(block, blocks):
    x = torch.randn(2, 3, block * blocks, dtype=torch.float64)
    expected = np.einsum(
        "abgk,jk->abgj", x.numpy().reshape(2, 3, blocks, block), matrix(block) / np.sqrt(block)
    ).reshape(x.shape)
    y = block_hadamard(x, block)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        block_hadamard(x.float(), block).numpy(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("block", [2, 8, 64, 4096])
def test_matrix_is_symmetric_and_its_own_inverse(block):
    x = torch.randn(3, 2 * block, dtype=torch.float64)
    torch.testing.assert_close(
        block_hadamard(block_hadamard(x, block), block), x, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(block_hadamard(x, block).norm(dim=-1), x.norm(dim=-1))
    if block <= 64:
        h = block_hadamard(torch.eye(block, dtype=torch.float64), block)
        assert torch.equal(h, h.T)


@pytest.mark.parametrize(
    ("in_features", "block"),
    [
        (344, 8),
        (11008, 256),
        (4304, 16),
        (4096, 4096),
        (8192, 4096),
        (1024, 1024),
        (13824, 512),
        (7, 1),
        (2, 2),
    ],
)
def test_largest_block(in_features, block):
    assert largest_block(in_features) == block


@pytest.mark.parametrize("in_features", [344, 11008, 4304])
def test_sizes_of_real_models(in_features):
    block = largest_block(in_features)
    x = torch.randn(2, in_features, dtype=torch.float64)
    expected = (x.view(2, -1, block) @ torch.from_numpy(matrix(block)).T / block**0.5).view(2, -1)
    torch.testing.assert_close(block_hadamard(x, block), expected, rtol=0, atol=1e-12)


def test_returns_a_new_tensor_and_takes_views_and_empty_input():
    x = torch.randn(16, 6).T
    before = x.clone()
    for block in (1, 8):
        y = block_hadamard(x, block)
        assert torch.equal(x, before)
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(y, block_hadamard(x.contiguous(), block))
    assert block_hadamard(torch.zeros(0, 16), 8).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype(dtype):
    assert block_hadamard(torch.ones(2, 8, dtype=dtype), 8).dtype == dtype


@pytest.mark.parametrize(("block", "length"), [(0, 8), (-2, 8), (3, 9), (6, 12), (8, 12), (16, 8)])
def test_refuses_other_blocks(block, length):
    message = f"a Hadamard block of {block} must be a power of two that divides {length}."
    with pytest.raises(ValueError, match=re.escape(message)):
        block_hadamard(torch.zeros(2, length), block)
