"""A processor that does not fit the model is found before a weight is read, on one sample, with the
remedy.
"""

import json
import re
from typing import Any

import pytest
import torch
from tiny_families import tiny_family, tiny_family_processor
from tiny_models import IMAGE_TOKENS, PATCH_SIZE, tiny_llava, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.hf.processor_fit import check_processor_fits
from qvlm_hf.hub.saved import empty_model

load = AutoModelForImageTextToText.from_pretrained

SET = {
    "patch_size": PATCH_SIZE,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
NONE = (
    "LlavaProcessor refuses this batch (unsupported operand type(s) for //: 'int' and 'NoneType')"
)
COUNTED = f"LlavaProcessor writes {{}} image tokens, but the model makes {IMAGE_TOKENS} features"
# Settings of a processor -> what is said of them.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no patch size": ({"patch_size": None}, NONE),
    "larger patches": ({"patch_size": 2 * PATCH_SIZE}, COUNTED.format(4)),
    "smaller patches": ({"patch_size": PATCH_SIZE // 2}, COUNTED.format(64)),
    "no strategy": ({"vision_feature_select_strategy": None}, COUNTED.format(17)),
    "another strategy": ({"vision_feature_select_strategy": "full"}, COUNTED.format(17)),
    "no class token": ({"num_additional_image_tokens": 0}, COUNTED.format(15)),
    "as in old repositories": (
        {
            "patch_size": None,
            "vision_feature_select_strategy": None,
            "num_additional_image_tokens": 0,
        },
        NONE,
    ),
}


def wrong_processor(settings):
    processor = tiny_processor()
    for name, value in settings.items():
        setattr(processor, name, value)
    return processor


def on_meta():
    model = tiny_llava()
    with torch.device("meta"):
        return LlavaForConditionalGeneration(model.config)


@pytest.fixture
def samples(tmp_path):
    """The second line has the first picture."""
    tiny_messages(1)[0]["messages"][0]["content"][0]["image"].save(tmp_path / "1.png")
    lines = [
        {"image": None, "question": "what ?", "answer": "red"},
        {"image": "1.png", "question": "what ?", "answer": "red"},
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "samples.jsonl")


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_settings_are_found_before_a_weight_is_read(no_weights, samples, kind):
    settings, problem = WRONG[kind]
    processor = wrong_processor(settings)
    remedy = {name: value for name, value in SET.items() if name in settings}
    said = f"set {json.dumps(remedy)[1:-1]} in the model's processor_config.json, or the same on the processor."
    message = f"samples.jsonl:2: {problem}: {said}"
    config = QVLMConfig(recipe="fixed", dataset=samples, processor=processor)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(no_weights, quantization_config=config)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        quantize_model(tiny_llava(), config)
    assert {name: getattr(processor, name) for name in settings} == settings  # it was only tried
    for name, value in remedy.items():
        setattr(processor, name, value)
    check_processor_fits(on_meta(), processor, load_samples(samples))


def test_drawn_samples_are_checked_too(no_weights):
    config = QVLMConfig(
        recipe="fixed", dataset="synthetic", processor=wrong_processor({"patch_size": None})
    )
    message = r'^a test picture: LlavaProcessor refuses .*: set "patch_size": 8 in the model'
    with pytest.raises(ValueError, match=message):
        load(no_weights, quantization_config=config)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "W4A16"},
        {"activation_granularity": "dynamic_token"},
        {"scheme": "W4A16", "rotation": "hadamard"},
    ],
)
def test_without_data_a_processor_that_is_given_is_checked_too(no_weights, options):
    config = QVLMConfig(**options, processor=wrong_processor({"patch_size": None}))
    message = r'^a test picture: LlavaProcessor refuses .*: set "patch_size": 8 in the model\'s processor_config.json'
    with pytest.raises(ValueError, match=message):
        load(no_weights, quantization_config=config)
    model = tiny_llava()
    with pytest.raises(ValueError, match=message):
        quantize_model(model, config)
    assert not getattr(model, "is_quantized", False)
    config.processor = None
    assert quantize_model(model, config).modules


def test_a_check_leaves_no_trace_in_the_files_of_the_processor(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "before")
    check_processor_fits(on_meta(), processor, None)
    processor.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


def test_pictures_of_another_size_and_unknown_tokens(samples):
    processor = tiny_processor()
    processor.image_processor.crop_size = processor.image_processor.size = {
        "height": 48,
        "width": 48,
    }
    message = (
        r"^samples.jsonl:2: the model refuses the picture that LlavaProcessor made \(Input image "
        r"size .*\): take the "
        r"processor that was saved with the model \(size and crop_size in processor_config.json or "
        r"preprocessor_config.json\)\.$"
    )
    with pytest.raises(ValueError, match=message) as caught:
        check_processor_fits(on_meta(), processor, load_samples(samples))
    assert "\n" not in str(caught.value)
    model = on_meta()
    model.resize_token_embeddings(5, mean_resizing=False)
    with pytest.raises(
        ValueError,
        match=r"^samples.jsonl:2: LlavaProcessor writes the token \d+, but the model knows 5 "
        r"tokens: take",
    ):
        check_processor_fits(model, tiny_processor(), load_samples(samples))


def test_what_fits_or_cannot_be_known_is_let_through(samples, monkeypatch):
    chosen = load_samples(samples)
    for model in (on_meta(), tiny_llava()):
        check_processor_fits(model, tiny_processor(), chosen)
        check_processor_fits(model, tiny_processor(), None)
        check_processor_fits(model, wrong_processor({"patch_size": None}), chosen[:1])  # no picture
    wrong = wrong_processor({"patch_size": 16})
    for error in (
        NotImplementedError("meta"),
        RuntimeError("meta"),
        AttributeError("no such method"),
        TypeError("an argument"),
    ):
        model = on_meta()

        def ask(*_, error=error, **__):
            raise error

        monkeypatch.setattr(model, "get_image_features", ask)
        check_processor_fits(model, wrong, chosen)
    model = on_meta()
    model.config.image_token_id = None
    check_processor_fits(model, wrong, chosen)


def test_a_processor_that_nothing_mends_is_named(samples):
    class Broken(type(tiny_processor())):
        def __call__(self, *_, **__):
            raise KeyError("pixel_values\nand more")

    processor = tiny_processor()
    processor.__class__ = Broken
    message = r"^samples.jsonl:2: Broken refuses this batch \('pixel_values.*\)$"
    with pytest.raises(ValueError, match=message) as caught:
        check_processor_fits(on_meta(), processor, load_samples(samples))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "tower", "decoder"),
    [
        ("deepseek_vl", "siglip", "llama"),
        ("internvl", "internvl", "qwen2"),
        ("paligemma", "siglip", "gemma"),
        ("llava_next", "clip", "llama"),
    ],
)
def test_processors_of_other_families_are_tried_too(family, tower, decoder):
    model = empty_model(tiny_family(family, tower, decoder).config)
    processor = tiny_family_processor(family, tower)
    check_processor_fits(model, processor, None)
    if family == "internvl":
        processor.merged = 16
    else:
        processor.patch_size = 16
    with pytest.raises(ValueError, match=r"writes \d+ image tokens, but the model makes \d+ feat"):
        check_processor_fits(model, processor, None)
