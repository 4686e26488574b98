"""Inputs as the first GPU kernel leaves them for the second, to be looked at by tests."""

from types import SimpleNamespace

import torch


def arrange(kernels, x, layout, bits, granularity, scale=None, zero_point=None, *, positions=1):
    """The buffers that `_arrange` fills, by name; rows are a multiple of 16."""
    rows = -(-len(x) // 16) * 16
    inputs = kernels.Inputs(layout, len(x), rows, bits, granularity, x.dtype, scale is not None)
    buffers = inputs.buffers()
    storage = torch.empty(buffers.size, dtype=torch.uint8, device=x.device)
    found = SimpleNamespace(**buffers.tensors(storage))
    between = list(vars(found).values())[:-1]
    kernels.arranging(inputs, positions)(x, scale, zero_point, *between)
    return found


def order(layout):
    """Where input k of a row lies in its arranged row."""
    width = layout.block // layout.slices
    k = torch.arange(layout.in_features)
    within = k % layout.group_length
    block = k // layout.group_length * layout.blocks + within // layout.block
    inner = within % layout.block
    return block * layout.block + inner % layout.slices * width + inner // layout.slices
