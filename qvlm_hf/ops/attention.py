"""`qvlm_hf::decode_attention`: attention of one query token over cached keys and values.

On CPUs a C++ file computes it for float32 and bfloat16. It is compiled where it runs and checked
before it is used, like the kernels of linear layers. What it does not take, and everything where
there is no compiler, is `attend_with_pytorch`: the fastest way that PyTorch's operators have.

Left out: float16, head sizes below 32 and above 256, gradients and dropout in C++.

Legend: B sequences, H query heads, H_kv key heads (H is a multiple), S keys, D head size.
"""

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional

from qvlm_hf.ops import fast_path, native
from qvlm_hf.ops.library import can_fuse, define

__all__ = ["attend_with_pytorch", "decode_attention", "load"]

_SOURCES = native.sources("attention.cpp", "attention_call.h")
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=fast"),
    *("-std=c++20", "-fopenmp", "-shared", "-fPIC"),
)
_DTYPES = (torch.float32, torch.bfloat16)
_SIZES = range(32, 257)  # of heads
# H, H_kv, S, D: groups of every tile, short and several chunks, sizes that are no whole vectors.
_CHECKED = (
    (8, 1, 300, 64, torch.bfloat16),
    (7, 7, 16, 33, torch.float32),
    (6, 2, 129, 128, torch.float32),
    (34, 2, 40, 80, torch.bfloat16),
)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * query key^T + mask) value, of one query token.

    Args:
        query: [B, H, 1, D], floating point.
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D].
        mask: [B or 1, H or 1, 1, S], True where a key counts, or what is added to its score; None
            if all count.
        scale: of the scores; None is D^-0.5.

    Returns:
        [B, 1, H, D] in the dtype of `query`, zero where no key counts: the layout that the output
        projection reads.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        # PyTorch's operators are compiled together with what surrounds them: only what the kernel
        # takes goes past that
        taken = can_fuse(query) and query.dtype in _DTYPES and query.shape[-1] in _SIZES
        compute = torch.ops.qvlm_hf.decode_attention.default if taken else attend_with_pytorch
        return compute(query, key, value, mask, scale)
    # `is True`: torch.fx traces with stand-ins that are neither
    if query.is_cpu is True:
        found = fast_path.decode_attention(query, key, value, mask, scale)
        if found is not None:
            return found
    return (_compute if can_fuse(query) else attend_with_pytorch)(query, key, value, mask, scale)


def attend_with_pytorch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """`decode_attention` of PyTorch's operators; arguments as there.

    Fewer key heads than query heads: the queries of a group become rows of one product, so that a
    key head is read once. As many, 16-bit: two batched products and a softmax in float32, as
    Transformers' `eager` attention has them; PyTorch's kernel took 3 to 4 times as long.
    """
    batch, heads, _, size = query.shape
    key_heads = key.shape[1]
    if key_heads == heads and query.dtype in (torch.bfloat16, torch.float16):
        scores = torch.matmul(query, key.transpose(-1, -2)) * scale
        if mask is not None:
            closed = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, float("-inf")) if closed else scores + mask
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value).transpose(1, 2).contiguous()
    rows = query.reshape(batch, key_heads, -1, size)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], key_heads, -1, mask.shape[-1])
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, size).contiguous()


@functools.cache
def load() -> str | None:
    """Lets `fast_path.decode_attention` take calls, once per process; returns why not, or None."""
    log = logging.getLogger(__name__)
    if wrong := fast_path.load():  # which has warned
        log.info("attention of one token is computed by PyTorch: %s", wrong)
        return wrong
    try:
        library = native.load(native.library, _SOURCES, _FLAGS, native.openmp())
    except native.ERRORS as error:
        wrong = str(error)
    else:
        fast_path.use("trial_attention", native.address(library.qvlm_attend))
        wrong = native.in_clean_thread(_self_check)
        if wrong is None:
            fast_path.use("decode_attention", native.address(library.qvlm_attend))
    if wrong is not None:
        log.warning(
            "attention of one token is computed by PyTorch, 1.1 to 1.8 times slower "
            "(docs/benchmarks.md): %s",
            wrong,
        )
    return wrong


@torch.no_grad()
def _self_check() -> str | None:
    """The first small case that differs from PyTorch in float64, in words, or None."""
    generator = torch.Generator().manual_seed(0)
    for heads, key_heads, keys, size, dtype in _CHECKED:
        cached = (2, key_heads, keys, size)
        query, key, value, noise = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((2, heads, 1, size), cached, cached, (2, 1, 1, keys))
        )
        atol = 0.01 if dtype == torch.bfloat16 else 1e-5
        for mask in (None, noise > -1, noise):
            y = fast_path.trial_attention(query, key, value, mask, 0.3)
            exact_mask = noise.double() if mask is noise else mask
            exact = attend_with_pytorch(
                query.double(), key.double(), value.double(), exact_mask, 0.3
            )
            if y is None or not torch.allclose(y.double(), exact, rtol=0.01, atol=atol):
                return (
                    f"the compiled kernel is wrong for {heads} heads, {key_heads} key heads of "
                    f"{size}, {keys} keys, {dtype}"
                )
    return None


def _compute(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """By the kernel if it takes the call."""
    if load() is None:
        with torch.no_grad():  # the operator stands below what records gradients
            found = fast_path.decode_attention(query, key, value, mask, scale)
        if found is not None:
            return found
    return attend_with_pytorch(query, key, value, mask, scale)


define(  # for inference: what torch.compile puts into its graph
    "decode_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor",
    fake=lambda query, *_: query.new_empty(
        (*query.shape[:1], *query.shape[2:0:-1], query.shape[3])
    ),
    kernels={"CompositeExplicitAutograd": attend_with_pytorch, "CPU": _compute},
    instead="call it under torch.no_grad(), or qvlm_hf.ops.decode_attention",
)
