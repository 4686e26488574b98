"""Equalization moves scales between weights and changes nothing that the model computes."""

import pytest
import torch
from tiny_models import tiny_llava, tiny_messages, tiny_processor

from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.calibration.transforms.equalization import equalize
from qvlm_hf.calibration.transforms.rotation import rotate
from qvlm_hf.models.folds import rotation_plan, scale_paths
from qvlm_hf.models.graph import resolve
from qvlm_hf.quantize import CalibrationSettings, calibrate_and_pack

MODELS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped queries": {"key_value_heads": 2},
    "no power of two": {"text_hidden_size": 96, "vision_hidden_size": 48},
    "several vision layers": {"vision_feature_layer": [-2, -1]},
}
LANGUAGE = "model.language_model.layers.0"


def data(count=4):
    return list(batches(load_samples(tiny_messages(count)), tiny_processor(), 2))


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


def logits(model):
    with torch.no_grad():
        return model(**data()[0].inputs).logits


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_model_computes_the_same(options):
    model = uneven_model(**options)
    before, weights = logits(model), {p: p.clone() for p in model.parameters()}
    paths = scale_paths(model, resolve(model))
    live = 3 if "vision_feature_layer" in options else 2
    assert (
        len(paths) == live * 3 + 2 * 4
    )  # a CLIP layer: two norms and the values; a Llama layer also the product
    equalize(model, paths, data())
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    for path in paths:
        for module in (path.source, *path.readers):
            assert not torch.equal(module.weight, weights[module.weight])


def test_channels_become_more_alike():
    model = uneven_model()

    def spread(name):
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args: seen.append(args[0])
        )
        logits(model)
        handle.remove()
        rms = seen[0].flatten(0, -2).square().mean(0).sqrt()
        return float(rms.log().std())

    names = [
        f"{LANGUAGE}.{module}"
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    before = {name: spread(name) for name in names}
    equalize(model, scale_paths(model, resolve(model)), data())
    assert all(spread(name) < 0.8 * before[name] for name in names)


def test_silent_channels_and_unreached_paths_stay_as_they_are():
    model = uneven_model()
    with torch.no_grad():
        model.get_submodule(f"{LANGUAGE}.input_layernorm").weight[3] = 0.0
        model.get_submodule(f"{LANGUAGE}.mlp.down_proj").weight[:, 5] = 0.0
    text = [
        {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]}
    ]
    vision = {name: p.clone() for name, p in model.named_parameters() if "vision" in name}
    equalize(
        model,
        scale_paths(model, resolve(model)),
        list(batches(load_samples(text), tiny_processor(), 1)),
    )
    assert all(
        torch.equal(p, vision[name]) for name, p in model.named_parameters() if name in vision
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_excluded_and_transformed_sites_have_no_path():
    model = tiny_llava()
    names = {module: name for name, module in model.named_modules()}

    def sources(**options):
        return [names[path.source] for path in scale_paths(model, resolve(model, **options))]

    excluded = sources(modules_to_not_convert=["mlp.down_proj", "vision_tower"])
    assert not any("vision" in source or source.endswith("up_proj") for source in excluded)
    rotated = sources(rotated=True)
    assert not any(source.endswith(("up_proj", "layer_norm1")) for source in rotated)


def test_after_a_rotation_too():
    model = uneven_model()
    before = logits(model)
    rotate(model, rotation_plan(model), seed=0)
    equalize(model, scale_paths(model, resolve(model, rotated=True)), data())
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()


def test_a_calibration_that_fails_leaves_the_model_alone(monkeypatch):
    model = uneven_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr("qvlm_hf.quantize._search", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate_and_pack(
            model,
            CalibrationSettings(batch_size=2, guard=False),
            load_samples(tiny_messages(4)),
            tiny_processor(),
        )
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_interrupted_self_check_leaves_the_model_alone(monkeypatch):
    model = uneven_model()
    before, kinds = (
        {name: p.clone() for name, p in model.named_parameters()},
        [type(module) for module in model.modules()],
    )

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qvlm_hf.quantize.compare_answers", interrupted)
    settings = CalibrationSettings(
        batch_size=2, guard=False, max_block_depth=1, token_importance=False
    )
    with pytest.raises(KeyboardInterrupt):
        calibrate_and_pack(model, settings, load_samples(tiny_messages(4)), tiny_processor())
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
