"""Batches: tokens, labels and pictures of samples, and what a processor may not do."""

import numpy as np
import pytest
import torch
from PIL import Image
from sample_rows import RED, chat, notes, user
from tiny_models import IMAGE_TOKENS, tiny_llava, tiny_messages, tiny_processor

from qvlm_hf.calibration.samples import batch as batch_module
from qvlm_hf.calibration.samples import (
    batches,
    collate,
    load_samples,
    longest_sample,
    without_too_long,
)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def labelled(batch, processor):
    return [processor.tokenizer.decode(row[row != -100]) for row in batch.labels]


def mixed_samples():
    rows = [
        (RED, "what colour is this ?", "red"),
        (None, "which letter ?", "A"),
        (RED, "what shape is in the picture ?", "the red square"),
        (RED, "what ?", None),
    ]
    return load_samples([{"image": i, "question": q, "answer": a} for i, q, a in rows])


def test_collate_labels_the_answer_and_pads_on_the_right(processor):
    batch = collate(mixed_samples(), processor)
    assert labelled(batch, processor) == ["red </s>", "A </s>", "the red square </s>", ""]
    assert batch.labels.dtype == torch.int64
    assert batch.labels.shape == batch.inputs["input_ids"].shape
    answered = batch.labels != -100
    assert torch.equal(batch.labels[answered], batch.inputs["input_ids"][answered])
    assert batch.inputs["pixel_values"].shape == (3, 3, 32, 32)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    placeholders = (ids == processor.image_token_id).sum(1).tolist()
    assert placeholders == [IMAGE_TOKENS, 0, IMAGE_TOKENS, IMAGE_TOKENS]
    assert (mask[:, 1:] <= mask[:, :-1]).all()
    assert mask.sum(1).unique().numel() > 1
    assert (ids == processor.tokenizer.bos_token_id).sum(1).tolist() == [1] * 4
    assert batch.origins == ("dataset[0]", "dataset[1]", "dataset[2]", "dataset[3]")
    texts = [processor.tokenizer.decode(ids[row][mask[row].bool()]) for row in range(4)]
    assert texts[1] == "<s> USER : which letter ? ASSISTANT : A </s>"
    assert texts[3].endswith("what ? ASSISTANT :")


def test_collate_leaves_the_processor_alone(processor):
    before = processor.tokenizer.padding_side
    collate(mixed_samples(), processor)
    assert processor.tokenizer.padding_side == before == "left"


def test_batching_does_not_change_a_row(processor):
    samples = mixed_samples()
    whole = collate(samples, processor)
    for row, sample in enumerate(samples):
        alone = collate([sample], processor)
        tokens = alone.labels.shape[1]
        assert torch.equal(alone.inputs["input_ids"][0], whole.inputs["input_ids"][row, :tokens])
        assert torch.equal(alone.labels[0], whole.labels[row, :tokens])
        assert (whole.labels[row, tokens:] == -100).all()


def test_text_only_batch_has_no_pixels(processor):
    batch = collate([mixed_samples()[1]], processor)
    assert "pixel_values" not in batch.inputs
    assert labelled(batch, processor) == ["A </s>"]


def test_last_answer_of_several_turns(processor):
    asked = user({"type": "image", "image": RED}, {"type": "text", "text": "what colour ?"})
    rest = [("assistant", "red"), ("user", "which shape ?"), ("assistant", "square")]
    row = chat(asked, *({"role": role, "content": text} for role, text in rest))
    batch = collate(load_samples([row]), processor)
    assert labelled(batch, processor) == ["square </s>"]


TURNS = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}"
)


PROMPT = "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
# It ends in a word that the conversation with the answer does not have.
NO_PREFIX = PROMPT.replace(": '", ": here'")


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (TURNS + "{% endfor %}{{ ' </s>\n' }}{% endfor %}" + PROMPT, "red </s>"),
        (TURNS + "{% endfor %}{{ ' .\n' }}{% endfor %}" + PROMPT, "red ."),
        (TURNS + "{% endfor %}{{ '\n' }}{% endfor %}" + NO_PREFIX, "red </s>"),
    ],
    ids=["template closes with eos", "template closes with its own token", "prompt is no prefix"],
)
def test_end_of_answer_follows_the_template(template, ending):
    processor = tiny_processor()
    processor.chat_template = template
    batch = collate(mixed_samples()[:1], processor)
    assert labelled(batch, processor) == [ending]


def test_template_with_bos_gets_no_second(processor):
    own = tiny_processor()
    own.chat_template = "{{ bos_token }}" + processor.chat_template
    with_bos, without = collate(mixed_samples(), own), collate(mixed_samples(), processor)
    assert torch.equal(with_bos.inputs["input_ids"], without.inputs["input_ids"])


@pytest.mark.parametrize("key", ["messages", "system"])
@pytest.mark.parametrize("shown", [True, False])
def test_a_system_prompt_is_in_the_text_or_refused(key, shown):
    processor = tiny_processor()
    loop = TURNS if shown else TURNS.replace("in messages", "in messages if m['role'] != 'system'")
    processor.chat_template = loop + "{% endfor %}{{ ' ' }}{% endfor %}" + PROMPT
    row = {"question": "what ?", "image": None, "answer": "red", "system": "which shape"}
    if key == "messages":
        turns = [("system", "which shape"), ("user", "what ?"), ("assistant", "red")]
        row = chat(*({"role": role, "content": text} for role, text in turns))
    samples = load_samples([row])
    if shown:
        ids = collate(samples, processor).inputs["input_ids"][0]
        assert "which shape" in processor.tokenizer.decode(ids)
        return
    message = r"^dataset\[0\]: the chat template does not show the system prompt; remove it, or use"
    with pytest.raises(ValueError, match=message):
        collate(samples, processor)


def test_nothing_is_truncated(processor):
    own = tiny_processor()
    own.tokenizer.model_max_length = 10
    own.tokenizer.backend_tokenizer.enable_truncation(10)
    short, whole = (collate(mixed_samples(), it).inputs["input_ids"] for it in (own, processor))
    assert torch.equal(short, whole)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"^LlavaProcessor has no chat template; add chat_template.jinja to its files"),
        ("USER: <image> what", r"^dataset\[0\]: the chat template does not show the answer 'red'"),
        (
            "{{ raise_exception('no system') }}",
            r"^dataset\[0\]: the processor's chat template fails on this sample \(.*no system",
        ),
        (
            "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}",
            # in Transformers 5.21 the processor does not count
            r"^dataset\[0\]: (LlavaProcessor refuses this batch \(The total number of <image>"
            r"|0 picture tokens for 1 pictures)",
        ),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, message):
    processor = tiny_processor()
    processor.chat_template = template
    with pytest.raises(ValueError, match=message):
        collate(mixed_samples()[:1], processor)


def test_collate_refuses():
    samples, processor = mixed_samples()[:1], tiny_processor()
    with pytest.raises(ValueError, match=r"^dict is no chat processor"):
        collate(samples, {})
    with pytest.raises(ValueError, match=r"got no samples"):
        collate([], processor)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad_token; set it in tokenizer_config.json"):
        collate(samples, processor)


def test_placeholder_in_the_users_text(processor):
    (sample,) = load_samples([{"image": RED, "question": "what is an <image> ?", "answer": "red"}])
    message = r"^dataset\[0\]: 2 <image> placeholders in the rendered text for 1 pictures; remove"
    with pytest.raises(ValueError, match=message):
        collate([sample], processor)


def test_picture_tokens_are_counted():
    ids = torch.tensor([1, 4, 4, 7, 4, 4])
    assert batch_module._count_image_tokens(ids, 4, 2, 2, "here") == 4
    assert batch_module._count_image_tokens(ids, 4, None, 2, "here") == 4
    assert batch_module._count_image_tokens(ids, 9, 2, 0, "here") == 0
    message = r"^here: \d picture tokens for \d pictures, .* expected; the processor does not fit"
    for expected, images, token in ((3, 2, 4), (2, 1, 4), (None, 1, 9), (2, 0, 4)):
        with pytest.raises(ValueError, match=message):
            batch_module._count_image_tokens(ids, token, expected, images, "here")


def test_unequal_expansion_is_found(monkeypatch):
    processor = tiny_processor()
    lengths = iter([16, 12])
    monkeypatch.setattr(
        type(processor), "replace_image_token", lambda *_args, **_options: "<image>" * next(lengths)
    )
    samples = load_samples([{"image": RED, "question": "what ?", "answer": "red"}] * 2)
    message = r"^dataset\[1\]: 12 picture tokens for 1 pictures, 16 expected"
    with pytest.raises(ValueError, match=message):
        collate(samples, processor)


@pytest.mark.parametrize("two", [2, np.int64(2), torch.tensor(2)], ids=["int", "numpy", "torch"])
def test_batches_cover_all_in_order(processor, two):
    samples = load_samples(tiny_messages(5))
    made = list(batches(samples, processor, two))
    assert [len(batch.origins) for batch in made] == [2, 2, 1]
    assert sum((batch.origins for batch in made), ()) == tuple(sample.origin for sample in samples)
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        list(batches(samples, processor, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_named_with_their_sample(monkeypatch, bad):
    processor = tiny_processor()
    processing = type(processor.image_processor).preprocess

    def preprocess(self, images, *args, **options):
        made = processing(self, images, *args, **options)
        for row, picture in enumerate(own[0] for own in images):
            if picture.getpixel((0, 0)) == (0, 0, 255):
                made["pixel_values"][row] = bad
        return made

    monkeypatch.setattr(type(processor.image_processor), "preprocess", preprocess)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "red")]
    rows = [{"image": picture, "question": "what ?"} for picture in pictures]
    message = (
        r"^dataset\[1\]: LlavaProcessor makes NaN or infinity of the pictures \(pixel_values\); "
        r"check them, and the processor's image_mean"
    )
    with pytest.raises(ValueError, match=message):
        collate(load_samples(rows), processor)


def of_lengths(*words):
    return load_samples(
        [{"image": RED, "question": "what " * count, "answer": "red"} for count in words]
    )


def test_samples_without_positions_are_left_out_with_counts(processor, caplog):
    samples = of_lengths(3, 50, 4, 90)
    masks = [collate([sample], processor).inputs["attention_mask"] for sample in samples]
    lengths = [int(mask.sum()) for mask in masks]
    assert without_too_long(samples, processor, max(lengths)) == samples
    assert without_too_long(samples, processor, None) == samples
    assert without_too_long([], processor, 1) == []
    assert notes(caplog) == []
    assert without_too_long(samples, processor, lengths[1] - 1) == [samples[0], samples[2]]
    counts = f"2 of 4 samples are longer than the model's {lengths[1] - 1} positions"
    assert notes(caplog) == [f"{counts} and are left out (dataset[3]: {lengths[3]} tokens)"]
    message = rf"^4 of 4 samples are .* 5 positions .dataset.3.: {lengths[3]} tokens.: give shorter"
    with pytest.raises(ValueError, match=message):
        without_too_long(samples, processor, 5)
    message = (
        rf"^dataset.1.: {lengths[1]} tokens are more than .* {lengths[1] - 1} positions; leave"
    )
    with pytest.raises(ValueError, match=message):
        list(batches(samples, processor, 2, model=with_positions(lengths[1] - 1)))


def with_positions(count, **rope):
    class Text:
        max_position_embeddings, rope_parameters = count, rope or None

    class Config:
        get_text_config = Text

    model = torch.nn.Module()
    model.config = Config()
    return model


def scaled(**rope):
    return longest_sample(with_positions(4096, **rope))


def test_longest_sample_follows_the_text_models_configuration():
    assert longest_sample(tiny_llava()) == 512
    assert longest_sample(torch.nn.Linear(1, 1)) is None
    assert scaled() == 4096
    assert scaled(rope_type="default", rope_theta=1e4) == 4096
    assert scaled(rope_type="linear", factor=4.0) == 16384  # the figure is that before scaling
    llama3 = {"rope_type": "llama3", "original_max_position_embeddings": 512}
    for factor in (8.0, 4.0):  # that after it
        assert scaled(factor=factor, **llama3) == 4096
    assert scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096) == 16384
