"""Gradients of the answers: directions of the right covariance, divergences of small errors."""

from itertools import product

import pytest
import torch
from tiny_calibrations import tiny_calibration
from tiny_models import tiny_llava

from qvlm_hf.calibration.measure import gradients
from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.measure.gradients import answer_gradients

LAYERS = ("model.vision_tower.encoder.layers.0", "model.language_model.layers.0")


@pytest.fixture(scope="module")
def calibration():
    return tiny_calibration(tiny_llava(seed=2).eval())


def test_directions_have_mean_zero_and_the_covariance_of_the_predictions(monkeypatch):
    logits = torch.tensor([2.0, 0.5, -1.0, -4.0], dtype=torch.float64)
    found = []
    for signs in product((0, 1), repeat=4):
        monkeypatch.setattr(gradients.torch, "randint", lambda *_, s=signs, **__: torch.tensor([s]))
        found.append(gradients._direction(logits[None], torch.Generator())[0])
    directions, p = torch.stack(found), torch.softmax(logits, -1)
    assert directions.mean(0).abs().max() < 1e-12
    covariance = directions.T @ directions / len(directions)
    assert torch.allclose(covariance, torch.diag(p) - p[:, None] * p, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_they_equal_finite_differences(calibration, monkeypatch, name):
    direction = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gradients, "_direction", lambda logits, _: direction.expand_as(logits))
    batch = calibration.data[0]
    ((_, found),) = answer_gradients(calibration, [batch], draws=1, temperature=2.0)
    error = torch.randn(found[name].shape, generator=torch.Generator().manual_seed(1))

    def value(size):
        hook = lambda _module, _args, output: output + size * error  # noqa: E731
        handle = calibration.model.get_submodule(name).register_forward_hook(hook)
        logits = torch.cat(answer_logits(calibration.model, batch))
        handle.remove()
        return float((logits.double() * direction / 2.0).sum())

    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    assert float((found[name] * error).sum()) == pytest.approx(slope, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_half_the_mean_square_is_the_divergence_of_a_small_error(calibration, name):
    model, batch = calibration.model, calibration.data[0]
    draws = [found for _, found in answer_gradients(calibration, [batch], draws=48)]
    error = 3e-2 * torch.randn(draws[0][name].shape, generator=torch.Generator().manual_seed(3))
    before = answer_logits(model, batch)
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: output + error)
    after = answer_logits(model, batch)
    handle.remove()
    exact = sum(answer_kl(*pair) * len(pair[0]) for pair in zip(before, after, strict=True))
    products = [(draw[name] * error).flatten(1).sum(1) for draw in draws]
    estimate = float(torch.stack(products).square().mean(0).sum()) / 2
    assert estimate == pytest.approx(exact, rel=0.5)


def test_seeds_repeat_and_the_model_is_left_as_it_was(calibration):
    model = calibration.model
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    runs = [list(answer_gradients(calibration, calibration.data, draws=2)) for _ in range(2)]
    assert [index for index, _ in runs[0]] == [0, 0, 1, 1]
    for (_, one), (_, again) in zip(*runs, strict=True):
        assert all(torch.equal(one[name], again[name]) for name in one)
    (_, one), (_, other) = runs[0][:2]
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_of_a_layer_s_own_stays(calibration):
    """Accelerate puts one there."""
    layer = calibration.model.get_submodule(LAYERS[1])
    layer.forward = own = layer.forward
    list(answer_gradients(calibration, calibration.data[:1], draws=1))
    assert layer.forward is own
    del layer.forward
