"""`transformers.pipeline("image-text-to-text")` on a quantized model says what `generate` says,
however model and question get in.
"""

import json
from threading import Thread

import pytest
import torch
from transformers import AutoModelForImageTextToText, TextIteratorStreamer, pipeline

import qvlm_hf
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.nn.replace import quantized_modules

CONFIG = {"scheme": "W8A8", "activation_granularity": "dynamic_token"}
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def pipe():
    """Made from the full-precision demo model, which is quantized on the way in."""
    return pipeline(
        "image-text-to-text",
        model=str(model_dir()),
        model_kwargs={"quantization_config": qvlm_hf.QVLMConfig(**CONFIG)},
    )


@pytest.fixture(scope="module")
def directory(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "w8a8"
    return qvlm_hf.save_quantized(
        pipe.model, pipe.processor, path, report=pipe.model.hf_quantizer.report
    )


@pytest.fixture(scope="module")
def chats():
    """Six questions of the demo, each with its picture, and their answers."""
    questions = []
    for sample in load_samples(dataset_path("test"), num_samples=6, seed=1):
        (picture,) = sample.images()
        text = next(
            part["text"] for part in sample.messages[0]["content"] if part["type"] == "text"
        )
        questions.append(user(text, picture))
    return [[question] for question in questions]


def user(text, *pictures):
    return {
        "role": "user",
        "content": [
            *({"type": "image", "image": picture} for picture in pictures),
            {"type": "text", "text": text},
        ],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture_of(chat):
    return chat[0]["content"][0]["image"]


def by_hand(pipe, chat):
    """The tokens after the prompt, from processor and `generate` alone."""
    inputs = pipe.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = pipe.model.generate(
            **inputs.to(dtype=pipe.model.dtype), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return tokens[0, inputs["input_ids"].shape[1] :]


def text_by_hand(pipe, chat):
    return pipe.processor.decode(by_hand(pipe, chat), skip_special_tokens=True)


def answer(pipe, chat, **options):
    return text_of(pipe(text=chat, max_new_tokens=NEW_TOKENS, return_full_text=False, **options))


def text_of(results):
    """Without the space before it: the pipeline cuts the prompt off the decoded whole."""
    (result,) = results
    return result["generated_text"].removeprefix(" ")


def conversations(chats):
    """One to three pictures, one to three turns."""
    first, second, third = (picture_of(chat) for chat in chats[:3])
    return [
        [user("How many circles are there in both pictures?", first, second)],
        [
            user("What color is the object in the top left cell?", first),
            assistant("purple"),
            user("And here?", second, third),
        ],
        [
            user("What color is the object in the top left cell?", third),
            assistant("red"),
            user("Which shape is it?"),
            assistant("circle"),
            user("And here?", first),
        ],
    ]


def test_quantizes_on_the_way_in(pipe):
    assert (
        len(list(quantized_modules(pipe.model))) == len(pipe.model.hf_quantizer.report.modules) > 40
    )
    assert pipe.model.config.quantization_config.scheme == "W8A8"


def test_by_directory(directory, pipe, chats):
    loaded = pipeline("image-text-to-text", model=str(directory))
    for chat in chats[:3]:
        assert answer(loaded, chat) == text_by_hand(pipe, chat)


def test_by_object(directory, pipe, chats):
    model = AutoModelForImageTextToText.from_pretrained(directory)
    wrapped = pipeline("image-text-to-text", model=model, processor=pipe.processor)
    for chat in chats[:3]:
        assert answer(wrapped, chat) == text_by_hand(pipe, chat)


def test_the_answers_are_the_demos(pipe, chats):
    """Equal answers could be equally wrong: five of six must be right."""
    samples = load_samples(dataset_path("test"), num_samples=6, seed=1)
    expected = [sample.messages[-1]["content"][0]["text"] for sample in samples]
    answers = [answer(pipe, chat) for chat in chats]
    assert sum(given == right for given, right in zip(answers, expected, strict=True)) >= 5


def test_tokens(pipe, chats):
    (result,) = pipe(text=chats[0], max_new_tokens=NEW_TOKENS, return_tensors=True)
    expected = by_hand(pipe, chats[0])
    assert torch.equal(torch.as_tensor(result["generated_token_ids"])[-len(expected) :], expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batched(pipe, chats, batch_size):
    results = pipe(
        text=chats, max_new_tokens=NEW_TOKENS, return_full_text=False, batch_size=batch_size
    )
    assert [text_of(result) for result in results] == [text_by_hand(pipe, chat) for chat in chats]


def test_several_pictures_and_turns(pipe, chats):
    for chat in conversations(chats):
        assert answer(pipe, chat) == text_by_hand(pipe, chat)


def test_several_pictures_and_turns_batched(pipe, chats):
    """Prompts of one, two and three pictures in one batch: the pictures must stay with their chats,
    of which the last three need theirs.
    """
    mixed = [*conversations(chats), *chats[3:]]
    results = pipe(
        text=mixed, max_new_tokens=NEW_TOKENS, return_full_text=False, batch_size=len(mixed)
    )
    assert [text_of(result) for result in results] == [text_by_hand(pipe, chat) for chat in mixed]


def test_a_prompt_written_by_hand(pipe, chats):
    prompt = pipe.processor.apply_chat_template(chats[0], add_generation_prompt=True)
    results = pipe(
        images=picture_of(chats[0]), text=prompt, max_new_tokens=NEW_TOKENS, return_full_text=False
    )
    assert text_of(results) == text_by_hand(pipe, chats[0])


def test_streaming(pipe, chats):
    streamer = TextIteratorStreamer(
        pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
    )
    options = {
        "streamer": streamer,
        "min_new_tokens": NEW_TOKENS,
    }  # longer than the demo's answers, so that there is something to stream
    thread = Thread(
        target=pipe,
        kwargs={"text": chats[0], "max_new_tokens": NEW_TOKENS, "generate_kwargs": options},
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = answer(pipe, chats[0], generate_kwargs={"min_new_tokens": NEW_TOKENS})
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1


def test_calibrates_on_the_way_in(source, processor, kinds):
    """The same bits as from_pretrained gives."""
    expected = AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=kinds["searched"](processor)
    )
    inside = pipeline(
        "image-text-to-text",
        model=str(source),
        model_kwargs={"quantization_config": kinds["searched"](processor)},
    ).model
    assert inside.hf_quantizer.report.segments
    tensors = expected.state_dict()
    assert tensors.keys() == inside.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in inside.state_dict().items())


def test_saved_from_a_pipeline_without_its_configuration(directory):
    """Transformers hands model_kwargs to the tokenizer, which cannot write a QVLMConfig."""
    assert "quantization_config" not in json.loads(
        (directory / "tokenizer_config.json").read_text()
    )


def test_an_error_reaches_the_user():
    config = qvlm_hf.QVLMConfig(scheme="W4A4")
    with pytest.raises(ValueError, match="scheme='W4A4' has activation ranges to calibrate"):
        pipeline(
            "image-text-to-text",
            model=str(model_dir()),
            model_kwargs={"quantization_config": config},
        )
