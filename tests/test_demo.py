"""The embedded demo model and its data: complete, readable, disjoint, exact where exactness is
claimed, and accurate.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_model.datasets import SPLITS
from demo_model.outliers import plant_outliers
from demo_model.processor import build_processor
from demo_model.questions import KINDS, ask, cells_of, vocabulary
from demo_model.scenes import SceneOptions, SpriteBank, draw_scenes, sample_scenes
from demo_model.scoring import evaluate
from PIL import Image
from safetensors import safe_open
from tiny_models import IMAGE_SIZE, IMAGE_TOKENS, tiny_llava
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from qvlm_hf.demo import dataset_path, model_dir

MEGABYTE = 1_000_000


def data_path(split: str) -> Path:
    """The training questions lie beside the recipe, and are not in the wheel."""
    return (
        Path(__file__).parent / "demo_model" / "data" / "train.jsonl"
        if split == "train"
        else dataset_path(split)
    )


def read(split: str) -> list[dict]:
    return [json.loads(line) for line in data_path(split).read_text(encoding="utf-8").splitlines()]


def picture_paths(split: str) -> list[Path]:
    return sorted(
        {
            data_path(split).parent / line["messages"][0]["content"][0]["path"]
            for line in read(split)
        }
    )


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def bank() -> SpriteBank:
    """A bank with random digits, so that no test needs scikit-learn."""
    rng = np.random.default_rng(5)
    return SpriteBank(
        shapes=rng.random((6, 3, 16, 16), np.float32),
        digits=rng.random((20, 2, 16, 16), np.float32),
        digit_labels=np.arange(20) % 10,
    )


# --- what is shipped


def test_sizes() -> None:
    model = sum(path.stat().st_size for path in model_dir().iterdir())
    data = sum(
        path.stat().st_size for path in dataset_path("test").parent.rglob("*") if path.is_file()
    )
    assert model < 12 * MEGABYTE
    assert data < 3 * MEGABYTE


@pytest.mark.parametrize("split", SPLITS)
def test_counts(split: str) -> None:
    lines, size = read(split), SPLITS[split]
    assert len(picture_paths(split)) == size.pictures
    assert len(lines) == size.pictures * size.questions
    kinds = [line["kind"] for line in lines]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(
        KINDS, len(lines) // len(KINDS)
    )


@pytest.mark.parametrize("split", SPLITS)
def test_lines_are_single_turns(split: str) -> None:
    for line in read(split):
        assert set(line) == {"messages", "kind"}
        user, assistant = line["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert [part["type"] for part in assistant["content"]] == ["text"]


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_open(split: str) -> None:
    for path in picture_paths(split):
        with Image.open(path) as picture:
            picture.load()
            assert (picture.mode, picture.size, picture.format) == ("RGB", (48, 48), "PNG")


def test_no_picture_is_in_two_splits() -> None:
    hashes = {
        split: {hashlib.sha256(path.read_bytes()).hexdigest() for path in picture_paths(split)}
        for split in SPLITS
    }
    assert {split: len(found) for split, found in hashes.items()} == {
        split: size.pictures for split, size in SPLITS.items()
    }
    assert len(set.union(*hashes.values())) == sum(size.pictures for size in SPLITS.values())


def test_handwritten_digits_are_split() -> None:
    pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn")
    from demo_model.scenes import digit_instances

    seen, held_out = digit_instances(held_out=False), digit_instances(held_out=True)
    assert (len(seen), len(held_out)) == (1258, 539)
    assert not set(seen) & set(held_out)


def test_another_split_is_refused() -> None:
    message = r"split='validation'.*calibration, test; pass one of them"
    with pytest.raises(ValueError, match=message):
        dataset_path("validation")


# --- the processor


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_renders_and_is_a_prefix(split: str, processor: LlavaProcessor) -> None:
    chats = [line["messages"] for line in read(split)]
    tokenizer = processor.tokenizer
    prompts = processor.apply_chat_template(
        [chat[:1] for chat in chats], add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompts).input_ids
    full_ids = tokenizer(processor.apply_chat_template(chats)).input_ids
    for chat, prompt, full in zip(chats, prompt_ids, full_ids, strict=True):
        assert tokenizer.unk_token_id not in full
        assert full[: len(prompt)] == prompt
        assert full[-1] == tokenizer.eos_token_id
        assert (
            tokenizer.decode(full[len(prompt) :], skip_special_tokens=True)
            == chat[1]["content"][0]["text"]
        )


def test_prefix_through_the_whole_processor(processor: LlavaProcessor) -> None:
    chat = read("test")[0]["messages"]
    chat[0]["content"][0] = {"type": "image", "path": str(picture_paths("test")[0])}
    chat += [
        {"role": "user", "content": "Is there a star?"},
        {"role": "assistant", "content": "no"},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    full = processor.apply_chat_template(chat, **options)
    assert full["pixel_values"].shape == (1, 3, 48, 48)
    assert int((full["input_ids"] == processor.image_token_id).sum()) == 36
    for turns in (1, 3):
        prompt = processor.apply_chat_template(chat[:turns], add_generation_prompt=True, **options)[
            "input_ids"
        ][0]
        assert len(prompt) < full["input_ids"].shape[1]
        assert torch.equal(full["input_ids"][0, : len(prompt)], prompt)


def test_template_text(processor: LlavaProcessor) -> None:
    user = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Where is the red star?"}],
    }
    chat = [
        user,
        {"role": "assistant", "content": [{"type": "text", "text": "top left"}]},
        {"role": "user", "content": "Count the stars."},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert (
        text
        == "USER: <image>\nWhere is the red star? ASSISTANT: top left</s>USER: Count the stars. "
        "ASSISTANT:"
    )


def test_shipped_tokenizer_is_the_recipe(processor: LlavaProcessor) -> None:
    assert processor.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    assert all(
        processor.tokenizer.unk_token_id not in processor.tokenizer(text).input_ids
        for text in vocabulary()
    )


# --- scenes and questions


def draw(bank: SpriteBank, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return draw_scenes(sample_scenes(8, bank, np.arange(20), rng), bank, rng)


def test_scenes_follow_the_seed(bank: SpriteBank) -> None:
    pictures = draw(bank, 3)
    assert (pictures.shape, pictures.dtype) == ((8, 48, 48, 3), np.uint8)
    assert np.array_equal(pictures, draw(bank, 3))
    assert not np.array_equal(pictures, draw(bank, 4))


def test_shipped_pictures_follow_the_seed() -> None:
    pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn")
    from demo_model.datasets import scene_stream
    from demo_model.scenes import load_sprite_bank

    _, pictures = next(scene_stream("train", load_sprite_bank(0), 0))
    shipped = np.stack([np.asarray(Image.open(path)) for path in picture_paths("train")])
    drawn = {picture.tobytes() for picture in pictures}
    assert all(picture.tobytes() in drawn for picture in shipped)


def test_answers_are_right(bank: SpriteBank) -> None:
    import random

    scenes = sample_scenes(40, bank, np.arange(20), np.random.default_rng(0))
    for index in range(len(scenes)):
        cells, rng = cells_of(scenes, index), random.Random(index)
        at = {cell.place: cell for cell in cells}
        count = ask("count", cells, rng)
        total = sum(cell.color in count.text or cell.noun in count.text for cell in cells)
        assert int(count.answer) == total
        where = ask("where", cells, rng)
        if where is not None:
            assert at[where.answer].thing in where.text
            assert sum(cell.thing in where.text for cell in cells) == 1
        exists = ask("exists", cells, rng)
        assert (exists.answer == "yes") == any(cell.thing in exists.text for cell in cells)


def test_errors_say_what_to_do(bank: SpriteBank) -> None:
    import random

    with pytest.raises(ValueError, match=r"kind='sum'.*pass one of them"):
        ask(
            "sum",
            cells_of(sample_scenes(1, bank, np.arange(20), np.random.default_rng(0)), 0),
            random.Random(0),
        )
    with pytest.raises(ValueError, match=r"digits=\(1, 3\).*raise low or high"):
        SceneOptions(digits=(1, 3))
    with pytest.raises(ValueError, match=r"fill 10 cells.*lower an upper bound"):
        SceneOptions(shapes=(2, 6))


# --- outliers


@pytest.fixture
def tiny() -> LlavaForConditionalGeneration:
    return tiny_llava()


def logits(model: LlavaForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    ids = torch.randint(5, 128, (2, IMAGE_TOKENS + 7), generator=generator)
    ids[:, 1 : IMAGE_TOKENS + 1] = model.config.image_token_id
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def test_outliers_leave_the_function(tiny: LlavaForConditionalGeneration) -> None:
    before, norm = logits(tiny), tiny.model.language_model.layers[1].input_layernorm.weight.clone()
    planted = plant_outliers(tiny, factor=20.0, fraction=0.1, seed=3)
    assert float((logits(tiny) - before).abs().max()) < 1e-4
    assert float(before.std()) > 0.1  # the bound above means something
    assert len(planted) == 3 * 2 + 2 * 3
    channels = planted["model.language_model.layers.1.input_layernorm"]
    scaled = tiny.model.language_model.layers[1].input_layernorm.weight / norm
    assert scaled.ne(1).nonzero().flatten().tolist() == channels
    torch.testing.assert_close(scaled[channels], torch.full((len(channels),), 20.0))
    assert set(planted) <= {name for name, _ in tiny.named_modules()}


def test_outliers_follow_the_seed(tiny: LlavaForConditionalGeneration) -> None:
    first, second, third = (plant_outliers(tiny, seed=seed) for seed in (0, 0, 1))
    assert first == second != third


def test_outlier_options_are_checked(tiny: LlavaForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match=r"factor=1: .*above 1; pass 20"):
        plant_outliers(tiny, factor=1)
    with pytest.raises(ValueError, match=r"fraction=1.5: must be in \(0, 1\); pass 0.03"):
        plant_outliers(tiny, fraction=1.5)


# --- the model


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        model_dir(), dtype=torch.float32, output_loading_info=True
    )
    assert {name: list(found) for name, found in info.items() if found} == {}
    return loaded.eval()


def test_weights_are_float16() -> None:
    with safe_open(model_dir() / "model.safetensors", framework="pt") as weights:
        assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"F16"}  # noqa: SIM118 (not a dict)


def test_shape_is_that_of_llava(model: LlavaForConditionalGeneration) -> None:
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert model.config.vision_feature_layer == -2
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_recorded_outliers_are_in_the_weights(model: LlavaForConditionalGeneration) -> None:
    recorded = json.loads((model_dir() / "outliers.json").read_text(encoding="utf-8"))
    assert recorded["max_logit_change"] < 1e-4
    assert len(recorded["channels"]) == 3 * 6 + 2 * 5
    for name, channels in recorded["channels"].items():
        weight = model.get_submodule(name).weight
        size = (weight if weight.ndim == 1 else weight.norm(dim=1)).abs()
        planted = torch.zeros(len(size), dtype=torch.bool)
        planted[channels] = True
        assert size[planted].median() > 5 * size[~planted].median(), name


def test_accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    right, asked = evaluate(model, processor, dataset_path("test"), limit=300)["all"]
    assert asked == 300
    assert right / asked >= 0.9


def test_evaluate_agrees_with_generate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    lines = read("test")[:16]
    chats = [line["messages"][:1] for line in lines]
    for chat in chats:
        chat[0]["content"][0]["path"] = str(
            dataset_path("test").parent / chat[0]["content"][0]["path"]
        )
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(output, skip_special_tokens=True)
    right = sum(
        answer == line["messages"][1]["content"][0]["text"]
        for answer, line in zip(answers, lines, strict=True)
    )
    assert evaluate(model, processor, dataset_path("test"), limit=16)["all"] == (right, 16)
