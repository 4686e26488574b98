import pytest
import torch
from packing_by_hand import pack_linear
from torch import nn

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.replace import dequantize_modules, quantized_modules, replace_modules

SCHEME = QuantScheme(weight_bits=8, activation_bits=16, group_size=16, granularity="none")


def quantize(linear):
    return pack_linear(linear, SCHEME)


@pytest.fixture
def model():
    block = nn.ModuleDict(
        {"up": nn.Linear(16, 32), "act": nn.ReLU(), "down": nn.Linear(32, 16, bias=False)}
    )
    return nn.ModuleDict(
        {
            "first": nn.Linear(16, 16),
            "layers": nn.ModuleList([block, nn.Linear(16, 8)]),
            "head": nn.Linear(8, 4),
        }
    ).eval()


def names(model):
    return [name for name, _ in model.named_modules()]


def test_replaces_at_every_depth_and_nothing_else(model):
    order, before = names(model), dict(model.named_modules())
    new = {name: quantize(before[name]) for name in ("layers.0.down", "head", "layers.1")}
    replace_modules(model, new)
    after = dict(model.named_modules())
    assert names(model) == order
    for name, module in after.items():
        assert module is new.get(name, before[name])


def test_hooks_stay_until_their_handle_removes_them(model):
    linear, seen = model.get_submodule("layers.1"), []
    handles = [
        linear.register_forward_pre_hook(lambda _, args: seen.append("before")),
        linear.register_forward_hook(
            lambda _, args, kwargs, y: seen.append(kwargs) or y + 1, with_kwargs=True
        ),
        linear.register_forward_hook(lambda *_: seen.append("always"), always_call=True),
        linear.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    x = torch.randn(3, 16, requires_grad=True)

    def run():
        seen.clear()
        y = model.get_submodule("layers.1")(x)
        y.sum().backward()
        return y

    run()
    expected = list(seen)
    assert len(expected) == 4
    packed = quantize(linear)
    replace_modules(model, {"layers.1": packed})
    y = run()
    assert (seen, model.get_submodule("layers.1")) == (expected, packed)
    dequantize_modules(model, torch.float32)
    torch.testing.assert_close(run(), y)
    assert seen == expected
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(run(), y - 1)
    assert seen == []


def test_a_wrong_name_raises(model):
    with pytest.raises(AttributeError):
        replace_modules(model, {"layers.0.missing.down": nn.Identity()})


def test_lists_quantized_modules_in_model_order(model):
    assert list(quantized_modules(model)) == []
    order = ("layers.0.up", "layers.1", "head")
    new = {name: quantize(model.get_submodule(name)) for name in reversed(order)}
    replace_modules(model, new)
    assert list(quantized_modules(model)) == [(name, new[name]) for name in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizes_every_module(model, dtype):
    quantized_names = ("first", "layers.0.down", "head")
    plain = {name: model.get_submodule(name) for name in quantized_names}
    replace_modules(model, {name: quantize(module) for name, module in plain.items()})
    order, other = names(model), model.get_submodule("layers.0.up")
    x = torch.randn(3, 16)
    expected = model["first"](x)
    dequantize_modules(model, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(model["first"](x), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(model["first"](x), plain["first"](x))
    assert names(model) == order
    assert list(quantized_modules(model)) == []
    assert model.get_submodule("layers.0.up") is other
    for name in quantized_names:
        module = model.get_submodule(name)
        assert type(module) is nn.Linear
        assert module.weight.dtype == dtype
        torch.testing.assert_close(module.weight.float(), plain[name].weight, rtol=0, atol=0.005)
        assert (module.bias is None) == (plain[name].bias is None)
        if module.bias is not None:
            assert torch.equal(module.bias, plain[name].bias.to(dtype))
