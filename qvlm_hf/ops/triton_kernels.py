"""GPU kernels of `qvlm_hf::linear` in Triton, straight from the packed bytes on disk.

The only file that imports triton.

    y[m, n] = bias[n] + r[m] * sum_g ws[n, g] * sum_{k in g} a[m, k] (w[n, k] - zp[n, g])

Two steps. `arrange` quantizes the inputs (a norm or SwiGLU can be part of it) into int8 and writes
them in the order in which the weights come out of their bytes; `multiply` unpacks weights in
registers, multiplies on the integer matrix units with int32 sums, takes the zero points off as
integers and scales each group in float32. Floating-point inputs go the same way with float sums.

Order. The inputs of a group are padded with zeros to blocks of `block`; a block is cut into
`slices`: slice s holds the inputs s, s + slices, s + 2 slices ... of the block, so that a shift and
a mask of whole bytes (2, 4, 8 bits) give a slice of weights and nothing is shuffled. Other widths
cut four values at a time out of two words and have four slices.

Integers. a = q - z fits into int8 up to 7 bits. At 8 bits q - 128 is multiplied; the missing 128 -
z comes from one or two more rows of inputs ("more") against the same weights: ones, times 128 - z
of the token, or 128 - z per input in two halves. Weights of 8 bits are multiplied as w - 128, and
their zero points are 128 smaller.

Legend: M tokens, N out_features, K in_features, G groups of L inputs (the last may be short), B
blocks of a group, KP = G * B * block.
"""

# Kernels in Triton's own style: untyped, constants in capitals, branches that only the compiler
# sees.
# ruff: noqa: ANN001, ANN202, C901, N803, N806, RET505, SIM102
# mypy: disable-error-code="no-untyped-def, attr-defined"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Arranged", "Layout", "Tile", "arrange", "multiply"]

_ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds half to even, below 2^22


@dataclass(frozen=True)
class Layout:
    """How the inputs of one module lie for `multiply`.

    Attributes:
        in_features: K.
        group_length: L.
        weight_bits: bits of a weight.
        block: inputs of a block.
    """

    in_features: int
    group_length: int
    weight_bits: int
    block: int

    @staticmethod
    def of(in_features: int, group_length: int, weight_bits: int) -> "Layout":
        """The layout of a module: blocks of 128 inputs, smaller for small groups (slices >= 32)."""
        least = 32 * _slices(weight_bits, _bytewise(group_length, in_features, weight_bits))
        return Layout(
            in_features,
            group_length,
            weight_bits,
            min(128, max(least, triton.next_power_of_2(group_length))),
        )

    @property
    def groups(self) -> int:
        """G."""
        return -(-self.in_features // self.group_length)

    @property
    def blocks(self) -> int:
        """B, blocks of a group."""
        return -(-self.group_length // self.block)

    @property
    def padded(self) -> int:
        """KP."""
        return self.groups * self.blocks * self.block

    @property
    def bytewise(self) -> bool:
        """Whether slices are cut out of bytes, or out of words at any bit."""
        return _bytewise(self.group_length, self.in_features, self.weight_bits)

    @property
    def runs(self) -> bool:
        """Whether slices are cut out of whole runs of 32 values.

        A group begins at a word then, and a row has at least one run.
        """
        return (
            not self.bytewise
            and (self.groups == 1 or self.group_length % 32 == 0)
            and self.in_features % 32 == 0
        )

    @property
    def slices(self) -> int:
        """Slices of a block."""
        return _slices(self.weight_bits, self.bytewise)

    @property
    def whole(self) -> bool:
        """Whether no group is padded: then no read of a weight needs a mask."""
        return self.in_features == self.padded


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch of `multiply`.

    Attributes:
        out_features: rows of the weight a program works on.
        tokens: tokens it works on.
        warps: warps of a program.
        stages: loads in flight.
    """

    out_features: int
    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Arranged:
    """Inputs as `multiply` reads them; rows and columns beyond M hold anything.

    Attributes:
        values: [terms, rows >= M, KP], int8 or floating point (two terms add up to a value that 16
            bits cannot hold).
        sums: int32 [G * B, rows], over each block of an int8 row; None for floats.
        more: int8 [rows, KP], correction rows, or None.
        more_sums: int32 [G * B], their sums, or None.
        shift: int32 [rows], factor of the correction, or None.
        row_scale: float32 [rows], r, or None for 1.
        tokens: M.
        bound: no sum of a group's products is larger.
    """

    values: Tensor
    sums: Tensor | None
    more: Tensor | None
    more_sums: Tensor | None
    shift: Tensor | None
    row_scale: Tensor | None
    tokens: int
    bound: int


def arrange(
    x: Tensor,
    layout: Layout,
    bits: int,
    granularity: str,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    *,
    rows: int,
    source: str = "plain",
    other: Tensor | None = None,
    norm_bias: Tensor | None = None,
    epsilon: float = 0.0,
) -> Arranged:
    """Quantizes inputs, rounding as the reference does, and lays them out for `multiply`.

    Args:
        x: [M, K], contiguous.
        layout: of the module.
        bits: of an input, 3 to 8; not read for granularity "none".
        granularity: as in the scheme; for "token" the position of token m is m modulo the number of
            positions.
        input_scale: float32, as in `ops.schema.linear`.
        input_zero_point: int32, as in `ops.schema.linear`.
        rows: rows to allocate, at least M.
        source: what is computed first, rounded to x's dtype where Transformers rounds: "plain"
            nothing; "rms_norm" LlamaRMSNorm; "layer_norm" nn.LayerNorm; "swiglu" silu(x) * other.
        other: [K] weight of the norm, or [M, K] the second factor of "swiglu"; of x's dtype.
        norm_bias: [K], of "layer_norm".
        epsilon: of the norm.

    Returns:
        The inputs; for granularity "none" floating point: x's dtype, or two bfloat16 terms where a
        16-bit x is divided by `input_scale`.
    """
    tokens, floating = x.shape[0], granularity == "none"
    terms = 2 if floating and input_scale is not None and x.dtype != torch.float32 else 1
    dtype = torch.int8 if not floating else torch.bfloat16 if terms == 2 else x.dtype
    number = layout.groups * layout.blocks
    extra = 0 if floating or bits < 8 else 2 if granularity == "channel" else 1

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    arranged = Arranged(
        values=empty(terms, rows, layout.padded, dtype=dtype),
        sums=None if floating else empty(number, rows),
        more=empty(extra, layout.padded, dtype=torch.int8) if extra else None,
        more_sums=empty(number) if extra else None,
        shift=empty(rows) if extra == 1 else None,
        row_scale=empty(rows, dtype=torch.float32)
        if granularity in ("token", "dynamic_token")
        else None,
        tokens=tokens,
        bound=layout.group_length * (2**bits - 1) * (2**layout.weight_bits - 1),
    )
    at_once = max(1, 1024 // layout.block)
    # A token is a program's work, or, where there are few, that of up to eight, each of which takes
    # the token's statistics by itself.
    parts = max(1, min(8 if tokens <= 64 else 1, number // at_once))
    _arrange[(tokens, parts)](
        x, other, norm_bias, input_scale, input_zero_point, arranged.values, arranged.sums,
        arranged.more, arranged.more_sums, arranged.shift, arranged.row_scale, layout.in_features,
        layout.group_length, number, rows, 1 if input_scale is None else input_scale.shape[0],
        epsilon, BITS=bits, GRANULARITY=granularity, SOURCE=source,
        HAS_SCALE=input_scale is not None, TERMS=terms, EXTRA=extra, ROUND=_ROUND,
        BLOCK=layout.block, BLOCKS=layout.blocks, SLICES=layout.slices, AT_ONCE=at_once,
        CHUNK=min(2048, triton.next_power_of_2(layout.in_features)), num_warps=4,
    )  # fmt: skip
    return arranged


def multiply(
    inputs: Arranged,
    layout: Layout,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    splits: int,
) -> Tensor:
    """Inputs times packed weights.

    Args:
        inputs: of `arrange`, with rows a multiple of the tile's tokens.
        layout: the one they were arranged for.
        weight: int32 [N, W], packed.
        weight_scale: bfloat16 [N, G].
        weight_zero_point: uint8 [N, G] or None for 2^(bits - 1).
        bias: [N] or None.
        dtype: of the result.
        tile: sizes of the launch.
        splits: parts of K that are summed apart, in a fixed order; 1 for many tokens.

    Returns:
        [M, N].
    """
    tokens, out_features = inputs.tokens, weight.shape[0]
    y = torch.empty((tokens, out_features), dtype=dtype, device=weight.device)
    partial = (
        torch.empty((splits, tokens, out_features), dtype=torch.float32, device=weight.device)
        if splits > 1
        else y
    )
    bytes_ = layout.bytewise
    grid = (triton.cdiv(out_features, tile.out_features), triton.cdiv(tokens, tile.tokens), splits)
    _multiply[grid](
        inputs.values, inputs.sums, inputs.more, inputs.more_sums, inputs.shift, inputs.row_scale,
        weight.view(torch.uint8) if bytes_ else weight, weight_scale, weight_zero_point, bias,
        partial, tokens, out_features, weight.shape[1] * (4 if bytes_ else 1), layout.groups,
        layout.group_length * layout.weight_bits // (8 if bytes_ else 1), inputs.values.shape[1],
        triton.cdiv(layout.groups if layout.groups > 1 else layout.blocks, splits),
        BITS=layout.weight_bits, SLICES=layout.slices, BYTEWISE=bytes_, RUNS=layout.runs,
        WHOLE=layout.whole, BLOCK=layout.block, BLOCKS=layout.blocks, ONE_GROUP=layout.groups == 1,
        EXTRA=0 if inputs.more is None else inputs.more.shape[0], TERMS=inputs.values.shape[0],
        FLOATING=inputs.sums is None, SMALL=inputs.bound < 2**22, FLOAT_START=_ROUND,
        SPLIT=splits > 1, EVEN=out_features % tile.out_features == 0, TN=tile.out_features,
        TM=tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        columns = 256
        _add_parts[(triton.cdiv(out_features, columns), tokens)](
            partial,
            inputs.row_scale,
            bias,
            y,
            tokens,
            out_features,
            SPLITS=splits,
            COLUMNS=columns,
            num_warps=4,
        )
    return y


def _bytewise(group_length: int, in_features: int, bits: int) -> bool:
    return bits in (2, 4, 8) and (group_length * bits % 8 == 0 or group_length >= in_features)


def _slices(bits: int, bytewise: bool) -> int:
    return 8 // bits if bytewise else 4


@triton.jit
def _source(x_ptr, other_ptr, norm_bias_ptr, row, k, exists, mean, factor, SOURCE: tl.constexpr):
    """Float32 values k of a token before quantizing, rounded to its dtype where the model would."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + k, mask=exists, other=0.0).to(tl.float32)
    if SOURCE == "rms_norm":
        x = (x * factor).to(dtype).to(tl.float32)
        x = (
            (tl.load(other_ptr + k, mask=exists, other=0.0).to(tl.float32) * x)
            .to(dtype)
            .to(tl.float32)
        )
    elif SOURCE == "layer_norm":
        x = (x - mean) * factor * tl.load(other_ptr + k, mask=exists, other=0.0).to(tl.float32)
        x = (
            (x + tl.load(norm_bias_ptr + k, mask=exists, other=0.0).to(tl.float32))
            .to(dtype)
            .to(tl.float32)
        )
    elif SOURCE == "swiglu":
        x = tl.math.div_rn(x, 1.0 + tl.exp(-x)).to(dtype).to(tl.float32)
        x = (
            (x * tl.load(other_ptr + row + k, mask=exists, other=0.0).to(tl.float32))
            .to(dtype)
            .to(tl.float32)
        )
    return x


@triton.jit
def _norm_statistics(x_ptr, row, K, epsilon, SOURCE: tl.constexpr, CHUNK: tl.constexpr):
    """A token's mean (0 for RMSNorm) and the factor 1 / sqrt(variance + epsilon)."""
    mean = 0.0
    if SOURCE == "layer_norm":
        total = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, K, CHUNK):
            k = start + tl.arange(0, CHUNK)
            total += tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
        mean = tl.math.div_rn(tl.sum(total, 0), K * 1.0)
    squares = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
        x = tl.where(k < K, x - mean, 0.0)
        squares += x * x
    return mean, tl.rsqrt(tl.math.div_rn(tl.sum(squares, 0), K * 1.0) + epsilon)


@triton.jit(do_not_specialize=["number", "positions"])
def _arrange(
    x_ptr, other_ptr, norm_bias_ptr, input_scale_ptr, input_zero_point_ptr, values_ptr, sums_ptr,
    more_ptr, more_sums_ptr, shift_ptr, row_scale_ptr, K, L, number, rows, positions, epsilon,
    BITS: tl.constexpr, GRANULARITY: tl.constexpr, SOURCE: tl.constexpr, HAS_SCALE: tl.constexpr,
    TERMS: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    SLICES: tl.constexpr, AT_ONCE: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (m, part): statistics of token m, then every `parts`-th run of AT_ONCE blocks."""
    m = tl.program_id(0)
    row = m.to(tl.int64) * K
    mean, factor = 0.0, 1.0
    if SOURCE == "rms_norm" or SOURCE == "layer_norm":
        mean, factor = _norm_statistics(x_ptr, row, K, epsilon, SOURCE, CHUNK)
    top: tl.constexpr = 2**BITS - 1
    scale, zero_point = 1.0, 0.0
    if GRANULARITY == "token":
        scale = tl.load(input_scale_ptr + m % positions)
        zero_point = tl.load(input_zero_point_ptr + m % positions).to(tl.float32)
    if GRANULARITY == "dynamic_token":
        low = tl.zeros((CHUNK,), tl.float32)  # a range holds 0
        high = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, K, CHUNK):
            k = start + tl.arange(0, CHUNK)
            x = _source(x_ptr, other_ptr, norm_bias_ptr, row, k, k < K, mean, factor, SOURCE)
            x = tl.where(k < K, x, 0.0)
            low = tl.minimum(low, x)
            high = tl.maximum(high, x)
        lowest = tl.min(low, 0)
        scale = tl.math.div_rn(tl.max(high, 0) - lowest, top * 1.0)
        scale = tl.where(scale > 0, scale, 1.0)
        zero_point = tl.math.div_rn(-lowest, scale)
        zero_point = tl.minimum((zero_point + ROUND) - ROUND, top * 1.0)
    if (GRANULARITY == "token" or GRANULARITY == "dynamic_token") and tl.program_id(1) == 0:
        tl.store(row_scale_ptr + m, scale)
        if EXTRA == 1:
            tl.store(shift_ptr + m, 128 - zero_point.to(tl.int32))

    place = tl.arange(0, BLOCK)[None, :]
    inner = place % (BLOCK // SLICES) * SLICES + place // (
        BLOCK // SLICES
    )  # which input of its block lies there
    for first in range(tl.program_id(1) * AT_ONCE, number, tl.num_programs(1) * AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        group = block // BLOCKS
        k = (group * L + block % BLOCKS * BLOCK)[:, None] + inner
        exists = k < tl.minimum((group + 1) * L, K)[:, None]
        written = (block < number)[:, None]
        target = m.to(tl.int64) * number * BLOCK + block[:, None] * BLOCK + place
        x = _source(x_ptr, other_ptr, norm_bias_ptr, row, k, exists, mean, factor, SOURCE)
        if GRANULARITY == "none":
            if HAS_SCALE:
                x = tl.math.div_rn(x, tl.load(input_scale_ptr + k, mask=exists, other=1.0))
            x = tl.where(exists, x, 0.0)
            value = x.to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + target, value, mask=written)
            if TERMS == 2:
                rest = (x - value.to(tl.float32)).to(values_ptr.dtype.element_ty)
                tl.store(
                    values_ptr + rows.to(tl.int64) * number * BLOCK + target, rest, mask=written
                )
        else:
            if GRANULARITY == "channel":
                step = tl.load(input_scale_ptr + k, mask=exists, other=1.0)
                zero = tl.load(input_zero_point_ptr + k, mask=exists, other=0).to(tl.float32)
            else:
                step = tl.zeros((AT_ONCE, BLOCK), tl.float32) + scale
                zero = tl.zeros((AT_ONCE, BLOCK), tl.float32) + zero_point
            # bounds are whole numbers, so clamping before rounding gives the same
            a = tl.minimum(tl.maximum(tl.math.div_rn(x, step), -zero), top - zero)
            a = ((a + ROUND) - ROUND).to(tl.int32)
            missing = 128 - zero.to(tl.int32)
            if BITS == 8:
                a -= missing
            a = tl.where(exists, a, 0)
            tl.store(values_ptr + target, a.to(tl.int8), mask=written)
            tl.store(sums_ptr + block * rows + m, tl.sum(a, 1), mask=block < number)
            if EXTRA > 0:
                if m == 0:
                    missing = tl.where(exists, missing, 0)
                    ones = tl.where(exists, 1, 0)
                    if EXTRA == 2:
                        half = missing >> 1  # 128 itself does not fit into int8
                        tl.store(more_ptr + target, half.to(tl.int8), mask=written)
                        tl.store(
                            more_ptr + number * BLOCK + target,
                            (missing - half).to(tl.int8),
                            mask=written,
                        )
                        tl.store(more_sums_ptr + block, tl.sum(missing, 1), mask=block < number)
                    else:
                        tl.store(more_ptr + target, ones.to(tl.int8), mask=written)
                        tl.store(more_sums_ptr + block, tl.sum(ones, 1), mask=block < number)


@triton.jit
def _cut(packed, BITS: tl.constexpr, s: tl.constexpr):
    """Value s of each byte, as int8.

    In assembly, or the compiler takes every register apart into bytes and puts it together again.
    """
    if BITS == 4 and s == 0:
        return _four_bytes(packed, "and.b32 $0, $1, 0x0f0f0f0f;")
    elif BITS == 4:
        return _four_bytes(packed, "shr.b32 $0, $1, 4; and.b32 $0, $0, 0x0f0f0f0f;")
    elif s == 0:
        return _four_bytes(packed, "and.b32 $0, $1, 0x03030303;")
    elif s == 1:
        return _four_bytes(packed, "shr.b32 $0, $1, 2; and.b32 $0, $0, 0x03030303;")
    elif s == 2:
        return _four_bytes(packed, "shr.b32 $0, $1, 4; and.b32 $0, $0, 0x03030303;")
    else:
        return _four_bytes(packed, "shr.b32 $0, $1, 6; and.b32 $0, $0, 0x03030303;")


@triton.jit
def _four_bytes(packed, CODE: tl.constexpr):
    """Runs CODE on registers of four bytes."""
    return tl.inline_asm_elementwise(CODE, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _four_values(weight_ptr, run, BITS: tl.constexpr, i: tl.constexpr):
    """Values 4 i ... 4 i + 3 of runs of 32 values (BITS words), in the low bits of a word."""
    WORD: tl.constexpr = 4 * BITS * i // 32
    SHIFT: tl.constexpr = 4 * BITS * i % 32
    values = tl.load(weight_ptr + run + WORD).to(tl.uint32, bitcast=True) >> SHIFT
    if SHIFT + 4 * BITS > 32:
        values = values | (
            tl.load(weight_ptr + run + WORD + 1).to(tl.uint32, bitcast=True) << (32 - SHIFT)
        )
    return values


@triton.jit
def _products(
    sums, more_sums, zero_point, values_ptr, more_ptr, weight_ptr, n_offset, m_offset, term_stride,
    row_size, padded, start, block, BITS: tl.constexpr, SLICES: tl.constexpr,
    BYTEWISE: tl.constexpr, RUNS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    EXTRA: tl.constexpr, TERMS: tl.constexpr, FLOATING: tl.constexpr,
):  # fmt: skip
    """Adds one block's products: weights [TN, slice] x inputs [slice, TM] for each slice.

    The block starts at `start` in a row, in bytes where slices are cut out of bytes, else in bits.
    """
    WIDTH: tl.constexpr = BLOCK // SLICES
    j = tl.arange(0, WIDTH)
    if BYTEWISE:
        place = start + j
        if not WHOLE:
            place = tl.minimum(
                place, row_size - 1
            )  # beyond the row inputs are 0, whatever weight they meet
        packed = tl.load(weight_ptr + n_offset[:, None] + place[None, :])
    elif RUNS:
        run = n_offset[:, None] + start // 32 + tl.arange(0, BLOCK // 32)[None, :] * BITS
        if not WHOLE:
            run = tl.minimum(run, n_offset[:, None] + row_size - BITS)
        # eight cuts of a run, joined so that they lie one after the other
        even = tl.join(
            tl.join(_four_values(weight_ptr, run, BITS, 0), _four_values(weight_ptr, run, BITS, 4)),
            tl.join(_four_values(weight_ptr, run, BITS, 2), _four_values(weight_ptr, run, BITS, 6)),
        )
        odd = tl.join(
            tl.join(_four_values(weight_ptr, run, BITS, 1), _four_values(weight_ptr, run, BITS, 5)),
            tl.join(_four_values(weight_ptr, run, BITS, 3), _four_values(weight_ptr, run, BITS, 7)),
        )
        packed = tl.join(even, odd).reshape(sums.shape[0], WIDTH)
    else:
        bit = start + j * (SLICES * BITS)
        word = bit // 32
        low = tl.load(weight_ptr + n_offset[:, None] + tl.minimum(word, row_size - 1)[None, :]).to(
            tl.uint32, bitcast=True
        )
        high = tl.load(
            weight_ptr + n_offset[:, None] + tl.minimum(word + 1, row_size - 1)[None, :]
        ).to(tl.uint32, bitcast=True)
        offset = (bit % 32).to(tl.uint32)[None, :]
        packed = (low >> offset) | ((high << 1) << (31 - offset))
    e = tl.arange(0, 16)
    for s in tl.static_range(SLICES):
        if BYTEWISE and BITS < 8:
            w = _cut(packed, BITS, s)
        elif BYTEWISE:
            w = (packed ^ 128).to(tl.int8, bitcast=True)
        else:
            w = (packed >> (BITS * s)).to(tl.int8) & (2**BITS - 1)
            if BITS == 8:
                w = w ^ -128  # w - 128 as int8
        k = block * BLOCK + s * WIDTH + j
        inputs = tl.load(values_ptr + m_offset[None, :] + k[:, None])
        if FLOATING:
            w_float = (
                (w.to(tl.int32) - zero_point[:, None])
                .to(tl.float32)
                .to(values_ptr.dtype.element_ty)
            )
            sums = tl.dot(w_float, inputs, sums, input_precision="ieee")
            if TERMS == 2:
                sums = tl.dot(
                    w_float,
                    tl.load(values_ptr + term_stride + m_offset[None, :] + k[:, None]),
                    sums,
                )
        else:
            sums = tl.dot(w, inputs, sums, out_dtype=tl.int32)
            if EXTRA > 0:
                more = tl.load(
                    more_ptr + e[None, :] * padded + k[:, None], mask=(e < EXTRA)[None, :], other=0
                )
                more_sums = tl.dot(w, more, more_sums, out_dtype=tl.int32)
    return sums, more_sums


@triton.jit(do_not_specialize=["M", "per_split"])
def _multiply(
    values_ptr, sums_ptr, more_ptr, more_sums_ptr, shift_ptr, row_scale_ptr, weight_ptr,
    weight_scale_ptr, weight_zero_point_ptr, bias_ptr, y_ptr, M, N, row_size, G, group_start, rows,
    per_split, BITS: tl.constexpr, SLICES: tl.constexpr, BYTEWISE: tl.constexpr, RUNS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ONE_GROUP: tl.constexpr,
    EXTRA: tl.constexpr, TERMS: tl.constexpr, FLOATING: tl.constexpr, SMALL: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, FLOAT_START: tl.constexpr, TN: tl.constexpr,
    TM: tl.constexpr,
):  # fmt: skip
    """Program (n, m, split): TN rows of the weight, TM tokens, `per_split` groups.

    Where there is one group, it is `per_split` blocks.
    """
    first_n = tl.program_id(0) * TN
    first_m = tl.program_id(1) * TM
    n = first_n + tl.arange(0, TN)
    m = first_m + tl.arange(0, TM)
    n_read = n
    if not EVEN:
        n_read = tl.minimum(n, N - 1)
    padded = G * BLOCKS * BLOCK
    n_offset = n_read * row_size
    m_offset = m * padded
    term_stride = rows * padded
    first_g = 0
    last_g = 1
    first_b = 0
    last_b = BLOCKS
    if ONE_GROUP:
        first_b = tl.program_id(2) * per_split
        last_b = tl.minimum(first_b + per_split, BLOCKS)
    else:
        first_g = tl.program_id(2) * per_split
        last_g = tl.minimum(first_g + per_split, G)

    # Sums below 2^22 start at the bits of 1.5 * 2^23: read as a float and less that much, they are
    # floats without a conversion, of which Ampere and Ada do as few as a quarter or an eighth of
    # what they add.
    START: tl.constexpr = 0x4B400000 if SMALL else 0
    total = tl.zeros((TN, TM), tl.float32)
    for g in range(first_g, last_g):
        if weight_zero_point_ptr is None:
            zero_point = tl.full((TN,), 2 ** (BITS - 1), tl.int32)
        else:
            zero_point = tl.load(weight_zero_point_ptr + n_read * G + g).to(tl.int32)
        if BITS == 8:
            zero_point -= 128
        if FLOATING:
            sums = tl.zeros((TN, TM), tl.float32)
        elif BLOCKS == 1:  # the products are added to what the zero points take off
            sums = START - zero_point[:, None] * tl.load(sums_ptr + g * rows + m)[None, :]
        else:
            sums = tl.full((TN, TM), START, tl.int32)
        more = tl.zeros((TN, 16), tl.int32)
        input_sums = tl.zeros((TM,), tl.int32)
        more_inputs = 0
        if BLOCKS == 1:
            sums, more = _products(
                sums, more, zero_point, values_ptr, more_ptr, weight_ptr, n_offset, m_offset,
                term_stride, row_size, padded, g * group_start, g, BITS, SLICES, BYTEWISE, RUNS,
                WHOLE, BLOCK, EXTRA, TERMS, FLOATING,
            )  # fmt: skip
            if EXTRA > 0:
                more_inputs = tl.load(more_sums_ptr + g)
        else:
            for b in range(first_b, last_b):
                block = g * BLOCKS + b
                sums, more = _products(
                    sums, more, zero_point, values_ptr, more_ptr, weight_ptr, n_offset, m_offset,
                    term_stride, row_size, padded,
                    g * group_start + b * (BLOCK * BITS // (8 if BYTEWISE else 1)), block, BITS,
                    SLICES, BYTEWISE, RUNS, WHOLE, BLOCK, EXTRA, TERMS, FLOATING,
                )  # fmt: skip
                if not FLOATING:
                    input_sums += tl.load(sums_ptr + block * rows + m)
                    if EXTRA > 0:
                        more_inputs += tl.load(more_sums_ptr + block)
        if FLOATING:
            exact = sums
        else:
            if BLOCKS > 1:
                sums -= zero_point[:, None] * input_sums[None, :]
            if EXTRA > 0:
                missing = tl.sum(more, 1) - zero_point * more_inputs
                if EXTRA == 1:
                    sums += missing[:, None] * tl.load(shift_ptr + m)[None, :]
                else:
                    sums += missing[:, None]
            if SMALL:
                exact = sums.to(tl.float32, bitcast=True) - FLOAT_START
            else:
                exact = sums.to(tl.float32)
        total += exact * tl.load(weight_scale_ptr + n_read * G + g).to(tl.float32)[:, None]

    inside = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT:
        y_ptr += tl.program_id(2).to(tl.int64) * M * N
    else:
        if row_scale_ptr is not None:
            total *= tl.load(row_scale_ptr + m)[None, :]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n_read).to(tl.float32)[:, None]
    tl.store(
        y_ptr + m.to(tl.int64)[None, :] * N + n[:, None],
        total.to(y_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    partial_ptr, row_scale_ptr, bias_ptr, y_ptr, M, N, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (n, m): COLUMNS outputs of a token, its parts added in order."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1)
    place = m.to(tl.int64) * N + n
    total = tl.zeros((COLUMNS,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * M.to(tl.int64) * N + place, mask=n < N, other=0.0)
    if row_scale_ptr is not None:
        total *= tl.load(row_scale_ptr + m)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=n < N)
