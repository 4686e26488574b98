"""How a model is resolved. tests/models/test_families.py tries every row of the tables."""

import re
from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_llava
from torch import nn

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.find_parts import component_finder
from qvlm_hf.models.graph import (
    Layer,
    Segment,
    Selection,
    Site,
    canonical_name,
    full_precision_modules,
    get_linear,
    matches,
    output_head,
    resolve,
    shared_inputs,
)
from qvlm_hf.nn.linear import QVLMLinear

VISION, PROJECTOR = "model.vision_tower.encoder.layers", "model.multi_modal_projector"
LANGUAGE = "model.language_model.layers"
DOWN = f"{LANGUAGE}.1.mlp.down_proj"
MODELS = {
    "llava": tiny_llava,
    "grouped queries": lambda: tiny_llava(key_value_heads=2, text_hidden_size=96),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module", params=MODELS)
def any_model(request):
    return MODELS[request.param]()


def linears(model):
    modules = model.named_modules()
    return [canonical_name(name) for name, module in modules if type(module) is nn.Linear]


def sites(segments):
    return [site for segment in segments for layer in segment.layers for site in layer.sites]


def quantized(segments):
    return [name for site in sites(segments) for name in site.modules]


def test_segments_layers_and_sites_in_execution_order(model):
    def layer(name, *groups, dead=False):
        made = tuple(Site(tuple(f"{name}.{part}" for part in group.split())) for group in groups)
        return Layer(name, made, dead)

    qkv = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
    clip = (qkv, "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    llama = (qkv, "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj")
    segments = resolve(model)
    assert segments == (
        Segment("vision", tuple(layer(f"{VISION}.{i}", *clip, dead=i == 2) for i in range(3))),
        Segment("projector", (layer(PROJECTOR, "linear_1", "linear_2"),)),
        Segment("language", tuple(layer(f"{LANGUAGE}.{i}", *llama) for i in range(2))),
    )
    assert segments[0].layers[0].sites[0].name == f"{VISION}.0.self_attn.q_proj"


def test_what_is_resolved_are_the_modules_of_these_names(any_model):
    for segment in resolve(any_model):
        for layer in segment.layers:
            assert layer.module is any_model.get_submodule(layer.name)
            for site in layer.sites:
                assert [*map(any_model.get_submodule, site.modules)] == [*site.linears]


def test_every_linear_is_quantized_once_or_reported(any_model):
    segments = resolve(any_model)
    names = quantized(segments)
    assert len(set(names)) == len(names)
    assert full_precision_modules(any_model, segments) == ("lm_head",)
    assert {*names, "lm_head"} == set(linears(any_model))


def test_works_on_the_meta_device(any_model):
    with torch.device("meta"):
        empty = type(any_model)(any_model.config)
    assert resolve(empty) == resolve(any_model)


@pytest.mark.parametrize(
    ("vision_feature_layer", "dead"),
    [
        (-1, [False, False, False, False]),
        (-2, [False, False, False, True]),
        (-3, [False, False, True, True]),
        ([-2, -4], [False, False, False, True]),
        ([-4, -2], [False, False, False, True]),
        ([-4, -5], [False, True, True, True]),
        (1, [False, True, True, True]),
        (3, [False, False, False, True]),
        (4, [False, False, False, False]),
        ([1, -3], [False, False, True, True]),
    ],
)
def test_dead_layers_do_not_change_a_bit_of_the_projectors_input(vision_feature_layer, dead):
    model = tiny_llava(vision_layers=4, vision_feature_layer=vision_feature_layer)
    vision, *rest = resolve(model)
    assert [layer.dead for layer in vision.layers] == dead
    assert not any(layer.dead for segment in rest for layer in segment.layers)
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    pixels = torch.randn(1, 3, 32, 32)
    model.get_image_features(pixels)
    for layer in vision.layers:
        with torch.no_grad():
            layer.module.mlp.fc2.bias.add_(1)
        model.get_image_features(pixels)
    assert [torch.equal(before, after) for before, after in pairwise(seen)] == dead


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"quantize_vision": False}, ["projector", "language"]),
        ({"quantize_projector": False}, ["vision", "language"]),
        ({"quantize_vision": False, "quantize_projector": False}, ["language"]),
    ],
)
def test_components_can_be_left_out(model, options, left):
    segments = resolve(model, Selection(**options))
    assert segments == tuple(s for s in resolve(model) if s.component in left)
    assert len(full_precision_modules(model, segments)) == len(linears(model)) - len(
        quantized(segments)
    )


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        (DOWN, "layers.1", True),
        (DOWN, "ayers.1", False),
        (DOWN, "mlp.down_proj", True),
        (DOWN, "mlp.down", False),
        (DOWN, "model.layers", False),
        (DOWN, DOWN, True),
        (DOWN, f"{DOWN}.weight", False),
        (f"{LANGUAGE}.10.mlp.down_proj", "layers.1", False),
        (f"{LANGUAGE}.11.mlp.down_proj", "layers.1", False),
        (f"{VISION}.0.mlp.fc1", "vision_tower", True),
        (f"{VISION}.0.mlp.fc1", "vision", False),
        (f"{VISION}.0.mlp.fc1", "model.vision_tower", True),
        ("model.vision_model.encoder.layers.0", "vision_model.encoder", True),
        (f"{VISION}.0.mlp.fc1", "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1", True),
        ("model.vision_tower.vision_model.encoder.layers.0", "model.vision_tower.encoder", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "", False),
    ],
)
def test_matches_whole_path_components(name, pattern, expected):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("patterns", "gone"),
    [
        ([DOWN], rf"{LANGUAGE}\.1\.mlp\.down_proj"),
        (["mlp.down_proj"], r".*mlp\.down_proj"),
        (["vision_tower"], r".*vision_tower\..*"),
        (["layers.1"], r".*\.layers\.1\..*"),
        (["self_attn.k_proj"], r".*k_proj"),
        (["multi_modal_projector"], r".*projector.*"),
        (["q_proj", "lm_head", "mlp"], r".*(q_proj|\.mlp\..*)"),
    ],
)
def test_patterns_exclude_exactly_their_modules(patterns, gone):
    model = tiny_llava(text_layers=11)  # layers.10 exists
    segments = resolve(model, Selection(modules_to_not_convert=patterns))
    left = [name for name in quantized(resolve(model)) if not re.fullmatch(gone, name)]
    assert quantized(segments) == left
    assert full_precision_modules(model, segments) == tuple(
        name for name in linears(model) if name not in left
    )
    for segment in segments:  # layers stay in their place; a segment without any site goes
        whole = next(one for one in resolve(model) if one.component == segment.component)
        assert [layer.name for layer in segment.layers] == [layer.name for layer in whole.layers]
        assert quantized([segment])


def quantized_already():
    model = tiny_llava()
    scheme = QuantScheme(weight_bits=4, activation_bits=4, granularity="dynamic_token")
    packed = QVLMLinear(104, 64, scheme, bias=False, dtype=torch.float32)
    model.model.language_model.layers[1].mlp.down_proj = packed
    return model


def changed(name, value):
    """The model with another module at a place, or without it."""
    model = tiny_llava()
    parent, _, child = name.rpartition(".")
    if value is None:
        delattr(model.get_submodule(parent), child)
    else:
        setattr(model.get_submodule(parent), child, value)
    return model


class OwnLayer(nn.Module):
    """Of no class that is known."""


def of_family(name):
    model = tiny_llava()
    model.config.model_type = name
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_family("idefics"), "^family 'idefics' has no row: only schemes without"),
        (lambda: changed(f"{VISION}.1", OwnLayer()), "^OwnLayer .of a 'clip_v.* knows CLIPEncoderLayer, "),
        (lambda: changed(LANGUAGE, nn.ModuleList([OwnLayer()])), "^OwnLayer .of a 'llama'. is not"),
        (lambda: changed(LANGUAGE, nn.Identity()), "^LlamaModel .of a 'llama'. is not supported"),
        (lambda: changed(DOWN, None), f"has no module '{DOWN}'.*load the model with Auto"),
        (lambda: changed(PROJECTOR, None), "has no module 'multi_modal_projector'.*load the model"),
        (lambda: changed(DOWN, nn.Identity()), f"^{DOWN} is a Identity, not nn.Linear: only plain"),
        (quantized_already, f"^{DOWN} is a QVLMLinear, not nn.Linear, and quantized already"),
        (lambda: tiny_llava().model, "^LlavaModel is the model without its output head"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_tables_is_refused(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        resolve(model)
    if "QVLMLinear" in message:  # what is left out is not looked at
        resolve(model, Selection(modules_to_not_convert=[DOWN]))


@pytest.mark.parametrize("pattern", ["mlp.downproj", "layers.99", "vision", "", f"{DOWN}.weight"])
def test_a_typo_in_a_pattern_raises(model, pattern):
    message = f"modules_to_not_convert: {pattern!r} matches no module"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(model, Selection(modules_to_not_convert=["lm_head", pattern]))


def test_nothing_left_raises(model):
    with pytest.raises(ValueError, match="leaves no module to quantize: shorten it"):
        resolve(model, Selection(modules_to_not_convert=["model"]))


def test_output_head(model):
    assert output_head(model) == "lm_head"
    assert get_linear(model, "lm_head") is model.lm_head
    tied = tiny_llava(tie_word_embeddings=True)
    message = r"^lm_head_bits: lm_head shares its weight with the embeddings .*: leave it out\.$"
    with pytest.raises(ValueError, match=message):
        output_head(tied)
    for config in (tied.config, tied.config.text_config):  # either flag alone says it
        config.tie_word_embeddings = False
        with pytest.raises(ValueError, match="shares its weight"):
            output_head(tied)
        config.tie_word_embeddings = True
    other = tiny_llava()
    other.lm_head = nn.Identity()
    with pytest.raises(ValueError, match=r"lm_head is a Identity, not nn\.Linear"):
        output_head(other)


def test_canonical_name():
    old = f"{VISION}.0.mlp.fc1".replace("encoder", "vision_model.encoder")
    assert canonical_name(old) == canonical_name(canonical_name(old)) == f"{VISION}.0.mlp.fc1"
    for name in (DOWN, "model.vision_model.encoder.layers.0"):
        assert canonical_name(name) == name


def test_shared_inputs_need_no_head_and_a_known_family(model):
    assert len(shared_inputs(model)) == 3 + 2 * 2
    assert shared_inputs(model.model) == shared_inputs(model)
    assert shared_inputs(of_family("unheard_of")) == ()


@pytest.mark.parametrize(
    ("names", "component"),
    [
        ([f"{VISION}.0.mlp.fc1", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"], "vision"),
        ([f"{PROJECTOR}.linear_1.weight", "multi_modal_projector.linear_1.bias"], "projector"),
        ([DOWN, "language_model.model.layers.0.mlp.down_proj.weight"], "language"),
        (["model.language_model.embed_tokens", "language_model.model.embed_tokens.x"], "embeddings"),
        (["lm_head", "language_model.lm_head.weight"], "head"),
        (["model.image_newline", "my_lm_head"], "other"),
    ],
)  # fmt: skip
def test_the_component_of_a_name_in_the_model_and_in_files(model, names, component):
    assert {component_finder(model)(name) for name in names} == {component}
