"""Gradients of the answers: directions of the right covariance, divergences of small errors."""

from itertools import product

import pytest
import torch
from tiny_calibrations import tiny_calibration
from tiny_models import tiny_llava

from qvlm_hf.calibration.backward import frozen, observe_outputs
from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.measure import gradients
from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits, run_answers
from qvlm_hf.calibration.measure.gradients import answer_gradients


def by_draw(calibration, batches, **options):
    """Per batch and draw: layer -> g."""
    found = {}
    for index, name, draws in answer_gradients(calibration, batches, **options):
        for draw, gradient in enumerate(draws):
            found.setdefault((index, draw), {})[name] = gradient
    return found


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
    (found,) = by_draw(calibration, [batch], draws=1, temperature=2.0).values()
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
    draws = list(by_draw(calibration, [batch], draws=48).values())
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
    runs = [by_draw(calibration, calibration.data, draws=2) for _ in range(2)]
    assert list(runs[0]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for one, again in zip(*(run.values() for run in runs), strict=True):
        assert all(torch.equal(one[name], again[name]) for name in one)
    one, other = runs[0][0, 0], runs[0][0, 1]
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


@pytest.mark.parametrize("options", [{}, {"vision_feature_layer": [-2, -1]}], ids=str)
def test_they_equal_one_backward_pass_through_the_whole_graph(options):
    calibration = tiny_calibration(tiny_llava(seed=3, **options).eval())
    model, batch = calibration.model, calibration.data[0]
    names = [layer.name for s in calibration.segments for layer in live_layers(s)]
    generator = torch.Generator().manual_seed(calibration.settings.seed)
    with frozen(model), observe_outputs(model, names) as outputs, torch.enable_grad():
        logits = torch.cat(run_answers(model, batch, use_cache=False)).float()
    for found in by_draw(calibration, [batch], draws=3).values():
        direction = gradients._direction(logits.detach(), generator)
        whole = torch.autograd.grad(logits, list(outputs.values()), direction, retain_graph=True)
        assert set(found) == set(outputs)
        for name, expected in zip(outputs, whole, strict=True):
            size = expected.abs().max()
            assert size > 0
            assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5 * size)


def test_a_layer_runs_twice_however_many_draws(calibration):
    runs = []
    layer = calibration.model.get_submodule(LAYERS[1])
    hook = layer.mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    list(answer_gradients(calibration, calibration.data[:1], draws=5))
    hook.remove()
    assert runs == [False, True]
