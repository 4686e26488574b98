import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from packing_by_hand import pack_weight
from torch import nn

from qvlm_hf.format.grids import choose_qparams, quantize_weight
from qvlm_hf.format.packing import unpack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn import QVLMLinear
from qvlm_hf.nn.linear import packed_tensors

IN, OUT, POSITIONS = 40, 6, 5
GRANULARITIES = ("channel", "token", "dynamic_token", "dynamic_group", "none")
FIXED = {"weight": torch.int32, "weight_scale": torch.bfloat16, "weight_zero_point": torch.uint8}
STATIC = {"input_scale": torch.float32, "input_zero_point": torch.int32}


def scheme_of(granularity="channel", **changes):
    usual = {"weight_bits": 4, "activation_bits": 16 if granularity == "none" else 8}
    usual |= {"group_size": 16, "granularity": granularity}
    return QuantScheme(**(usual | changes))


def quantized(scheme, *, bias=True, dtype=torch.float32, scaled_input=False):
    """(module, linear, x, tensors): a quantized random linear module, and what it was made of."""
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    x = torch.randn(3, POSITIONS, IN) * torch.linspace(0.5, 3, IN) + 0.2
    tensors = pack_weight(linear, scheme, x, torch.rand(IN) + 0.5 if scaled_input else None)
    return QVLMLinear.from_packed(linear, scheme, tensors), linear, x, tensors


def layout(module):
    return {
        name: (parameter.dtype, tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled_input", [None, True])
def test_parameters_are_the_tensors_of_the_format(granularity, symmetric, bias, scaled_input):
    scheme = scheme_of(granularity, symmetric=symmetric, weight_bits=3)
    module = QVLMLinear(
        IN,
        OUT,
        scheme,
        bias=bias,
        dtype=torch.float16,
        positions=POSITIONS,
        has_input_scale=scaled_input,
        device="meta",
    )
    expected = {
        "weight": (torch.int32, (OUT, 4)),
        "weight_scale": (torch.bfloat16, (OUT, 3)),
    }  # 120 bits are 4 words
    if not symmetric:
        expected["weight_zero_point"] = (torch.uint8, (OUT, 3))
    statics = {"channel": IN, "token": POSITIONS, "none": IN if scaled_input else None}.get(
        granularity
    )
    if statics:
        expected["input_scale"] = (torch.float32, (statics,))
    if granularity in ("channel", "token"):
        expected["input_zero_point"] = (torch.int32, (statics,))
    if bias:
        expected["bias"] = (torch.float16, (OUT,))
    assert layout(module) == expected
    assert list(module.state_dict()) == list(expected)
    assert not list(module.buffers())
    for name in (*FIXED, *STATIC, "bias"):
        assert (getattr(module, name) is None) == (name not in expected)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_token_needs_its_positions_and_refuses_others():
    message = r"^granularity 'token' needs the number of positions it was calibrated for\.$"
    with pytest.raises(ValueError, match=message):
        QVLMLinear(IN, OUT, scheme_of("token"), bias=True, dtype=torch.float32)
    module, _, x, _ = quantized(scheme_of("token"))
    message = r"shape \(3, 4, 40\) does not have the 5 positions that 'token' was calibrated for"
    with pytest.raises(ValueError, match=message):
        module(x[:, :4])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hadamard", [None, 8])
def test_forward_is_close_to_the_layer_it_came_from(granularity, symmetric, hadamard):
    scheme = scheme_of(granularity, weight_bits=8, symmetric=symmetric, hadamard=hadamard)
    module, linear, x, tensors = quantized(scheme, scaled_input=granularity == "none")
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (linear.in_features, linear.out_features)
    y, expected = module(x), linear(x)
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.02 * expected.norm()
    without_bias = QVLMLinear.from_packed(nn.Linear(IN, OUT, bias=False), scheme, tensors)
    assert without_bias.bias is None
    torch.testing.assert_close(without_bias(x) + linear.bias, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_keeps_the_dtype_of_its_input(dtype):
    module, _, x, _ = quantized(scheme_of())
    y = module(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), module(x.to(dtype).float()), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("reference", [False, True])
def test_forward_takes_floating_point_alone(granularity, dtype, reference):
    module, _, x, _ = quantized(scheme_of(granularity))
    module.reference = reference
    message = rf"^an input of {dtype} is no floating point: convert it, as by x\.float\(\)\.$"
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
            module(x.to(dtype))


def test_from_packed_takes_tensors_bias_and_mode():
    scheme = scheme_of()
    _, linear, _, tensors = quantized(scheme, dtype=torch.bfloat16)
    linear.eval()
    module = QVLMLinear.from_packed(linear, scheme, tensors)
    assert not module.training
    for name, tensor in tensors.items():
        assert getattr(module, name).data_ptr() == tensor.data_ptr()
    assert module.bias.dtype == torch.bfloat16
    assert torch.equal(module.bias, linear.bias)
    assert linear.bias.requires_grad  # the layer it came from is left as it was
    assert not module.bias.requires_grad
    assert linear.weight.shape == (OUT, IN)
    assert QVLMLinear.from_packed(linear.train(), scheme, tensors).training


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hadamard", [None, 8])
@pytest.mark.parametrize("scaled_input", [False, True])
def test_dequantize_undoes_scale_and_transform(granularity, symmetric, hadamard, scaled_input):
    scaled_input = scaled_input and granularity == "none"
    scheme = scheme_of(granularity, symmetric=symmetric, hadamard=hadamard)
    module, _, _, tensors = quantized(scheme, scaled_input=scaled_input)
    parts = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    scale = parts["weight_scale"].repeat(16, 1)[:, :IN]
    zero_point = 8.0 if symmetric else parts["weight_zero_point"].repeat(16, 1)[:, :IN]
    expected = scale * (unpack(tensors["weight"], 4, IN).double().numpy() - zero_point)
    if granularity == "channel" or scaled_input:
        expected = expected / parts["input_scale"]
    if hadamard:
        h = np.array([[1.0]])
        while len(h) < hadamard:
            h = np.block([[h, h], [h, -h]])
        expected = (expected.reshape(OUT, -1, hadamard) @ h / math.sqrt(hadamard)).reshape(OUT, IN)
    dequantized = module.dequantize()
    assert dequantized.dtype == torch.float32
    np.testing.assert_allclose(dequantized.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_scale_that_was_widened_gets_its_dtype_back():
    module, _, x, _ = quantized(scheme_of())
    expected = module(x)
    for narrowing in (module.train, module.state_dict):
        for parameter in module.parameters():  # as peft.prepare_model_for_kbit_training does
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(torch.float32)
        assert module.weight_scale.dtype == torch.float32
        narrowing()
        assert module.weight_scale.dtype == torch.bfloat16
        assert torch.equal(module(x), expected)
    assert module.state_dict()["weight_scale"].dtype == torch.bfloat16


def test_to_linear():
    module, linear, x, _ = quantized(
        scheme_of("none", weight_bits=8, hadamard=8), scaled_input=True
    )
    plain = module.eval().to_linear(torch.float32)
    assert type(plain) is nn.Linear
    assert not plain.training
    assert torch.equal(plain.weight, module.dequantize())
    assert torch.equal(plain.bias, linear.bias)
    torch.testing.assert_close(plain(x), module(x), rtol=1e-4, atol=1e-4)
    half = module.train().to_linear(torch.bfloat16)
    assert half.training
    assert (half.weight.dtype, half.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(half.weight, module.dequantize().bfloat16())
    assert quantized(scheme_of(), bias=False)[0].to_linear(torch.float32).bias is None


CASTS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.to(torch.float64),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "inside a model": lambda m: nn.Sequential(nn.Linear(2, 2), m).half()[1],
    "there and back": lambda m: m.half().double().bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_the_model_leaves_the_format_alone(cast):
    plain, _, x, _ = quantized(scheme_of(), bias=False)
    assert torch.equal(CASTS[cast](copy.deepcopy(plain))(x), plain(x))
    module, _, _, tensors = quantized(scheme_of(), dtype=torch.float32)
    with torch.no_grad():
        module.weight_scale[0, 0] = 3e38  # neither fits into float16
        module.input_scale[0] = 1e-30
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    returned = CASTS[cast](module)
    assert returned is module
    for name, tensor in before.items():
        parameter = getattr(module, name)
        assert isinstance(parameter, nn.Parameter)
        assert parameter.dtype == (FIXED | STATIC)[name]
        assert torch.equal(parameter, tensor)
    dtypes = {
        "bfloat16": torch.bfloat16,
        "float": torch.float32,
        "double": torch.float64,
        "there and back": torch.bfloat16,
    }
    assert module.bias.dtype == dtypes.get(cast, torch.float16)


def test_moving_to_meta_and_back_empty():
    module, *_ = quantized(scheme_of())
    before = layout(module)
    module.to("meta")
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert layout(module.to_empty(device="cpu")) == before
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_state_dict_round_trip(granularity):
    module, _, x, _ = quantized(scheme_of(granularity))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = QVLMLinear(IN, OUT, module.scheme, bias=True, dtype=torch.float32, positions=POSITIONS)
    other.load_state_dict(torch.load(buffer), strict=True)
    assert torch.equal(other(x), module(x))


SPOILED = {
    "half": lambda tensor: tensor.half(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "average": lambda tensor: (tensor + tensor) / 2,
    "int64": lambda tensor: tensor.long(),
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_no_other_type_for_integers(spoil, granularity, assign):
    module, _, x, _ = quantized(scheme_of(granularity))
    expected = module(x)
    whole = nn.Sequential(module)
    good = whole.state_dict()
    integers = [name for name, tensor in good.items() if not tensor.is_floating_point()]
    assert "0.weight" in integers
    for name in integers:
        spoiled = SPOILED[spoil](good[name])
        words = rf"{name} holds {spoiled.dtype}, not {good[name].dtype}: .*model\.dequantize\(\)"
        with pytest.raises(RuntimeError, match=words):
            whole.load_state_dict(good | {name: spoiled}, assign=assign)
        assert torch.equal(module(x), expected)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        whole.load_state_dict(good | {"0.weight": good["0.weight"][:, 1:]}, assign=assign)
    widened = {name: good[name].float() for name in good.keys() - set(integers)}
    whole.load_state_dict(good | widened)  # floats in other types load as ever
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("in_features", [8, 33, 40, 64])
def test_a_program_without_the_package_fails_to_load_it(weight_bits, in_features):
    module = QVLMLinear(
        in_features,
        OUT,
        scheme_of(weight_bits=weight_bits),
        bias=True,
        dtype=torch.float32,
        device="meta",
    )
    assert module.weight.shape[1] < in_features
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(in_features, OUT, device="meta").load_state_dict(
            module.state_dict(), strict=False
        )


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_copies_are_equal_and_independent(copier, granularity):
    module, _, x, _ = quantized(scheme_of(granularity, hadamard=8))
    twin = copier(module)
    assert type(twin) is QVLMLinear
    assert twin.scheme == module.scheme
    assert layout(twin) == layout(module)
    expected = module(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.weight_scale.mul_(2)
        twin.bias.add_(1)
    assert torch.equal(module(x), expected)
    assert not torch.equal(twin(x), expected)


def test_repr_tells_sizes_and_scheme():
    module, *_ = quantized(scheme_of("dynamic_token", activation_bits=6))
    sizes = "in_features=40, out_features=6, bias=True, W4A6, group_size=16"
    assert repr(module) == f"QVLMLinear({sizes}, granularity=dynamic_token)"
    assert "bias=False" in repr(quantized(scheme_of(), bias=False)[0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_transformers_is_told_not_to_initialise_it(granularity):
    module, linear, *_ = quantized(scheme_of(granularity))
    empty = QVLMLinear(
        IN, OUT, module.scheme, bias=True, dtype=torch.float32, positions=POSITIONS, device="meta"
    )
    for made in (module, empty):
        assert made._is_hf_initialized is True
        for parameter in made.parameters():
            assert parameter._is_hf_initialized is True
    assert not hasattr(linear.bias, "_is_hf_initialized")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_pass_through_to_what_lies_below(granularity):
    """LoRA and VEO train through it: dx = dy W, and only what asks for a gradient gets one."""
    module, _, x, _ = quantized(scheme_of(granularity))
    x.requires_grad_()
    grad = torch.randn(3, POSITIONS, OUT)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ module.dequantize(), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in module.parameters())
    module.bias.requires_grad_()
    module(x.detach()).backward(grad)
    torch.testing.assert_close(module.bias.grad, grad.sum((0, 1)))


def test_modules_of_a_site_do_not_share_memory():
    """They share their QParams; safetensors refuses to save two names of one storage."""
    scheme = scheme_of()
    qparams = choose_qparams(-torch.rand(IN), torch.rand(IN), 8)
    weight = quantize_weight(torch.randn(OUT, IN), scheme)
    first, second = packed_tensors(weight, scheme, qparams), packed_tensors(weight, scheme, qparams)
    for name in STATIC:
        assert first[name].data_ptr() != second[name].data_ptr()
        assert torch.equal(first[name], second[name])
