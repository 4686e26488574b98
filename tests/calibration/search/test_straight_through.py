"""Rounding with gradients: the simulation's values, the unrounded function's derivatives."""

import pytest
import torch
from tiny_calibrations import tiny_site

from qvlm_hf.calibration.search import straight_through
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.calibration.search.straight_through import StraightThroughSite
from qvlm_hf.format.scheme import GRANULARITIES


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("learn", [False, True])
def test_forward_equals_the_simulation(granularity, learn):
    site, x = tiny_site(granularity)
    with installed([StraightThroughSite(site, learn=learn)]), torch.no_grad():
        differentiable = [linear(x) for linear in site.linears]
    with installed([site]), torch.no_grad():
        for linear, y in zip(site.linears, differentiable, strict=True):
            expected = linear(x)
            # a value on the edge of two integers may fall to the other side
            assert (y - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("which", ["low", "high", "clip"])
def test_gradients_equal_finite_differences(granularity, which, monkeypatch):
    """With the identity for rounding, as straight-through assumes, it is piecewise smooth."""
    monkeypatch.setattr(straight_through, "_straight_through", lambda x, rounded: x)
    site, x = tiny_site(granularity)
    differentiable = StraightThroughSite(site, learn=True)
    parameters = differentiable.parameters()
    with torch.no_grad():
        for parameter in parameters:
            parameter.sub_(0.3)  # clip, so that the ranges matter
    parameter = parameters[{"low": 0, "high": 1, "clip": 2}[which]]
    targets = [
        torch.randn(3, 7, linear.out_features, generator=torch.Generator().manual_seed(2))
        for linear in site.linears
    ]

    def loss():
        with installed([differentiable]):
            return sum(
                (linear(x) - target).double().square().sum()
                for linear, target in zip(site.linears, targets, strict=True)
            )

    (gradient,) = torch.autograd.grad(loss(), parameter)
    assert gradient.abs().max() > 1e-2
    expected = torch.zeros_like(gradient)
    with torch.no_grad():
        for i in range(parameter.numel()):
            values = []
            for step in (5e-3, -5e-3):
                parameter.view(-1)[i] += step
                values.append(float(loss()))
                parameter.view(-1)[i] -= step
            expected.view(-1)[i] = (values[0] - values[1]) / 1e-2
    assert (gradient - expected).norm() < 0.05 * expected.norm()
