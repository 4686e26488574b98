"""Token weights: gradients of the answers, against finite differences."""

from dataclasses import replace

import pytest
import torch
from tiny_calibrations import tiny_batches
from tiny_models import tiny_llava

from qvlm_hf.calibration.measure import importance
from qvlm_hf.calibration.measure.importance import token_importance
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import IGNORE_INDEX
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import resolve

LAYER = "model.language_model.layers.0"


@pytest.fixture(scope="module")
def model():
    return tiny_llava().eval()


def data(count=4, batch_size=2):
    return tiny_batches(count, batch_size)


def weights(model, batches=None, seed=0):
    return token_importance(
        Calibration(
            model=model,
            settings=CalibrationSettings(seed=seed),
            segments=resolve(model),
            data=batches or data(),
        )
    )


def test_one_weight_per_token_of_every_live_layer(model):
    found = weights(model)
    live = [layer.name for segment in resolve(model) for layer in segment.layers if not layer.dead]
    assert list(found) == live
    for name in live:
        assert len(found[name]) == 2
        assert min(float(w.min()) for w in found[name]) >= 0.1
    assert found[LAYER][0].shape == data()[0].inputs["input_ids"].shape
    assert found["model.vision_tower.encoder.layers.0"][0].shape == (2, 17)


def test_tokens_behind_the_answer_get_the_least(model):
    """No gradient reaches what comes after the last answer token: only the floor is left."""
    for batch, weight in zip(data(), weights(model)[LAYER], strict=True):
        last = (batch.labels != IGNORE_INDEX).float().cumsum(1).argmax(1)
        for row, end in enumerate(last.tolist()):
            assert torch.equal(weight[row, end:], torch.full_like(weight[row, end:], 0.1))
            assert weight[row, :end].max() > 1


def test_weights_are_norms_of_gradients_over_their_mean(model, monkeypatch):
    gradients = [
        torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]),
        torch.tensor([[[0.0, 12.0], [2.0, 0.0]]]),
    ]
    monkeypatch.setattr(importance, "answer_gradients", lambda *_, **__: [(0, LAYER, gradients)])
    (found,) = weights(model)[LAYER]
    assert torch.allclose(found, torch.tensor([[13.0, 2.0]]) / 7.5)


def test_the_model_is_left_as_it_was_and_seeds_repeat(model):
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    first, again, other = (weights(model, seed=seed) for seed in (1, 1, 2))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    same, different = (
        [torch.equal(a, b) for name in first for a, b in zip(first[name], one[name], strict=True)]
        for one in (again, other)
    )
    assert all(same)
    assert not all(different)


def test_without_answers_all_tokens_count_alike(model):
    (batch,) = data(1, 1)
    silent = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
    for per_batch in weights(model, [silent]).values():
        assert all(torch.equal(w, torch.ones_like(w)) for w in per_batch)
