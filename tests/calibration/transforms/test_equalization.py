"""Equalization moves scales between weights and changes nothing that the model computes."""

import pytest
import torch
from tiny_calibrations import TEXT, calibrate, tiny_batches, tiny_logits
from tiny_models import tiny_llava

from qvlm_hf import method
from qvlm_hf.calibration.measure.self_check import AnswerComparison
from qvlm_hf.calibration.transforms.equalization import equalize
from qvlm_hf.calibration.transforms.rotation import rotate
from qvlm_hf.models.folds import rotation_plan, scale_paths
from qvlm_hf.models.graph import Selection, resolve

MODELS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped queries": {"key_value_heads": 2},
    "no power of two": {"text_hidden_size": 96, "vision_hidden_size": 48},
    "several vision layers": {"vision_feature_layer": [-2, -1]},
}
LANGUAGE = "model.language_model.layers.0"


def uneven_model(**options):
    """Inputs and weights of very different channels, as real models have them."""
    model = tiny_llava(**options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "v_proj.weight" in name or "up_proj" in name:
                factor = torch.randn(parameter.shape[0], generator=generator).exp()
                parameter.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)))
    return model


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_model_computes_the_same(options):
    model = uneven_model(**options)
    before, weights = tiny_logits(model), {p: p.clone() for p in model.parameters()}
    paths = scale_paths(model, resolve(model))
    live = 3 if "vision_feature_layer" in options else 2
    # a CLIP layer: two norms and the values; a Llama layer also the product
    assert len(paths) == live * 3 + 2 * 4
    equalize(model, paths, tiny_batches(4, 2))
    assert (tiny_logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    for path in paths:
        for module in (path.source, *path.readers):
            assert not torch.equal(module.weight, weights[module.weight])


def test_words_are_predicted_for_one_token_only():
    model, seen = uneven_model(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    equalize(model, scale_paths(model, resolve(model)), tiny_batches(4, 2))
    assert seen == [1, 1]


def test_channels_become_more_alike():
    model = uneven_model()

    def spread(name):
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args: seen.append(args[0])
        )
        tiny_logits(model)
        handle.remove()
        rms = seen[0].flatten(0, -2).square().mean(0).sqrt()
        return float(rms.log().std())

    names = [
        f"{LANGUAGE}.{module}"
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    before = {name: spread(name) for name in names}
    equalize(model, scale_paths(model, resolve(model)), tiny_batches(4, 2))
    assert all(spread(name) < 0.8 * before[name] for name in names)


def test_silent_channels_and_unreached_paths_stay_as_they_are():
    model = uneven_model()
    with torch.no_grad():
        model.get_submodule(f"{LANGUAGE}.input_layernorm").weight[3] = 0.0
        model.get_submodule(f"{LANGUAGE}.mlp.down_proj").weight[:, 5] = 0.0
    vision = {name: p.clone() for name, p in model.named_parameters() if "vision" in name}
    equalize(model, scale_paths(model, resolve(model)), tiny_batches(rows=TEXT))
    for name, tensor in vision.items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_excluded_and_transformed_sites_have_no_path():
    model = tiny_llava()
    names = {module: name for name, module in model.named_modules()}

    def sources(*selection, **options):
        segments = resolve(model, *selection, **options)
        return [names[path.source] for path in scale_paths(model, segments)]

    excluded = sources(Selection(modules_to_not_convert=["mlp.down_proj", "vision_tower"]))
    assert not any("vision" in source or source.endswith("up_proj") for source in excluded)
    rotated = sources(rotated=True)
    assert not any(source.endswith(("up_proj", "layer_norm1")) for source in rotated)


def test_after_a_rotation_too():
    model = uneven_model()
    before = tiny_logits(model)
    rotate(model, rotation_plan(model), seed=0)
    equalize(model, scale_paths(model, resolve(model, rotated=True)), tiny_batches(4, 2))
    assert (tiny_logits(model) - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize(
    ("owner", "step"), [(method, "_search"), (AnswerComparison, "measure")], ids=["search", "check"]
)
def test_an_interrupted_calibration_leaves_the_model_alone(monkeypatch, owner, step):
    model = uneven_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, guard=False, max_block_depth=1, token_importance=False)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
