"""A rotation changes the weights and nothing that the model computes."""

import copy

import pytest
import torch
from tiny_calibrations import tiny_batches, tiny_logits
from tiny_models import tiny_llava
from torch import nn

from qvlm_hf.calibration.transforms.rotation import residual_rotation, rotate, undone_on_error
from qvlm_hf.format.hadamard import largest_block
from qvlm_hf.models.folds import rotation_plan
from qvlm_hf.models.graph import resolve

MODELS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped queries": {"key_value_heads": 2},
    "no power of two": {"text_hidden_size": 96, "vision_hidden_size": 48},
    "odd head": {
        "text_hidden_size": 56,
        "vision_hidden_size": 36,
    },  # heads of 14 and 9: little or nothing to fold
    "several vision layers": {"vision_feature_layer": [-2, -1]},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_stay_within_1e_4(options):
    model = tiny_llava(**options)
    before = tiny_logits(model)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rotate(model, rotation_plan(model), seed=3)
    after = tiny_logits(model)
    assert (after - before).abs().max() < 1e-4
    changed = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, weights.get(name, parameter))
    }
    assert "model.language_model.embed_tokens.weight" in changed
    for layer in range(2):
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            assert f"model.language_model.layers.{layer}.{module}.weight" in changed
    assert "model.multi_modal_projector.linear_2.bias" in changed
    for name, module in model.named_modules():
        if (
            name.endswith(("layernorm", "layer_norm1", "layer_norm2", "language_model.norm"))
            and "post_layernorm" not in name
        ):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert getattr(module, "bias", None) is None or not module.bias.any(), name


def test_tied_embeddings_become_two_tensors():
    model = tiny_llava(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    rotate(model, rotation_plan(model), seed=0)
    assert (
        model.lm_head.weight.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr()
    )
    assert not model.config.tie_word_embeddings
    assert not model.config.text_config.tie_word_embeddings


@pytest.mark.parametrize("size", [64, 344, 96, 7, 5])
def test_the_residual_rotation_is_orthogonal_and_seeded(size):
    identity = torch.eye(size, dtype=torch.float64)
    matrix = residual_rotation(size, seed=1)(identity)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)
    assert torch.equal(matrix, residual_rotation(size, seed=1)(identity))
    if size > 7:
        assert not torch.equal(matrix, residual_rotation(size, seed=2)(identity))
        # every output mixes all inputs: none keeps more than a few times its share of an outlier
        assert matrix.abs().max() < 4 / largest_block(size) ** 0.5


def test_an_outlier_channel_disappears_from_every_input_it_reached():
    model = tiny_llava()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.input_layernorm.weight[5] *= 50
    batch = tiny_batches(3, 3)[0]

    def peak():
        seen = []
        handle = model.model.language_model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda _module, args: seen.append(args[0])
        )
        with torch.no_grad():
            model(**batch.inputs)
        handle.remove()
        return float(seen[0].abs().max() / seen[0].square().mean().sqrt())

    before = peak()
    rotate(model, rotation_plan(model), seed=0)
    assert before > 15
    assert peak() < 6


def test_an_error_gives_back_the_very_parameters():
    model = tiny_llava(tie_word_embeddings=True)
    before, tied = tiny_logits(model), dict(model.all_tied_weights_keys)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}

    def interrupted():
        with undone_on_error(model):
            rotate(model, rotation_plan(model), seed=0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert model.all_tied_weights_keys == tied != {}
    assert torch.equal(tiny_logits(model), before)


def test_a_norm_bias_needs_a_reader_with_a_bias():
    model = tiny_llava()
    layer = model.model.vision_tower.encoder.layers[0]
    layer.mlp.fc1.bias = None
    with torch.no_grad():
        layer.layer_norm2.bias += 1
    with pytest.raises(ValueError, match="rotation=None"):
        rotate(copy.deepcopy(model), rotation_plan(model), seed=0)


def test_which_sites_get_an_online_transform():
    model = tiny_llava()
    plain, rotated = resolve(model), resolve(model, rotated=True)
    assert {
        site.hadamard for segment in plain for layer in segment.layers for site in layer.sites
    } == {None}
    blocks = {
        site.name: site.hadamard
        for segment in rotated
        for layer in segment.layers
        for site in layer.sites
    }
    assert blocks["model.language_model.layers.0.mlp.down_proj"] == 8  # 104 = 8 * 13
    # the residual stream itself is rotated
    assert blocks["model.language_model.layers.0.self_attn.q_proj"] is None
    assert type(model.get_submodule("model.language_model.layers.0.mlp.down_proj")) is nn.Linear
