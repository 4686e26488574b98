"""GPU kernels of `qvlm_hf::linear` in Triton, straight from the packed bytes on disk.

The only file that imports triton.

    y[m, n] = bias[n] + r[m] * sum_g ws[n, g] * sum_{k in g} a[m, k] (w[n, k] - zp[n, g])

Two launches. `_arrange` quantizes the inputs into int8 and writes them in the order in which the
weights come out of their bytes; `_multiply` unpacks weights in registers, multiplies on the integer
matrix units with int32 sums, takes the zero points off as integers and scales each group in
float32. Floating-point inputs go the same way with float sums.
Modules that read one input (q, k, v; gate, up) share both launches.

Few tokens leave processors without work, so K is split over programs. Each writes its sums; the
last of a tile to come (a counter tells, which `_arrange` has set to zero) adds them in order.

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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qvlm_hf.ops.launches import Buffers, Launch

__all__ = ["MOST_MODULES", "Inputs", "Layout", "Tile", "arranging", "multiplying"]

MOST_MODULES = 3  # of one launch
_ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds half to even, below 2^22


@dataclass(frozen=True)
class Layout:
    """How the inputs of one module lie for `_multiply`.

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
    def words(self) -> int:
        """W, words of a row."""
        return -(-self.in_features * self.weight_bits // 32)

    @property
    def whole(self) -> bool:
        """Whether no group is padded: then no read of a weight needs a mask."""
        return self.in_features == self.padded


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch of `_multiply`.

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
class Inputs:
    """What `_arrange` makes of M tokens, and in what form it leaves them.

    Attributes:
        layout: of the modules.
        tokens: M.
        rows: that are allocated, a multiple of the tile's tokens.
        bits: of an input, 3 to 8; not read for granularity "none".
        granularity: as in the scheme.
        dtype: of x.
        scaled: whether there is an `input_scale`.
    """

    layout: Layout
    tokens: int
    rows: int
    bits: int
    granularity: str
    dtype: torch.dtype
    scaled: bool

    @property
    def floating(self) -> bool:
        """Whether values stay floating point."""
        return self.granularity == "none"

    @property
    def terms(self) -> int:
        """Terms that add up to a value: 16 bits do not hold a 16-bit x over its scale."""
        return 2 if self.floating and self.scaled and self.dtype != torch.float32 else 1

    @property
    def extra(self) -> int:
        """Correction rows."""
        if self.floating or self.bits < 8:
            return 0
        return 2 if self.granularity == "channel" else 1

    @property
    def at_once(self) -> int:
        """Blocks that a program arranges side by side."""
        return max(1, 1024 // self.layout.block)

    @property
    def parts(self) -> int:
        """Programs of a token: up to eight where there are few tokens.

        Each takes the token's statistics by itself.
        """
        number = self.layout.groups * self.layout.blocks
        return max(1, min(8 if self.tokens <= 64 else 1, number // self.at_once))

    @property
    def bound(self) -> int:
        """No sum of a group's products is larger."""
        layout = self.layout
        return layout.group_length * (2**self.bits - 1) * (2**layout.weight_bits - 1)

    def buffers(self, counters: int = 0, partial: int = 0) -> Buffers:
        """What the kernels pass on to each other, in the order in which they take it.

        Rows beyond M hold anything.

            values      [terms, rows, KP], int8 or floating point
            sums        int32 [G * B, rows], over each block of an int8 row
            more        int8 [extra, KP], correction rows
            more_sums   int32 [G * B], their sums
            shift       int32 as row_scale, the factor of the correction
            row_scale   float32 [parts, rows], or [G, rows] for "dynamic_group": r (1 for
                        "channel"), or NaN where an input is not finite
            counters    int32, zero: parts of a tile that are done
            partial     float32, their sums
        """
        number, padded = self.layout.groups * self.layout.blocks, self.layout.padded
        grouped = self.granularity == "dynamic_group"
        values = torch.bfloat16 if self.terms == 2 else self.dtype if self.floating else torch.int8
        scales = (number if grouped else self.parts, self.rows)
        return Buffers(
            values=(values, (self.terms, self.rows, padded)),
            sums=None if self.floating else (torch.int32, (number, self.rows)),
            more=(torch.int8, (self.extra, padded)) if self.extra else None,
            more_sums=(torch.int32, (number,)) if self.extra else None,
            shift=(torch.int32, scales) if self.extra == 1 else None,
            row_scale=None if self.floating else (torch.float32, scales),
            counters=(torch.int32, (counters,)) if counters else None,
            partial=(torch.float32, (partial,)) if partial else None,
        )


def arranging(inputs: Inputs, positions: int = 1, counters: int = 0) -> Launch:
    """The launch that quantizes inputs, rounding as the reference does, for `multiplying`.

    It takes x [M, K]; `input_scale` and `input_zero_point`; and all buffers but the partial sums.

    Args:
        inputs: what they are.
        positions: those of granularity "token"; token m has position m modulo their number.
        counters: how many are set to zero.
    """
    layout = inputs.layout
    return Launch(
        _arrange, (inputs.tokens, inputs.parts, 1), {"num_warps": 4},
        K=layout.in_features, L=layout.group_length, number=layout.groups * layout.blocks,
        rows=inputs.rows, positions=positions, counters=counters, BITS=inputs.bits,
        GRANULARITY=inputs.granularity, HAS_SCALE=inputs.scaled, TERMS=inputs.terms,
        EXTRA=inputs.extra, ROUND=_ROUND, BLOCK=layout.block,
        BLOCKS=layout.blocks, SLICES=layout.slices, AT_ONCE=inputs.at_once,
        CHUNK=min(2048, triton.next_power_of_2(layout.in_features)),
    )  # fmt: skip


def multiplying(
    inputs: Inputs, out_features: Sequence[int], splits: Sequence[int], tile: Tile
) -> Launch:
    """The launch that multiplies inputs by the packed weights of up to `MOST_MODULES` modules.

    It takes all buffers, and of each module weight (int32 [N, W], as bytes where the layout is
    bytewise), weight_scale [N, G], weight_zero_point [N, G] or None for 2^(bits - 1), bias [N] or
    None, and y [M, N]; None for modules that are not there.

    Args:
        inputs: those that were arranged.
        out_features: N of each module.
        splits: parts of K that are summed apart and added in order, of each module.
        tile: sizes of the launch.
    """
    layout, modules = inputs.layout, len(out_features)
    tiles = [-(-n // tile.out_features) for n in out_features]
    programs = sum(n * parts for n, parts in zip(tiles, splits, strict=True))
    sizes = dict.fromkeys(("N0", "splits0", "N1", "splits1", "N2", "splits2"), 1)
    for i, (rows, parts) in enumerate(zip(out_features, splits, strict=True)):
        sizes |= {f"N{i}": rows, f"splits{i}": parts}
    return Launch(
        _multiply, (programs, -(-inputs.tokens // tile.tokens), 1),
        {"num_warps": tile.warps, "num_stages": tile.stages}, **sizes, M=inputs.tokens,
        rows=inputs.rows,
        row_size=layout.words * (4 if layout.bytewise else 1), G=layout.groups,
        group_start=layout.group_length * layout.weight_bits // (8 if layout.bytewise else 1),
        BITS=layout.weight_bits, SLICES=layout.slices, BYTEWISE=layout.bytewise, RUNS=layout.runs,
        WHOLE=layout.whole, BLOCK=layout.block, BLOCKS=layout.blocks, ONE_GROUP=layout.groups == 1,
        GROUPED=inputs.granularity == "dynamic_group", PARTS=inputs.parts, EXTRA=inputs.extra,
        TERMS=inputs.terms, FLOATING=inputs.floating, SMALL=inputs.bound < 2**22,
        FLOAT_START=_ROUND, MODULES=modules, SPLIT=max(splits) > 1,
        EVEN=all(n % tile.out_features == 0 for n in out_features),
        FEW=inputs.tokens < tile.tokens, TN=tile.out_features, TM=tile.tokens,
    )  # fmt: skip


def _bytewise(group_length: int, in_features: int, bits: int) -> bool:
    return bits in (2, 4, 8) and (group_length * bits % 8 == 0 or group_length >= in_features)


def _slices(bits: int, bytewise: bool) -> int:
    return 8 // bits if bytewise else 4


@triton.jit(do_not_specialize=["number", "positions", "counters"])
def _arrange(
    x_ptr, input_scale_ptr, input_zero_point_ptr, values_ptr, sums_ptr, more_ptr, more_sums_ptr,
    shift_ptr, row_scale_ptr, counter_ptr, K, L, number, rows, positions, counters,
    BITS: tl.constexpr, GRANULARITY: tl.constexpr, HAS_SCALE: tl.constexpr, TERMS: tl.constexpr,
    EXTRA: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SLICES: tl.constexpr,
    AT_ONCE: tl.constexpr, CHUNK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Program (m, part): statistics of token m, then every `parts`-th run of AT_ONCE blocks."""
    m = tl.program_id(0)
    row = m.to(tl.int64) * K
    if counter_ptr is not None:
        if m == 0 and tl.program_id(1) == 0:
            for start in range(0, counters, 256):
                i = start + tl.arange(0, 256)
                tl.store(counter_ptr + i, tl.zeros((256,), tl.int32), mask=i < counters)
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
            x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
            low = tl.minimum(low, x)
            high = tl.maximum(high, x)
        scale, zero_point = _range(tl.min(low, 0), tl.max(high, 0), top * 1.0, ROUND)

    place = tl.arange(0, BLOCK)[None, :]
    # which input of its block lies there
    inner = place % (BLOCK // SLICES) * SLICES + place // (BLOCK // SLICES)
    magnitude = tl.zeros((AT_ONCE, BLOCK), tl.int32)  # bits of the largest absolute values
    for first in range(tl.program_id(1) * AT_ONCE, number, tl.num_programs(1) * AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        group = block // BLOCKS
        k = (group * L + block % BLOCKS * BLOCK)[:, None] + inner
        exists = k < tl.minimum((group + 1) * L, K)[:, None]
        written = (block < number)[:, None]
        target = m.to(tl.int64) * number * BLOCK + block[:, None] * BLOCK + place
        x = tl.load(x_ptr + row + k, mask=exists, other=0.0).to(tl.float32)
        if GRANULARITY == "none":
            if HAS_SCALE:
                x = tl.math.div_rn(x, tl.load(input_scale_ptr + k, mask=exists, other=1.0))
            value = x.to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + target, value, mask=written)
            if TERMS == 2:
                rest = (x - value.to(tl.float32)).to(values_ptr.dtype.element_ty)
                tl.store(
                    values_ptr + rows.to(tl.int64) * number * BLOCK + target, rest, mask=written
                )
        else:
            bits = tl.abs(x).to(tl.int32, bitcast=True)
            if GRANULARITY == "channel":
                step = tl.load(input_scale_ptr + k, mask=exists, other=1.0)
                zero = tl.load(input_zero_point_ptr + k, mask=exists, other=0).to(tl.float32)
            elif GRANULARITY == "dynamic_group":  # whose groups are blocks
                low = tl.minimum(tl.min(x, 1), 0.0)
                steps, zeros = _range(low, tl.maximum(tl.max(x, 1), 0.0), top * 1.0, ROUND)
                _store_scale(
                    row_scale_ptr, shift_ptr, block * rows + m, steps, zeros, tl.max(bits, 1),
                    block < number, EXTRA,
                )  # fmt: skip
                step = tl.zeros((AT_ONCE, BLOCK), tl.float32) + steps[:, None]
                zero = tl.zeros((AT_ONCE, BLOCK), tl.float32) + zeros[:, None]
            else:
                step = tl.zeros((AT_ONCE, BLOCK), tl.float32) + scale
                zero = tl.zeros((AT_ONCE, BLOCK), tl.float32) + zero_point
            magnitude = tl.maximum(magnitude, bits)
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
    if GRANULARITY != "none" and GRANULARITY != "dynamic_group":
        _store_scale(
            row_scale_ptr, shift_ptr, tl.program_id(1) * rows + m, scale, zero_point,
            tl.max(tl.max(magnitude, 1), 0), True, EXTRA,
        )  # fmt: skip


@triton.jit
def _range(low, high, top, ROUND: tl.constexpr):
    """Scale and zero point of the grid over a range that holds 0."""
    scale = tl.math.div_rn(high - low, top)
    scale = tl.where(scale > 0, scale, 1.0)
    zero_point = tl.math.div_rn(-low, scale)
    return scale, tl.minimum((zero_point + ROUND) - ROUND, top)


@triton.jit
def _store_scale(
    row_scale_ptr, shift_ptr, place, scale, zero_point, magnitude, exists, EXTRA: tl.constexpr
):
    """Stores a range; NaN for its scale where the bits of some input are infinity's or NaN's."""
    finite = magnitude < 0x7F800000
    tl.store(row_scale_ptr + place, tl.where(finite, scale, float("nan")), mask=exists)
    if EXTRA == 1:
        tl.store(shift_ptr + place, 128 - zero_point.to(tl.int32), mask=exists)


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
            # beyond the row inputs are 0, whatever weight they meet
            place = tl.minimum(place, row_size - 1)
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


@triton.jit
def _pick(which, first, second, third, MODULES: tl.constexpr):
    """What belongs to module `which`."""
    if MODULES == 1:
        return first
    elif MODULES == 2:
        return tl.where(which == 0, first, second)
    else:
        return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit(do_not_specialize=["M", "splits0", "splits1", "splits2"])
def _multiply(
    values_ptr, sums_ptr, more_ptr, more_sums_ptr, shift_ptr, row_scale_ptr, counter_ptr,
    partial_ptr, weight0_ptr, weight_scale0_ptr, weight_zero_point0_ptr, bias0_ptr, y0_ptr,
    weight1_ptr, weight_scale1_ptr, weight_zero_point1_ptr, bias1_ptr, y1_ptr, weight2_ptr,
    weight_scale2_ptr, weight_zero_point2_ptr, bias2_ptr, y2_ptr, N0, splits0, N1, splits1, N2,
    splits2, M, rows, row_size, G, group_start, BITS: tl.constexpr, SLICES: tl.constexpr,
    BYTEWISE: tl.constexpr, RUNS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, ONE_GROUP: tl.constexpr, GROUPED: tl.constexpr, PARTS: tl.constexpr,
    EXTRA: tl.constexpr, TERMS: tl.constexpr, FLOATING: tl.constexpr, SMALL: tl.constexpr,
    FLOAT_START: tl.constexpr, MODULES: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    FEW: tl.constexpr, TN: tl.constexpr, TM: tl.constexpr,
):  # fmt: skip
    """Program (p, m): TN rows of a module's weight, TM tokens, a part of the groups.

    The programs of one module follow those of the one before, its parts one after the other. Where
    there is one group, its blocks are split.
    """
    program = tl.program_id(0)
    tiles0 = tl.cdiv(N0, TN)
    tiles1 = tl.cdiv(N1, TN)
    which = 0
    first_program, first_tile = 0, 0
    first_partial = tl.zeros((), tl.int64)
    if MODULES > 1:
        end0 = tiles0 * splits0
        end1 = end0 + tiles1 * splits1
        which = (program >= end0).to(tl.int32)
        partial0 = splits0.to(tl.int64) * M * N0
        if MODULES > 2:
            which += (program >= end1).to(tl.int32)
        first_program = _pick(which, 0, end0, end1, MODULES)
        first_tile = _pick(which, 0, tiles0, tiles0 + tiles1, MODULES)
        first_partial = _pick(
            which, first_partial, partial0, partial0 + splits1.to(tl.int64) * M * N1, MODULES
        )
    N = _pick(which, N0, N1, N2, MODULES)
    splits = _pick(which, splits0, splits1, splits2, MODULES)
    weight_ptr = _pick(which, weight0_ptr, weight1_ptr, weight2_ptr, MODULES)
    weight_scale_ptr = _pick(
        which, weight_scale0_ptr, weight_scale1_ptr, weight_scale2_ptr, MODULES
    )
    weight_zero_point_ptr = weight_zero_point0_ptr
    if weight_zero_point0_ptr is not None:
        weight_zero_point_ptr = _pick(
            which, weight_zero_point0_ptr, weight_zero_point1_ptr, weight_zero_point2_ptr, MODULES
        )
    bias_ptr = bias0_ptr
    if bias0_ptr is not None:
        bias_ptr = _pick(which, bias0_ptr, bias1_ptr, bias2_ptr, MODULES)
    y_ptr = _pick(which, y0_ptr, y1_ptr, y2_ptr, MODULES)
    tiles = tl.cdiv(N, TN)
    tile = program - first_program
    split = 0
    if SPLIT:
        split = tile // tiles
        tile = tile % tiles

    n = tile * TN + tl.arange(0, TN)
    m = tl.program_id(1) * TM + tl.arange(0, TM)
    n_read = n
    if not EVEN:
        n_read = tl.minimum(n, N - 1)
    padded = G * BLOCKS * BLOCK
    n_offset = n_read * row_size
    m_offset = m * padded
    if FEW:  # the last token again costs no memory traffic, rows that are not there do
        m_offset = tl.minimum(m, M - 1) * padded
    term_stride = rows * padded
    first_g = 0
    last_g = G
    first_b = 0
    last_b = BLOCKS
    if SPLIT:
        if ONE_GROUP:
            per_split = tl.cdiv(BLOCKS, splits)
            first_b = split * per_split
            last_b = tl.minimum(first_b + per_split, BLOCKS)
        else:
            per_split = tl.cdiv(G, splits)
            first_g = split * per_split
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
                    shift_place = m
                    if GROUPED:
                        shift_place = g * rows + m
                    sums += missing[:, None] * tl.load(shift_ptr + shift_place)[None, :]
                else:
                    sums += missing[:, None]
            if SMALL:
                exact = sums.to(tl.float32, bitcast=True) - FLOAT_START
            else:
                exact = sums.to(tl.float32)
        scaled = exact * tl.load(weight_scale_ptr + n_read * G + g).to(tl.float32)[:, None]
        if GROUPED:
            scaled *= tl.load(row_scale_ptr + g * rows + m)[None, :]
        total += scaled

    inside = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT:
        # few tokens, so 32 bits reach; one part after the other, or loads fill the registers
        parts = partial_ptr + first_partial
        offset = m[None, :] * N + n[:, None]
        tl.store(parts + split * M * N + offset, total, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them counts
        counter = counter_ptr + first_tile * tl.num_programs(1) + tl.program_id(1) * tiles + tile
        last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if last:
            total = tl.zeros((TN, TM), tl.float32)
            for _ in tl.range(0, splits, num_stages=1):
                total += tl.load(parts + offset, mask=inside, other=0.0, cache_modifier=".cg")
                parts += M * N
        inside = inside & last
    if not FLOATING and not GROUPED:
        scale = tl.load(row_scale_ptr + m)
        for part in tl.static_range(1, PARTS):  # each tells of its own inputs
            own = tl.load(row_scale_ptr + part * rows + m)
            scale = tl.where(own == own, scale, own)
        total *= scale[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n_read).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)
