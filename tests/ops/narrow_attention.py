"""The attention kernel with the vectors of lesser processors: `python narrow_attention.py [FLAG
...]`, flags in place of -march=native.

A process of its own: the kernel is loaded once.
"""

import sys

import torch
from attention_calls import compare, tensors

from qvlm_hf.ops import attention

attention._FLAGS = tuple(flag for flag in attention._FLAGS if flag != "-march=native") + tuple(
    sys.argv[1:]
)
assert attention.load() is None  # compiled, and its own check passed
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16):
    for heads, key_heads, keys, size in (
        (7, 1, 300, 64),
        (4, 4, 129, 33),
        (34, 2, 17, 80),
        (2, 1, 1, 256),
    ):
        query, key, value = tensors(heads, key_heads, keys, size, dtype)
        noise = torch.randn(2, heads, 1, keys)
        for mask in (None, noise > 0, noise, noise[:, :1].bfloat16()):
            compare(query, key, value, mask, size**-0.5)
