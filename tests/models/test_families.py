"""Every family, tower and decoder of the tables: what the rows say is what running shows."""

from itertools import pairwise

import pytest
import torch
from tiny_families import DECODERS, FAMILIES, tiny_family, tiny_family_processor
from tiny_models import tiny_messages
from torch import nn
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.calibration.backward import frozen, observe_outputs
from qvlm_hf.calibration.layers import capture_inputs, live_layers, run_layer, valid_tokens
from qvlm_hf.calibration.measure import gradients
from qvlm_hf.calibration.measure.answers import run_answers
from qvlm_hf.calibration.measure.gradients import answer_gradients
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import batches, collate, load_samples
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.transforms.equalization import equalize
from qvlm_hf.calibration.transforms.rotation import rotate
from qvlm_hf.hf.runtime.experts import register_experts
from qvlm_hf.models import families
from qvlm_hf.models.experts import split_experts
from qvlm_hf.models.find_parts import find_parts
from qvlm_hf.models.folds import rotation_plan, scale_paths
from qvlm_hf.models.graph import full_precision_modules, resolve, shared_inputs
from qvlm_hf.models.layer_kinds import LAYER_KINDS

# A line per family with its tower and decoder; every one is calibrated too.
OWN = [
    ("llava_next", "clip", "mistral"),
    ("llava_next_video", "clip", "llama"),
    ("llava_onevision", "siglip", "qwen2"),
    ("video_llava", "clip", "llama"),
    ("vipllava", "clip", "llama"),
    ("idefics3", "idefics3", "llama"),
    ("smolvlm", "smolvlm", "llama"),
    ("internvl", "internvl", "qwen2"),
    ("paligemma", "siglip", "gemma"),
    ("paligemma", "siglip", "gemma2"),
    ("mistral3", "pixtral", "mistral"),
    ("deepseek_vl", "siglip", "llama"),
    ("janus", "janus", "llama"),
    ("gemma3", "siglip", "gemma3"),
    ("aya_vision", "siglip", "cohere2"),
    ("cohere2_vision", "siglip", "cohere2"),
    ("got_ocr2", "got_ocr2", "qwen2"),
    ("lighton_ocr", "pixtral", "qwen3"),
    ("ovis2", "ovis2", "qwen2"),
    ("fast_vlm", "sam", "qwen2"),
    ("perception_lm", "timm_like", "llama"),
    ("mllama", "mllama", "mllama"),
    ("glm4v", "glm4v", "glm4v"),
    ("glm46v", "glm4v", "glm4v"),
    ("glm_ocr", "glm_ocr", "glm_ocr"),
    ("paddleocr_vl", "paddleocr_vl", "paddleocr_vl"),
    ("video_llama_3", "video_llama_3", "qwen2"),
    ("lfm2_vl", "siglip2", "lfm2"),
    ("exaone4_5", "exaone4_5", "exaone4"),
    ("qianfan_ocr", "qianfan_ocr", "qwen3"),
    ("deepseek_vl_hybrid", "siglip", "llama"),
    ("qwen2_5_vl", "qwen2_5_vl", "qwen2_5_vl"),
    ("qwen3_vl", "qwen3_vl", "qwen3_vl"),
    ("qwen2_vl", "qwen2_vl", "qwen2_vl"),
    ("qwen3_5", "qwen3_5", "qwen3_5"),
    ("llama4", "llama4", "llama4"),
    ("qwen3_vl_moe", "qwen3_vl_moe", "qwen3_vl_moe"),
]
COMBINATIONS = [
    *(("llava", tower, decoder) for tower in ("clip", "siglip", "pixtral") for decoder in DECODERS),
    ("llava_next", "clip", "llama"),
    *OWN,
]
# Every family, tower and decoder at least once; every third line in W8A8, others in W4A4.
CALIBRATED = [
    ("llava", "siglip", "qwen3"),
    ("llava", "clip", "gemma"),
    ("llava", "siglip", "phi3"),
    ("llava", "clip", "phi"),
    ("llava", "pixtral", "mistral"),
    *OWN,
]
# Prompts are read in both directions: answers differ without a cache, in full precision too.
BOTH_WAYS = {("paligemma", "siglip", "gemma")}
# What stays in full precision besides the head: nn.Linear modules of this part.
LEFT = {
    "llama4": [
        "vision_model.patch_embedding.",
        "vision_model.vision_adapter.",
        "language_model.model.layers.1.feed_forward.router",
        "language_model.lm_head",
    ],
    "deepseek_vl_hybrid": ["model.high_res_vision_model."],
    "janus": ["model.generation_"],
    "sam": ["model.vision_tower."],
    "timm_like": ["model.vision_tower."],
    "video_llava": ["model.video_tower."],
    "siglip2": ["model.vision_tower.head.", "model.vision_tower.embeddings."],
    "siglip": ["model.vision_tower.head.", "model.vision_model.head."],
}
# A norm's output is cut into windows, or patches are put side by side, before it is read.
REARRANGED = ("got_ocr2", "lighton_ocr", "mistral3", "paddleocr_vl")
REFUSED = {
    "phi": "PhiDecoderLayer cannot be rotated, because its norms subtract a mean",
    "gemma2": "Gemma2DecoderLayer cannot be rotated, because norms scale channels",
    "glm4v": "Glm4vTextDecoderLayer cannot be rotated, because norms scale channels",
    "glm_ocr": "GlmOcrTextDecoderLayer cannot be rotated, because norms scale channels",
    "gemma3": "Gemma3DecoderLayer cannot be rotated, because norms scale channels",
    "exaone4": "Exaone4DecoderLayer cannot be rotated, because norms scale channels",
    "cohere2": "Cohere2DecoderLayer cannot be rotated, because its norms subtract a mean",
}

every_combination = pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)


@pytest.fixture(scope="module")
def data():
    """(family, tower) -> batches, made once."""
    made = {}

    def make(family, tower, _):
        if (family, tower) not in made:
            processor = tiny_family_processor(family, tower)
            made[family, tower] = list(batches(load_samples(tiny_messages(4)), processor, 2))
        return made[family, tower]

    return make


def split_family(*combination):
    """The model, its experts as linear modules."""
    model = tiny_family(*combination)
    register_experts(model)
    split_experts(model)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch.inputs, use_cache=False).logits


def uneven(model):
    """Channels of very different sizes behind norms, values and products."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm", "ln_q", "v_proj.w", "up_proj", "qkv")):
                factor = torch.randn(parameter.shape[0], generator=generator).mul(0.5).exp()
                parameter.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)))
    return model


def inputs_and_outputs(model, batch):
    """What every module receives first and gives last, while the model runs without padding."""
    received, given = {}, {}

    def hook(module, args, kwargs, output):
        first = args[0] if args else kwargs.get("hidden_states")
        if isinstance(first, torch.Tensor):
            received[module], given[module] = first, output

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in model.modules()]
    inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return received, given


@every_combination
def test_sites_and_norms_are_what_running_shows(combination, data):
    """Modules of a site receive one tensor and no others do; norms feed their readers alone."""
    model = split_family(*combination)
    received, given = inputs_and_outputs(model, data(*combination)[0])
    segments = resolve(model)
    whole = [site for segment in segments for layer in segment.layers for site in layer.sites]
    sites = [part for site in whole for part in site.parts if part.linears[0] in received]
    for site in sites:
        tensor = received[site.linears[0]]
        readers = {m for m, x in received.items() if type(m) is nn.Linear and x is tensor}
        assert readers == set(site.linears), site
    shared = {site.linears for site in sites if len(site.linears) > 1}
    assert set(shared_inputs(model)) == shared
    norms = {module for module in given if "Norm" in type(module).__name__}
    outputs = {given[norm].data_ptr(): norm for norm in norms}  # some are read in another shape
    read = {outputs.get(received[site.linears[0]].data_ptr()): set(site.linears) for site in sites}
    layers = [layer for segment in segments for layer in segment.layers]
    for layer in layers:
        for name, readers in (*layer.kind.norms, *layer.kind.inner_norms):
            norm = layer.module.get_submodule(name)
            # routers are no site; experts read some rows of what the norm gives
            modules = map(layer.module.get_submodule, readers)
            fed = {module for module in modules if type(module) is nn.Linear}
            assert read.pop(norm, fed if combination[0] in REARRANGED else set()) == fed
    # A tower's last norm has other readers too, or comes before patches are merged.
    last = ("post_layernorm", "neck.layer_norm2")
    assert set(read) <= {None, *(m for name, m in model.named_modules() if name.endswith(last))}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left = full_precision_modules(model, segments)
    assert {name for site in whole for name in site.modules} == set(names) - set(left)
    parts = [name for part in combination for name in LEFT.get(part, ())]
    assert all(name == "lm_head" or name.startswith(tuple(parts)) for name in left), left


@every_combination
def test_layers_run_one_by_one_give_what_the_model_gives(combination, data):
    """Masks, windows and pictures that enter between layers come to each layer as in the model."""
    model, batch = tiny_family(*combination), data(*combination)[0]
    segments = resolve(model)
    captured = capture_inputs(model, [batch], segments)
    layers = [layer.name for segment in segments for layer in segment.layers]
    with torch.no_grad(), observe_outputs(model, layers) as outputs:
        model(**batch.inputs, use_cache=False)
    for segment in segments:
        inputs = captured[segment.name]
        hidden = [entry.hidden for entry in inputs]
        for layer in segment.layers:
            hidden = run_layer(layer.module, inputs, hidden)
            valid = [valid_tokens(h, entry.valid) for h, entry in zip(hidden, inputs, strict=True)]
            whole = valid_tokens(outputs[layer.name], inputs[0].valid)
            torch.testing.assert_close(torch.cat(valid), whole, rtol=1e-4, atol=1e-4)


@every_combination
def test_gradients_layer_by_layer_are_those_of_the_whole_graph(combination, data, monkeypatch):
    """Pictures that enter between layers, and keys that all layers share, pass theirs on too."""
    model, batch = tiny_family(*combination), data(*combination)[0]
    calibration = Calibration(
        model=model, settings=CalibrationSettings(), segments=resolve(model), data=[batch]
    )
    directions = []
    draw = lambda z, _: directions.append(z.sin()) or directions[-1]  # noqa: E731
    monkeypatch.setattr(gradients, "_direction", draw)
    found = {n: g for _, n, (g,) in answer_gradients(calibration, [batch], draws=1)}
    with frozen(model), observe_outputs(model, found) as outputs, torch.enable_grad():
        answers = torch.cat(run_answers(model, batch, use_cache=False)).float()
    whole = torch.autograd.grad(answers, list(outputs.values()), directions, allow_unused=True)
    live = [layer.name for s in calibration.segments for layer in live_layers(s)]
    assert sorted(found) == sorted(live)
    for name, expected in zip(outputs, whole, strict=True):
        assert expected is not None
        size = expected.abs().max()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4 * float(size))


def test_samples_without_pictures_pass_over_cross_attention():
    model, processor = tiny_family(*["mllama"] * 3), tiny_family_processor("mllama", "mllama")
    messages = tiny_messages(4)
    for sample in messages[2:]:
        del sample["messages"][0]["content"][0]  # the picture
    pictures, text = batches(load_samples(messages), processor, 2)
    *_, language = resolve(model)
    crossing = language.layers[1].module
    seen, read = capture_inputs(model, [pictures, text], [language])[language.name]
    assert seen.calls[crossing] is not None
    assert read.calls[crossing] is None
    (passed,) = run_layer(crossing, [read], [read.hidden])
    assert passed is read.hidden
    with torch.no_grad(), observe_outputs(model, [language.layers[-1].name]) as outputs:
        model(**text.inputs, use_cache=False)
    hidden = [read.hidden]
    for layer in language.layers:
        hidden = run_layer(layer.module, [read], hidden)
    whole = outputs[language.layers[-1].name]
    torch.testing.assert_close(
        valid_tokens(hidden[0], read.valid), valid_tokens(whole, read.valid), rtol=1e-4, atol=1e-4
    )
    before = logits(model, text)
    config = QVLMConfig(
        scheme="W8A8", dataset=messages, processor=processor, group_size=16, batch_size=2
    )
    quantize_model(model, config)
    assert (logits(model, text) - before).std() < 0.1 * before.std()


@every_combination
def test_a_rotation_changes_nothing_or_is_refused(combination, data):
    model, batch = split_family(*combination), data(*combination)[0]
    if combination[-1] in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[combination[-1]]):
            resolve_segments(model, CalibrationSettings(rotation="hadamard"))
        return
    before = logits(model, batch)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rotate(model, rotation_plan(model), seed=3)
    assert (logits(model, batch) - before).abs().max() < 1e-4 * before.abs().max()
    for value in rotation_plan(model).values:
        assert value.channels % value.head_dim == 0
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights.get(n, p))}
    assert any(name.endswith("embed_tokens.weight") for name in changed)
    assert {f"model.{name}" for name in families.FAMILIES[combination[0]].written} <= changed


@every_combination
def test_equalization_changes_nothing_that_is_computed(combination, data):
    model, batch = uneven(split_family(*combination)), data(*combination)[0]
    before, weights = logits(model, batch), {p: p.clone() for p in model.parameters()}
    paths = scale_paths(model, resolve(model))
    assert paths
    equalize(model, paths, data(*combination))
    assert (logits(model, batch) - before).abs().max() < 1e-4 * before.abs().max()
    received = set().union(*(inputs_and_outputs(model, each)[0] for each in data(*combination)))
    for path in paths:
        for module in (path.source, *path.readers):
            equal = torch.equal(module.weight, weights[module.weight])
            assert equal == (path.readers[0] not in received)  # an expert without tokens


@pytest.mark.parametrize("tower", ["clip", "siglip", "pixtral"])
@pytest.mark.parametrize(
    ("chosen", "dead"),
    [(-1, [False] * 3), (-2, [False, False, True]), ([-3, 1], [False, True, True])],
)
def test_dead_layers_do_not_change_a_bit_of_the_projectors_input(tower, chosen, dead, data):
    model = tiny_family("llava", tower, vision_feature_layer=chosen)
    vision = resolve(model)[0]
    assert [layer.dead for layer in vision.layers] == dead
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    batch = data("llava", tower, "llama")[0]
    logits(model, batch)
    for layer in vision.layers:
        with torch.no_grad():
            for linear in (site.linears[0] for site in layer.sites):
                linear.weight.add_(1)
        logits(model, batch)
    assert [torch.equal(before, after) for before, after in pairwise(seen)] == dead


@pytest.mark.parametrize("component", ["vision", "projector"])
@pytest.mark.parametrize("combination", [("llava", "pixtral"), ("qwen2_vl",) * 3])
def test_packed_towers_have_no_ranges_per_position(combination, component):
    model = tiny_family(*combination)
    config = QVLMConfig(
        recipe="fixed",
        scheme="W4A4",
        dataset=tiny_messages(4),
        processor=tiny_family_processor(*combination[:2]),
        activation_granularity={component: "token"},
    )
    with pytest.raises(ValueError, match=f"for {component} needs a fixed number of positions"):
        quantize_model(model, config)


@pytest.mark.parametrize(
    ("combination", "scheme"),
    [
        *((one, "W4A4" if place % 3 else "W8A8") for place, one in enumerate(CALIBRATED)),
        *(
            pytest.param(one, "W8A8" if place % 3 else "W4A4", marks=pytest.mark.slow)
            for place, one in enumerate(CALIBRATED)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_calibrated_saved_and_loaded_it_answers_the_same(combination, scheme, data, tmp_path):
    """W8A8 is rotated, where that can be, and close to full precision."""
    refused = combination[-1] in REFUSED
    model, batch = tiny_family(*combination), data(*combination)[0]
    before = logits(model, batch)
    config = QVLMConfig(
        recipe="fixed",
        scheme=scheme,
        dataset=tiny_messages(4),
        processor=tiny_family_processor(*combination[:2]),
        group_size=16,
        num_samples=4,
        batch_size=2,
        percentiles=(1.0,),
        margins=(),
        max_block_depth=1,
        guard=False,
    )
    report = quantize_model(model, config)
    rotated = any(module.hadamard for module in report.modules.values())
    assert rotated == (scheme == "W8A8" and not refused)
    assert model.config.quantization_config.rotation == ("hadamard" if rotated else None)
    assert ("rotation" in report.provenance) == (scheme == "W8A8" and refused)
    if scheme == "W8A8":
        assert (logits(model, batch) - before).std() < 0.1 * before.std()
    for of_the_hub in (True, False):  # keys as in checkpoints, and as in the model
        model.save_pretrained(tmp_path, max_shard_size="100KB", save_original_format=of_the_hub)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, batch), logits(model, batch))
    inputs = collate(load_samples(tiny_messages(1)), config.processor).inputs
    # Where pictures stand, tokens are read otherwise without a cache.
    pictures = [model.config.image_token_id]
    pictures += getattr(model.config, "visual_indicator_token_ids", ())
    options = {"suppress_tokens": pictures, "eos_token_id": None}
    cached, without = (
        loaded.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use, **options)
        for use in (True, False)
    )
    assert torch.equal(cached, without) or combination in BOTH_WAYS
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 5


def test_a_projector_with_linear_modules_that_its_row_does_not_name_is_refused():
    model = tiny_family("janus", "janus", "llama")
    model.model.aligner.hidden_layers.append(nn.Linear(48, 48))
    message = r"^hidden_layers\.1 of a JanusVisionAlignerMLP is not supp"
    with pytest.raises(ValueError, match=message):
        resolve(model)


@pytest.mark.parametrize(("tower", "last"), [("siglip", "post_layernorm"), ("clip", None)])
def test_a_last_norm_takes_scales_where_all_output_passes_it(tower, last):
    model = tiny_family("paligemma", tower, "gemma")
    norm = find_parts(model).feature_norm
    assert norm is (last and getattr(model.model.vision_tower, last))
    assert (norm in {path.source for path in scale_paths(model, resolve(model))}) == bool(last)


def test_every_row_is_tried_here():
    assert set(FAMILIES) == set(families.FAMILIES) == {family for family, *_ in COMBINATIONS}
    layers = [layer for c in COMBINATIONS for layer in tiny_family(*c).modules()]
    names = {type(layer).__name__ for layer in layers}
    kinds = [line.partition(".") for line in LAYER_KINDS]
    names |= {
        f"{name}.{path}"
        for layer in layers
        for name, _, path in kinds
        if name == type(layer).__name__ and path in dict(layer.named_modules())
    }
    assert set(LAYER_KINDS) <= names
    for place in range(3):
        assert {one[place] for one in CALIBRATED} == {one[place] for one in COMBINATIONS}
