"""Whoever traces, transforms or differentiates a quantized module gets what the reference gives, or
an error, never a silent zero.
"""

import pytest
import torch
from linear_calls import OWN, arguments
from torch import nn
from torch.autograd import forward_ad

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.siblings import Siblings


@pytest.fixture(params=["alone", "shared"])
def modules(request):
    scheme = QuantScheme(
        weight_bits=4, activation_bits=8, granularity="dynamic_token", group_size=32
    )
    made = []
    for rows in (16, 8):
        call = arguments(4, 8, "dynamic_token", rows, 64, 32, None, seed=rows)
        tensors = dict(zip(OWN, call, strict=False))
        made.append(QVLMLinear.from_packed(nn.Linear(64, rows, bias=False), scheme, tensors))
    if request.param == "shared":
        Siblings(made)
    return made


def reference(modules, x):
    for module in modules:
        module.reference = True
    try:
        return [module(x) for module in modules]
    finally:
        for module in modules:
            module.reference = False


X = torch.randn(3, 5, 64)


def close(outputs, expected):
    assert len(outputs) == len(expected)
    for y, one in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_vmap(modules, context):
    with context():
        close([torch.vmap(module)(X) for module in modules], reference(modules, X))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_jit_trace_takes_other_inputs_than_it_saw(modules, context):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(modules)

        def forward(self, x):
            return tuple(part(x) for part in self.parts)

    with context():
        traced = torch.jit.trace(Both(), (X,), check_trace=False)
        for x in (X, X.transpose(0, 1), X[:, :2].contiguous()):
            close(traced(x), reference(modules, x))
    x = X.clone().requires_grad_()
    traced(x)[0].sum().backward()
    assert float(x.grad.abs().max()) > 0


def test_fx_traces(modules):
    traced = [torch.fx.symbolic_trace(module) for module in modules if module.shared is None]
    close([module(X) for module in traced], reference(modules, X)[: len(traced)])


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_forward_mode_is_refused(modules, context):
    with (
        context(),
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="no forward-mode derivative"),
    ):
        modules[0](forward_ad.make_dual(X, torch.ones_like(X)))
    with context(), pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(modules[0], (X,), (torch.ones_like(X),))
    with context(), forward_ad.dual_level():
        close([module(X) for module in modules], reference(modules, X))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_input_written_to_between_two_modules(modules, context):
    with context():
        x = torch.randn(2, 5, 64)
        before = modules[0](x)
        old = x.clone()
        x.mul_(2).add_(1)
        close([before, modules[1](x)], [reference(modules, old)[0], reference(modules, x)[1]])
