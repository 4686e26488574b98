"""GPU kernels on a CPU, by Triton's interpreter: values against the reference and, for the fused
ones, against Transformers' modules.

Not collected by itself: test_triton.py runs it in a process of its own. By hand:
`TRITON_INTERPRET=1 pytest tests/ops/interpreted_kernels.py`.
"""

import functools

import arranged_inputs
import pytest
import torch
from arranged_inputs import order
from interpreted_triton import kernels
from linear_calls import GRANULARITIES, OPS, TIGHT, agree, arguments, lists

from qvlm_hf.format.grids import QParams, dynamic_token_qparams, shift_quantize
from qvlm_hf.format.packing import pack
from qvlm_hf.ops import gpu
from qvlm_hf.ops.call import parse_many

# rows that nobody reads hold anything, infinities too
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
HOPPER = gpu.Device((9, 0), 8)


def computed(x, *calls, device=HOPPER):
    """The outputs for flat arguments of modules that share an input."""
    weights, scheme = parse_many((x, *lists(*calls)))
    return gpu.compute(kernels, device, x, weights, scheme)


arrange = functools.partial(arranged_inputs.arrange, kernels)


def compare(x, rest):
    agree(computed(x, rest)[0], OPS.linear_reference(x, *rest))


# K, L, tokens, N, dtype: a short last group, of whole runs of 32 values and not, groups at odd bits, whole rows and groups of several
# blocks; N of no tile
SIZES = (
    (200, 64, 3, 35, torch.float32),
    (143, 13, 9, 16, torch.bfloat16),
    (300, 300, 1, 70, torch.float16),
    (520, 256, 2, 20, torch.bfloat16),
    (96, 32, 2, 64, torch.float32),
    (160, 64, 2, 20, torch.float16),
)


@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_equals_the_reference(weight_bits, activation_bits):
    granularities = ("none",) if activation_bits == 16 else ("channel", "token", "dynamic_token")
    # these meet each other in the quantizer and nowhere else
    if activation_bits < 8 and weight_bits != 4:
        granularities = (granularities[(weight_bits + activation_bits) % 3],)
    for turn, granularity in enumerate(granularities):
        in_features, length, tokens, out_features, dtype = SIZES[
            (weight_bits + activation_bits + turn) % len(SIZES)
        ]
        symmetric = (weight_bits + turn) % 2 == 0
        bits, sizes = (weight_bits, activation_bits), (out_features, in_features, length)
        rest = arguments(*bits, granularity, *sizes, tokens, symmetric, dtype)
        compare((torch.randn(2, tokens, in_features) * 2).to(dtype), rest)


@pytest.mark.parametrize("dtype", list(TIGHT))
@pytest.mark.parametrize("scaled", [False, True])
def test_floating_inputs(dtype, scaled):
    """A scaled 16-bit input is two terms of 8 bits each: more than its own dtype holds."""
    rest = list(arguments(4, 16, "none", 40, 264, 128, 3, dtype=dtype))
    rest[3] = torch.rand(264) + 0.1 if scaled else None
    x = torch.randn(3, 264).to(dtype)
    compare(x, rest)
    if scaled and dtype != torch.float32:
        arranged = arrange(x, kernels.Layout.of(264, 128, 4), 16, "none", rest[3])
        assert arranged.values.shape[0] == 2
        both = arranged.values.float().sum(0)[:3, order(kernels.Layout.of(264, 128, 4))]
        assert ((both - x.float() / rest[3]).abs() <= 2.0**-16 * (x.float() / rest[3]).abs()).all()


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (8, 8), (3, 8), (6, 6)])
@pytest.mark.parametrize(("tokens", "granularity"), [(1, "dynamic_token"), (17, "channel")])
def test_sums_are_exact(weight_bits, activation_bits, granularity, tokens):
    """Scales of one: outputs are the integer sums, and equal bit for bit, also where K is split."""
    top = 2**activation_bits - 1
    zero = top // 3
    x = torch.randint(-zero, top - zero + 1, (tokens, 512)).float()
    x[:, 0], x[:, 1] = -zero, top - zero  # the range of a token is `top` steps of one
    integers = torch.randint(0, 2**weight_bits, (96, 512))
    integers[0], x[0, 2:] = 2**weight_bits - 1, top - zero  # the largest sum
    statics = granularity == "channel"
    for length in (128, 512):
        groups = 512 // length
        rest = (
            pack(integers, weight_bits), torch.ones(96, groups, dtype=torch.bfloat16), torch.ones(96, groups, dtype=torch.uint8),
            torch.ones(512) if statics else None, torch.full((512,), zero, dtype=torch.int32) if statics else None,
            None, 512, weight_bits, activation_bits, length, granularity, 0,
        )  # fmt: skip
        layout = kernels.Layout.of(512, length, weight_bits)
        tile = gpu.tile_of(HOPPER, tokens, torch.int8)
        assert gpu.splits_of(HOPPER, layout, tokens, 96, tile) > 1
        exact = x.long() @ (integers - 1).T
        assert torch.equal(computed(x, rest)[0].long(), exact)


@pytest.mark.parametrize(("tokens", "in_features"), [(0, 200), (1, 512), (20, 200)])
@pytest.mark.parametrize("outputs", [(35, 8), (96, 8, 20), (64, 64, 3, 7, 130)])
def test_modules_of_one_input_are_computed_as_each_by_itself(tokens, in_features, outputs):
    """With K split for one token, into parts that differ by module."""
    x = torch.randn(tokens, in_features)
    cases = [arguments(4, 8, "dynamic_token", n, in_features, 64, tokens, seed=n) for n in outputs]
    alone = [computed(x, rest)[0] for rest in cases]
    assert all(torch.equal(y, one) for y, one in zip(computed(x, *cases), alone, strict=True))


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (4, 8), (3, 5), (8, 8)])
@pytest.mark.parametrize(("in_features", "length"), [(200, 64), (143, 13), (384, 128)])
def test_a_range_per_group_of_inputs(weight_bits, activation_bits, in_features, length):
    sizes = 35, in_features, length, 3
    rest = arguments(weight_bits, activation_bits, "dynamic_group", *sizes)
    compare(torch.randn(3, in_features) * torch.logspace(-2, 2, in_features), rest)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_token_that_is_not_finite_gives_nan(granularity):
    """Wherever it is, also where several programs arrange a token; and no other token does."""
    rest = arguments(4, 16 if granularity == "none" else 8, granularity, 9, 2304, 128, 3)
    x = torch.randn(2, 3, 2304)
    expected = computed(x, rest)[0].flatten(0, 1)
    for place in (0, 1100, 2303):
        spoilt = x.flatten(0, 1).clone()
        spoilt[::2, place] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        y = computed(spoilt.view_as(x), rest)[0].flatten(0, 1)
        assert y[::2].isnan().all() if granularity != "none" else not y[::2].isfinite().any()
        assert torch.equal(y[1::2], expected[1::2])


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token"])
def test_inputs_are_rounded_as_the_reference_rounds(granularity, bits):
    """Equal integers, ties included: every third value lies halfway between two levels."""
    x = torch.randn(6, 200) * 3
    if granularity == "channel":
        scale, zero = torch.rand(200) + 0.1, torch.randint(0, 2**bits, (200,), dtype=torch.int32)
        expected = QParams(scale, zero, bits)
    elif granularity == "token":
        scale, zero = torch.rand(3) + 0.1, torch.randint(0, 2**bits, (3,), dtype=torch.int32)
        expected = QParams(scale.repeat(2)[:, None], zero.repeat(2)[:, None], bits)
    else:
        scale = zero = None
        x[:, 0], x[:, 1] = -1.0, 2.0**bits - 2  # a scale of one
        x[:, 2:] = x[:, 2:].clamp(-1, 2**bits - 2)
        expected = dynamic_token_qparams(x, bits)
    halves = ((x / expected.scale).floor() + 0.5) * expected.scale
    x[:, 2::3] = (halves if scale is not None else halves.clamp(-1, 2**bits - 2))[:, 2::3]
    layout = kernels.Layout.of(200, 64, 4)
    arranged = arrange(x, layout, bits, granularity, scale, zero, positions=3)
    a = shift_quantize(x, expected).int()
    stored = a if bits < 8 else a + expected.zero_point - 128
    assert torch.equal(arranged.values[0, :6, order(layout)].int(), stored)
    assert arranged.values[0, :6].int().sum() == stored.sum(), "padding is not zero"
    assert torch.equal(arranged.sums[:, :6].sum(0), stored.sum(1).int())
    if granularity != "channel":
        assert torch.equal(arranged.row_scale[0, :6], expected.scale.flatten())
    if bits == 8 and granularity == "channel":
        assert torch.equal(arranged.more.int().sum(0)[order(layout)], 128 - zero)
    if bits == 8 and granularity != "channel":
        assert torch.equal(arranged.shift[0, :6], 128 - expected.zero_point.flatten())


def test_shapes_and_strides():
    rest = list(arguments(4, 8, "dynamic_token", 30, 64, 64, 1))
    inputs = [torch.randn(shape) for shape in ((64,), (0, 64), (2, 0, 64))]
    for x in (*inputs, torch.randn(64, 5).T, torch.randn(3, 2, 128)[..., ::2]):
        compare(x, rest)
    positions = arguments(4, 4, "token", 30, 64, 64, 3)
    compare(torch.randn(3, 2, 64).transpose(0, 1), positions)
    rest[5] = None
    compare(torch.randn(2, 64), rest)
    compare(torch.randn(2, 64).half(), [*rest[:-1], 32])  # a Hadamard transform


def test_many_tokens_and_every_tile():
    """Tiles of every size in the table, with a rest in both directions."""
    for tokens in (33, 70):
        rest = arguments(4, 8, "dynamic_token", 70, 128, 128, 1)
        compare(torch.randn(tokens, 128), rest)
    compare(
        torch.randn(40, 128).bfloat16(),
        arguments(8, 16, "none", 70, 128, 64, 1, dtype=torch.bfloat16),
    )


def test_more_tokens_than_offsets_reach(monkeypatch):
    """They go in parts that begin at position 0."""
    monkeypatch.setattr(gpu, "_OFFSETS", 2 * 128 * (128 + 7))
    calls, original = [], gpu._plan
    monkeypatch.setattr(gpu, "_plan", lambda *key: calls.append(key[-2]) or original(*key))
    compare(torch.randn(4, 3, 64), arguments(4, 4, "token", 9, 64, 64, 3))
    assert calls == [6, 6]


def test_parts_of_k_are_never_empty():
    sizes = ((4096, 128), (4096, 4096), (11008, 128), (13824, 64), (200, 13), (5120, 256))
    for in_features, length in sizes:
        for weight_bits in (2, 4, 5, 8):
            layout = kernels.Layout.of(in_features, length, weight_bits)
            units = layout.groups if layout.groups > 1 else layout.blocks
            for processors in (1, 8, 108, 170):
                device = gpu.Device((8, 0), processors)
                for tokens in (1, 16, 64, 608):
                    tile = gpu.tile_of(device, tokens, torch.int8)
                    splits = gpu.splits_of(device, layout, tokens, 4096, tile)
                    each = -(-units // splits)
                    assert splits >= 1
                    assert (splits - 1) * each < units <= splits * each


def test_the_self_check_finds_what_is_wrong(monkeypatch):
    assert gpu.self_check(kernels, HOPPER, CPU) is None
    original = gpu._Plan.__call__

    def wrong(plan, x, weights, scheme, outputs):
        original(plan, x, weights, scheme, outputs)
        outputs[0].mul_(1.01)

    monkeypatch.setattr(gpu._Plan, "__call__", wrong)
    expected = (
        "the compiled kernel is wrong for W4A4 channel, 1 tokens, 300 inputs in groups of 128"
    )
    assert gpu.self_check(kernels, HOPPER, CPU) == expected


def test_another_triton_launches_its_own_way(monkeypatch):
    """Where repeated launches raise, every launch is the first."""

    def fails(launch, addresses):
        raise TypeError("function takes at most 31 arguments (40 given)")

    def keeps(launch, *tensors):
        launch.function[launch.grid](*tensors, **launch.values, **launch.options)
        launch._compiled = launch.repeats or None

    monkeypatch.setattr(gpu, "_CHECKED", gpu._CHECKED[:1])
    monkeypatch.setattr(gpu.Launch, "repeats", True)
    monkeypatch.setattr(gpu.Launch, "at", fails)
    monkeypatch.setattr(gpu.Launch, "__call__", keeps)
    gpu._plan.cache_clear()
    with pytest.raises(TypeError):
        gpu.self_check(kernels, HOPPER, CPU)
    gpu._plan.cache_clear()
    assert gpu._checked(kernels, HOPPER, CPU) is None
    assert not gpu.Launch.repeats
