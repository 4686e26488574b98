"""The compiled GPU kernels against the reference, on the device, and what PyTorch asks of an
operator there.

`pytest -m gpu tests/gpu`
"""

import pytest
import torch
from arranged_inputs import arrange, order
from linear_calls import NAMES, TIGHT, agree, arguments
from transformers import DynamicCache

from qvlm_hf.format.grids import QParams, dynamic_token_qparams, shift_quantize
from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.runtime import growing_cache
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.siblings import share_inputs
from qvlm_hf.ops import gpu
from qvlm_hf.ops.call import numbers_of
from qvlm_hf.ops.linear import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: PyTorch finds none"
    ),
]


@pytest.fixture(scope="module")
def kernels():
    """The module of kernels, after its self-check on this device."""
    name, found, _ = gpu._kernels(torch.cuda.current_device())
    assert found is not None, name
    return found


def module(
    weight_bits,
    activation_bits,
    granularity,
    out_features,
    in_features,
    group_size,
    positions=1,
    symmetric=False,
    dtype=torch.bfloat16,
    hadamard=None,
):
    """A QVLMLinear with random tensors on the device."""
    scheme = QuantScheme(
        weight_bits=weight_bits, activation_bits=16 if granularity == "none" else activation_bits, group_size=group_size,
        symmetric=symmetric, granularity=granularity, hadamard=hadamard,
    )  # fmt: skip
    made = QVLMLinear(
        in_features,
        out_features,
        scheme,
        bias=True,
        dtype=dtype,
        positions=positions,
        device="cuda",
    )
    length = scheme.group_length(in_features)
    sizes = out_features, in_features, length, positions, symmetric, dtype
    call = arguments(weight_bits, activation_bits, granularity, *sizes)
    for name, tensor in zip(NAMES, call, strict=False):
        if tensor is not None:
            made.tensors[name].data = tensor.cuda()
    return made


def compare(made, x):
    y = made(x)
    made.reference = True
    expected = made(x)
    made.reference = False
    agree(y, expected)


def test_the_kernels_run_here_and_are_named(kernels):
    major, minor = torch.cuda.get_device_capability()
    assert module(4, 4, "channel", 64, 128, 64).kernel == f"triton sm{major}{minor}"


@pytest.mark.parametrize("activation_bits", [3, 4, 6, 8, 16])
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_equals_the_reference(kernels, weight_bits, activation_bits):
    sizes = (
        (200, 64, 35),
        (143, 13, 16),
        (1024, -1, 130),
        (1040, 256, 257),
        (96, 32, 64),
        (512, 128, 128),
    )
    for turn, granularity in enumerate(
        ("none",) if activation_bits == 16 else ("channel", "token", "dynamic_token")
    ):
        for step, tokens in enumerate((1, 7, 16, 17, 40, 129)):
            in_features, group_size, out_features = sizes[(weight_bits + turn + step) % len(sizes)]
            dtype = list(TIGHT)[(turn + step) % 3]
            made = module(
                weight_bits,
                activation_bits,
                granularity,
                out_features,
                in_features,
                group_size,
                tokens,
                bool(step % 2),
                dtype,
            )
            compare(made, torch.randn(2, tokens, in_features, device="cuda").to(dtype) * 2)


@pytest.mark.parametrize("dtype", list(TIGHT))
def test_scaled_floating_inputs(kernels, dtype):
    made = module(4, 16, "none", 257, 1024, 128, dtype=dtype)
    made.input_scale = torch.nn.Parameter(
        torch.rand(1024, device="cuda") + 0.1, requires_grad=False
    )
    for tokens in (1, 70):
        compare(made, torch.randn(tokens, 1024, device="cuda").to(dtype))


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), [(2, 8), (3, 8), (4, 4), (4, 8), (6, 6), (8, 8)]
)
@pytest.mark.parametrize("granularity", ["channel", "dynamic_token"])
@pytest.mark.parametrize("group_length", [128, 4096])
def test_sums_are_exact(kernels, weight_bits, activation_bits, granularity, group_length):
    """Scales of one at real sizes: outputs are integers below 2^24, and equal bit for bit."""
    top = 2**activation_bits - 1
    statics = granularity == "channel"
    for tokens in (1, 16, 100, 608):
        x = torch.randint(0, top + 1, (tokens, 4096), device="cuda").float()
        x[:, 0], x[:, 1], x[:, 300:] = (
            0,
            top,
            0,
        )  # a range of `top` steps of one; the sum stays exact in float32
        integers = torch.randint(0, 2**weight_bits, (1024, 4096))
        groups = 4096 // group_length
        rest = (
            pack(integers, weight_bits).cuda(), torch.ones(1024, groups, dtype=torch.bfloat16, device="cuda"),
            torch.ones(1024, groups, dtype=torch.uint8, device="cuda"), torch.ones(4096, device="cuda") if statics else None,
            torch.zeros(4096, dtype=torch.int32, device="cuda") if statics else None, None,
            4096, weight_bits, activation_bits, group_length, granularity, 0,
        )  # fmt: skip
        exact = x.double() @ (integers - 1).double().T.cuda()
        assert torch.equal(torch.ops.qvlm_hf.linear(x, *rest).double(), exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["channel", "dynamic_token"])
def test_inputs_are_rounded_as_the_reference_rounds(kernels, granularity, bits):
    """Equal integers over a million values, with ties: division and rounding of the device are the
    reference's.
    """
    x = torch.randn(256, 4096, device="cuda") * 3
    scale = torch.rand(4096, device="cuda") + 0.1
    x[:, ::3] = (((x / scale).floor() + 0.5) * scale)[:, ::3]
    zero = torch.randint(0, 2**bits, (4096,), dtype=torch.int32, device="cuda")
    statics = granularity == "channel"
    qparams = QParams(scale, zero, bits) if statics else dynamic_token_qparams(x, bits)
    layout = kernels.Layout.of(4096, 128, 4)
    arranged = arrange(
        kernels, x, layout, bits, granularity, scale if statics else None, zero if statics else None
    )
    a = shift_quantize(x, qparams).int()
    stored = a if bits < 8 else a + qparams.zero_point - 128
    assert torch.equal(arranged.values[0][:, order(layout)].int(), stored)
    assert torch.equal(arranged.sums.sum(0), stored.sum(1).int())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 608])
def test_modules_of_one_input_are_computed_together(kernels, tokens):
    parent = torch.nn.Module()
    parent.q, parent.k = (
        module(4, 8, "dynamic_token", out_features, 512, 128) for out_features in (512, 64)
    )
    x = torch.randn(tokens, 512, dtype=torch.bfloat16, device="cuda")
    alone = [parent.q(x), parent.k(x)]
    share_inputs([(parent.q, parent.k)])
    assert all(torch.equal(a, b) for a, b in zip(alone, [parent.q(x), parent.k(x)], strict=True))
    assert parent.q.shared is not None


def test_the_same_call_gives_the_same_bits(kernels):
    made = module(4, 8, "dynamic_token", 4096, 4096, 128)
    for tokens in (1, 16, 608):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        assert all(torch.equal(made(x), made(x)) for _ in range(5))


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
def test_what_pytorch_asks_of_an_operator(kernels, granularity):
    made = module(4, 8, granularity, 96, 128, 64, positions=3, dtype=torch.float32)
    x = torch.randn(2, 3, 128, device="cuda", requires_grad=True)
    tensors = (made.tensors.get(name) for name in NAMES)
    arguments = x, *tensors, *numbers_of(128, made.scheme)
    torch.library.opcheck(torch.ops.qvlm_hf.linear.default, arguments)


def test_shapes_strides_and_empty_batches(kernels):
    made = module(4, 8, "dynamic_token", 30, 64, 64, dtype=torch.float32)
    inputs = torch.randn(64), torch.randn(0, 64), torch.randn(64, 5).T
    for x in (*inputs, torch.randn(3, 2, 128)[..., ::2]):
        y = made(x.cuda())
        assert y.shape == (*x.shape[:-1], 30)
        if y.numel():
            compare(made, x.cuda())
    compare(
        module(4, 4, "channel", 30, 64, 64, dtype=torch.float32, hadamard=32),
        torch.randn(3, 64, device="cuda"),
    )


@pytest.mark.parametrize("tokens", [1, 608])
@pytest.mark.parametrize(
    ("activation_bits", "granularity"), [(4, "channel"), (8, "dynamic_token"), (16, "none")]
)
def test_a_cuda_graph_holds_it(kernels, tokens, activation_bits, granularity):
    """Captured once, replayed on other inputs."""
    made = module(4, activation_bits, granularity, 512, 1024, 128)
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
    made(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
    other = torch.randn_like(x)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, made(other))


def test_what_is_not_compiled_is_refused_in_a_graph(kernels):
    """And nothing is left half captured: the same call works afterwards."""
    made = module(4, 8, "dynamic_token", 512, 1024, 128)
    x = torch.randn(37, 1024, device="cuda", dtype=torch.bfloat16)
    gpu._plan.cache_clear()
    with (
        pytest.raises(RuntimeError, match="run the model once with 37 tokens"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        made(x)
    torch.cuda.synchronize()
    compare(made, x)


@pytest.mark.parametrize("granularity", ["channel", "dynamic_token", "dynamic_group", "none"])
def test_a_token_that_is_not_finite_gives_nan(kernels, granularity):
    made = module(4, 8, granularity, 512, 4096, 128)
    for tokens in (3, 100):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        x[1, 2000] = torch.nan
        y = made(x)
        assert y[1].isnan().all()
        assert y[::2].isfinite().all()


def test_prepared_launches_give_the_bits_of_the_first(kernels):
    """The first call of a plan goes Triton's way, the next ones its addresses alone."""
    made = module(4, 8, "dynamic_token", 512, 1024, 128)
    for tokens in (1, 608):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        gpu._plan.cache_clear()
        assert torch.equal(made(x), made(x))


def test_compiles_into_one_graph(kernels):
    made = module(4, 8, "dynamic_token", 512, 1024, 128)
    compiled = torch.compile(lambda x: made(x * 1.0) + 1, fullgraph=True)
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(compiled(x), made(x) + 1)


@torch.no_grad()
def test_a_cache_grows_in_place_but_not_in_a_graph():
    own, grown = DynamicCache(), DynamicCache()
    places = []
    for tokens in (640, 1, 1, 1):
        growing_cache._prepare(None, (grown,), {})
        keys = torch.randn(1, 4, tokens, 128, device="cuda", dtype=torch.bfloat16)
        states = [cache.update(keys, -keys, 0) for cache in (own, grown)]
        assert all(map(torch.equal, *states))
        places.append(states[1][0].data_ptr())
    assert len(set(places[1:])) == 1, "Transformers' copy of the prompt moves once"
    query = torch.randn(1, 4, 1, 128, device="cuda", dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(*(attend(query, *pair) for pair in states))
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        grown.update(keys, -keys, 0)
    assert grown.layers[0]._rooms is None


def test_what_the_kernels_do_not_take_the_reference_computes(kernels):
    made = module(8, 8, "channel", 8, 2**15, -1, dtype=torch.float32)
    assert made.kernel == f"reference (a sum over {2**15} inputs can leave int32)"
    x = torch.randn(2, 2**15, device="cuda")
    assert torch.equal(made(x), linear(x, made.tensors, 2**15, made.scheme, reference=True))
    with pytest.raises(ValueError, match="does not end in in_features"):
        linear(x[:, :5], made.tensors, 2**15, made.scheme)
