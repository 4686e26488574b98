import re
from itertools import pairwise

import pytest
import torch
from tiny_models import tiny_llava
from torch import nn

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import (
    Layer,
    Segment,
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


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def linears(model):
    return {
        canonical_name(name) for name, module in model.named_modules() if type(module) is nn.Linear
    }


def quantized(segments):
    return [
        name
        for segment in segments
        for layer in segment.layers
        for site in layer.sites
        for name in site.modules
    ]


def test_segments_layers_and_sites_in_execution_order(model):
    segments = resolve(model)
    vision, language = "model.vision_tower.encoder.layers", "model.language_model.layers"

    def clip(i):
        attention, mlp = f"{vision}.{i}.self_attn", f"{vision}.{i}.mlp"
        qkv = tuple(f"{attention}.{p}_proj" for p in "qkv")
        return Layer(
            f"{vision}.{i}",
            (
                Site(qkv),
                Site((f"{attention}.out_proj",)),
                Site((f"{mlp}.fc1",)),
                Site((f"{mlp}.fc2",)),
            ),
            dead=i == 2,
        )

    def llama(i):
        attention, mlp = f"{language}.{i}.self_attn", f"{language}.{i}.mlp"
        qkv = tuple(f"{attention}.{p}_proj" for p in "qkv")
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        return Layer(
            f"{language}.{i}",
            (Site(qkv), Site((f"{attention}.o_proj",)), Site(gate_up), Site((f"{mlp}.down_proj",))),
        )

    projector = "model.multi_modal_projector"
    assert segments == (
        Segment("vision", tuple(clip(i) for i in range(3))),
        Segment(
            "projector",
            (
                Layer(
                    projector, (Site((f"{projector}.linear_1",)), Site((f"{projector}.linear_2",)))
                ),
            ),
        ),
        Segment("language", tuple(llama(i) for i in range(2))),
    )
    assert segments[0].layers[0].sites[0].name == f"{vision}.0.self_attn.q_proj"


def test_every_linear_is_quantized_once_or_reported(model):
    segments = resolve(model)
    names = quantized(segments)
    assert len(set(names)) == len(names)
    assert set(names) <= linears(model)
    assert full_precision_modules(model, segments) == ("lm_head",)
    assert set(names) | {"lm_head"} == linears(model)


def test_modules_of_a_site_really_read_one_input(model):
    """Runs the model: each module of a site must receive the same tensor, and sites of a layer different ones."""
    inputs = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(canonical_name(name), args[0].clone())
        )
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 7, 8, 9]])
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32))
    finally:
        for handle in handles:
            handle.remove()
    for segment in resolve(model):
        for layer in segment.layers:
            for site in layer.sites:
                assert all(torch.equal(inputs[name], inputs[site.name]) for name in site.modules)


def test_works_on_the_meta_device(model):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert resolve(empty) == resolve(model)


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
def test_dead_layers(vision_feature_layer, dead):
    layers = 4
    count = len(vision_feature_layer) if isinstance(vision_feature_layer, list) else 1
    model = tiny_llava(vision_layers=layers, vision_feature_layer=vision_feature_layer)
    assert [layer.dead for layer in resolve(model)[0].layers] == dead
    assert not any(layer.dead for segment in resolve(model)[1:] for layer in segment.layers)
    # what the table calls dead must not change a bit of the projector's input, what it does not
    # must change it
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    pixels = torch.randn(1, 3, 32, 32)
    for layer in range(-1, layers):
        if layer >= 0:
            with torch.no_grad():
                model.get_submodule(f"model.vision_tower.encoder.layers.{layer}.mlp.fc2").bias.add_(
                    1
                )
        model.get_image_features(pixels)
    assert seen[0].shape[-1] == 64 * count
    assert [torch.equal(before, after) for before, after in pairwise(seen)] == dead


def test_components_can_be_left_out(model):
    assert [s.component for s in resolve(model, quantize_vision=False)] == ["projector", "language"]
    assert [s.component for s in resolve(model, quantize_projector=False)] == ["vision", "language"]
    only_language = resolve(model, quantize_vision=False, quantize_projector=False)
    assert [s.component for s in only_language] == ["language"]
    assert len(full_precision_modules(model, only_language)) == 3 * 6 + 2 + 1


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.language_model.layers.1.mlp.down_proj", "layers.1", True),
        ("model.language_model.layers.10.mlp.down_proj", "layers.1", False),
        ("model.language_model.layers.1.mlp.down_proj", "ayers.1", False),
        ("model.language_model.layers.11.mlp.down_proj", "layers.1", False),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "vision_tower", True),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "vision", False),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower", True),
        (
            "model.vision_tower.encoder.layers.0.mlp.fc1",
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            True,
        ),
        (
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            "model.vision_tower.encoder",
            True,
        ),
        ("model.language_model.layers.0.mlp.down_proj", "mlp.down_proj", True),
        ("model.language_model.layers.0.mlp.down_proj", "mlp.down", False),
        ("model.language_model.layers.0.mlp.down_proj", "model.layers", False),
        (
            "model.language_model.layers.0.mlp.down_proj",
            "model.language_model.layers.0.mlp.down_proj.weight",
            False,
        ),
        ("lm_head", "lm_head", True),
        ("lm_head", "", False),
    ],
)
def test_matches_whole_path_components(name, pattern, expected):
    assert matches(name, pattern) is expected


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        (
            "model.language_model.layers.1.mlp.down_proj",
            lambda name: name == "model.language_model.layers.1.mlp.down_proj",
        ),
        ("mlp.down_proj", lambda name: name.endswith("mlp.down_proj")),
        ("vision_tower", lambda name: "vision_tower" in name),
        ("layers.1", lambda name: ".layers.1." in name),
        ("self_attn.k_proj", lambda name: name.endswith("k_proj")),
        ("multi_modal_projector", lambda name: "projector" in name),
    ],
)
def test_patterns_exclude_exactly_their_modules(pattern, gone):
    model = tiny_llava(text_layers=11)  # layers.10 exists
    everything, segments = (
        quantized(resolve(model)),
        resolve(model, modules_to_not_convert=[pattern]),
    )
    assert quantized(segments) == [name for name in everything if not gone(name)]
    assert full_precision_modules(model, segments) == tuple(
        n for n in linears_in_order(model) if gone(n) or n == "lm_head"
    )
    layers = {
        "vision": 3,
        "projector": 1,
        "language": 11,
    }  # layers stay in their place; a segment without any site goes
    left = [
        segment.component
        for segment in resolve(model)
        if not all(gone(name) for name in quantized([segment]))
    ]
    assert [(segment.component, len(segment.layers)) for segment in segments] == [
        (component, layers[component]) for component in left
    ]


def linears_in_order(model):
    return [
        canonical_name(name) for name, module in model.named_modules() if type(module) is nn.Linear
    ]


def test_patterns_add_up_and_the_head_may_be_named(model):
    segments = resolve(model, modules_to_not_convert=["q_proj", "lm_head", "mlp"])
    assert quantized(segments) == [
        name for name in quantized(resolve(model)) if "q_proj" not in name and ".mlp." not in name
    ]
    assert segments[2].layers[0].sites[0].modules == tuple(
        f"model.language_model.layers.0.self_attn.{p}_proj" for p in "kv"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "mlp.downproj",
        "layers.99",
        "vision",
        "",
        "model.language_model.layers.0.mlp.down_proj.weight",
    ],
)
def test_a_typo_in_a_pattern_raises(model, pattern):
    message = f"modules_to_not_convert: {pattern!r} matches no module"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(model, modules_to_not_convert=["lm_head", pattern])


def test_nothing_left_raises(model):
    with pytest.raises(
        ValueError, match="modules_to_not_convert: leaves no module to quantize: shorten it"
    ):
        resolve(model, modules_to_not_convert=["model"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (None, "model_type 'llava_next' is not supported: this version knows llava"),
        (
            "vision_config",
            "vision_config.model_type 'llava_next' is not supported: this version knows "
            "clip_vision_model",
        ),
        (
            "text_config",
            "text_config.model_type 'llava_next' is not supported: this version knows llama",
        ),
    ],
)
def test_unknown_families_raise(part, message):
    model = tiny_llava()
    (getattr(model.config, part) if part else model.config).model_type = "llava_next"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        resolve(model)


def test_an_already_quantized_model_raises():
    model = tiny_llava()
    scheme = QuantScheme(weight_bits=4, activation_bits=4, granularity="dynamic_token")
    name = "model.language_model.layers.1.mlp.down_proj"
    model.get_submodule(name.rpartition(".")[0]).down_proj = QVLMLinear(
        104, 64, scheme, bias=False, dtype=torch.float32
    )
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(name)} is a QVLMLinear, not nn.Linear, and quantized already",
    ):
        resolve(model)
    resolve(model, modules_to_not_convert=[name])  # what is left out is not looked at


def test_output_head(model):
    assert output_head(model) == "lm_head"
    assert get_linear(model, "lm_head") is model.lm_head
    tied = tiny_llava(tie_word_embeddings=True)
    with pytest.raises(
        ValueError,
        match=r"^lm_head_bits: lm_head shares its weight with the embeddings .*: leave it out\.$",
    ):
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


def test_a_missing_module_raises():
    model = tiny_llava()
    del model.model.language_model.layers[0].mlp.down_proj
    with pytest.raises(
        ValueError,
        match=r"has no module 'model\.language_model\.layers\.0\.mlp\.down_proj'.*load the model "
        r"with Auto",
    ):
        resolve(model)


def test_canonical_name():
    old = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    assert canonical_name(old) == "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert canonical_name(canonical_name(old)) == canonical_name(old)
    assert canonical_name("model.language_model.layers.0") == "model.language_model.layers.0"


def test_modules_that_share_an_input():
    model = tiny_llava()
    groups = shared_inputs(model)
    vision, language = (
        model.config.vision_config.num_hidden_layers,
        model.config.text_config.num_hidden_layers,
    )
    assert len(groups) == vision + 2 * language
    attention = "model.language_model.layers.0.self_attn"
    assert (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj") in groups
    assert (
        "model.language_model.layers.1.mlp.gate_proj",
        "model.language_model.layers.1.mlp.up_proj",
    ) in groups
    assert {name.removeprefix("model.") for group in groups for name in group} == {
        n for group in shared_inputs(model.model) for n in group
    }
    model.config.model_type = "unheard_of"
    assert shared_inputs(model) == ()
