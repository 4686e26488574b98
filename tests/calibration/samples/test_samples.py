"""Samples: every accepted format, every refused mistake with its message, and the tensors made of them."""

import dataclasses
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_TOKENS, tiny_llava, tiny_messages, tiny_processor

from qvlm_hf.calibration.samples import (
    Batch,
    Sample,
    batches,
    check_image_tokens,
    collate,
    fingerprint,
    hold_out,
    load_samples,
    longest_sample,
    without_too_long,
)

RED = Image.new("RGB", (8, 6), "red")
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what colour ?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
LLAVA = [{"from": "human", "value": "<image>\nwhat colour ?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def folder(tmp_path):
    RED.save(tmp_path / "a.png")
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return tmp_path


def write_lines(folder, *records, name="data.jsonl"):
    path = folder / name
    path.write_text(
        "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records),
        encoding="utf-8",
    )
    return path


def refusal(source, **options):
    """The message with which load_samples refuses; always a single line."""
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:  # without DOTALL: one line
        load_samples(source, **options)
    return str(caught.value)


def user_parts(sample):
    return [(part["type"], part.get("text")) for part in sample.messages[0]["content"]]


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"id": 7, "image": "a.png", "conversations": LLAVA},
        {"image": "a.png", "question": "what colour ?", "answer": "red"},
    ],
    ids=["chat", "llava", "question"],
)
def test_formats_give_the_same_sample(folder, record):
    (sample,) = load_samples(write_lines(folder, {**record, "kind": "colour"}))
    assert user_parts(sample) == [("image", None), ("text", "what colour ?")]
    assert sample.messages[0]["content"][0] == {"type": "image", "image": folder / "a.png"}
    assert sample.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    assert (sample.answer, sample.kind, sample.origin) == ("red", "colour", "data.jsonl:1")
    (picture,) = sample.images()
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (8, 6), (255, 0, 0))


def test_chat_content_may_be_text_and_images_may_be_in_memory():
    chat = [
        {"role": "system", "content": "be short"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": RED},
                {"type": "text", "text": "a", "path": None},
            ],
        },
    ]
    (sample,) = load_samples([{"messages": chat}])
    assert [message["role"] for message in sample.messages] == ["system", "user"]
    assert sample.messages[0]["content"] == [{"type": "text", "text": "be short"}]
    assert sample.answer is None
    assert sample.images()[0].tobytes() == RED.tobytes()


def test_llava_placeholders_keep_their_place(folder):
    turns = [
        {"from": "human", "value": "first <image> then <image>\n?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "sure ?"},
        {"from": "gpt", "value": "yes"},
    ]
    (sample,) = load_samples(
        write_lines(folder, {"image": ["a.png", "b.png"], "conversations": turns})
    )
    assert user_parts(sample) == [
        ("text", "first"),
        ("image", None),
        ("text", "then"),
        ("image", None),
        ("text", "?"),
    ]
    assert [picture.getpixel((0, 0)) for picture in sample.images()] == [(255, 0, 0), (0, 0, 255)]
    assert sample.answer == "yes"


def test_json_list_counts_lines(folder):
    record = {"image": "a.png", "question": "what ?", "answer": "red"}
    path = folder / "data.json"
    path.write_text(json.dumps([record, record], indent=1), encoding="utf-8")
    assert [sample.origin for sample in load_samples(path)] == ["data.json:2", "data.json:7"]


def test_jsonl_skips_empty_lines_and_reads_unicode(folder):
    record = {"image": "a.png", "question": "what\u2028colour ?", "answer": "röt"}
    path = folder / "data.jsonl"
    path.write_text("\ufeff\n" + json.dumps(record, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (sample,) = load_samples(str(path))
    assert (sample.origin, sample.answer) == ("data.jsonl:2", "röt")


def test_question_without_picture_or_answer(folder):
    (sample,) = load_samples(write_lines(folder, {"image": None, "question": "what ?"}))
    assert (sample.images(), sample.answer) == ([], None)


def scienceqa(folder):
    root = folder / "ScienceQA"
    problem = {
        "question": "Which shape is red?",
        "choices": ["the square", "the circle"],
        "answer": 1,
        "hint": "Look at the picture.",
        "image": "image.png",
        "subject": "natural science",
        "split": "train",
        "lecture": "L",
        "solution": "S",
    }
    problems = {
        "1": problem,
        "2": {**problem, "image": None, "hint": "", "answer": 0},
        "9": {**problem, "split": "val"},
    }
    for split, pid, colour in (("train", "1", "red"), ("val", "9", "blue")):
        place = root / "images" / split / pid
        place.mkdir(parents=True)
        Image.new("RGB", (5, 5), colour).save(place / "image.png")
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "minival": ["9"]}))
    return root


def test_scienceqa_folder(folder):
    root = scienceqa(folder)
    first, second = load_samples(root)
    assert first.messages[0]["content"][1]["text"] == (
        "Context: Look at the picture.\nQuestion: Which shape is red?\nOptions: (A) the square (B) "
        "the circle\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.answer, first.kind, first.origin) == (
        "B",
        "natural science",
        "ScienceQA/problems.json:1",
    )
    assert first.images()[0].getpixel((0, 0)) == (255, 0, 0)
    assert second.images() == []
    assert second.answer == "A"
    assert second.messages[0]["content"][0]["text"].startswith("Context: N/A\n")
    (validation,) = load_samples(f"{root}:minival")
    assert validation.images()[0].getpixel((0, 0)) == (0, 0, 255)


def test_scienceqa_mistakes(folder):
    root = scienceqa(folder)
    assert "choose one of train, minival" in refusal(f"{root}:test")
    (root / "images" / "train" / "1" / "image.png").unlink()
    assert 'ScienceQA/problems.json:1: key "image": no such picture' in refusal(root)
    (root / "pid_splits.json").write_text(json.dumps({"train": ["3"]}))
    assert "ScienceQA/problems.json:3: no such problem" in refusal(root)
    (root / "pid_splits.json").unlink()
    assert "pid_splits.json is missing" in refusal(root)


def test_scienceqa_rows_in_memory():
    row = {
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": 0,
        "image": RED,
        "hint": "",
        "subject": "s",
    }
    (sample,) = load_samples([row])
    assert (sample.answer, sample.kind) == ("A", "s")
    assert 'dataset[0]: key "answer" is 2' in refusal([{**row, "answer": 2}])
    del row["answer"]
    assert 'dataset[0]: key "anwser" is unknown here, and "answer" is missing' in refusal(
        [{**row, "anwser": 1}]
    )


def test_datasets_dataset_reads_only_chosen_rows():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = {
        "image": [RED] * 6,
        "question": [f"q{i}" for i in range(6)],
        "answer": ["red", None] * 3,
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    chosen = load_samples(dataset, num_samples=3, seed=1)
    assert [sample.origin for sample in chosen] == sorted(sample.origin for sample in chosen)
    assert len(chosen) == 3
    assert all(sample.images()[0].size == (8, 6) for sample in chosen)
    texts = {f"dataset[{i}]": f"q{i}" for i in range(6)}
    assert all(
        sample.messages[0]["content"][1]["text"] == texts[sample.origin] for sample in chosen
    )

    class Recording:
        read: list[int] = []  # noqa: RUF012

        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            self.read.append(index)
            return dataset[index]

    load_samples(Recording(), num_samples=2)
    assert len(Recording.read) == 2


def test_hub_id(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "me/gone":
            raise OSError("no such repository\nsecond line")
        return [{"image": RED, "question": "what ?", "answer": "red"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_samples("me/pictures")[0].origin == "me/pictures:0"
    load_samples("me/pictures:test")
    assert asked == [("me/pictures", "train"), ("me/pictures", "test")]
    assert '"me/gone" is no file or folder here' in refusal("me/gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("me/pictures")


def test_one_pass_iterable_takes_what_comes_first():
    taken = []

    def rows():
        for index in range(100):
            taken.append(index)
            yield {"image": RED, "question": f"q{index}"}

    assert [sample.origin for sample in load_samples(rows(), num_samples=2)] == [
        "dataset[0]",
        "dataset[1]",
    ]
    assert taken == [0, 1]


def test_samples_pass_through():
    samples = load_samples(tiny_messages(3))
    assert load_samples(samples) == samples
    assert [sample.kind for sample in samples] == ["colour", "shape", "colour"]


# ---- choice --------------------------------------------------------------------------------------


def origins(count, **options):
    return [
        sample.origin
        for sample in load_samples(
            [{"image": RED, "question": f"q{i}"} for i in range(count)], **options
        )
    ]


def test_choice_is_seeded_nested_and_in_source_order():
    everything = origins(50)
    chosen = origins(50, num_samples=10, seed=3)
    assert chosen == origins(50, num_samples=10, seed=3)
    assert chosen != origins(50, num_samples=10, seed=4)
    assert chosen != everything[:10]
    assert chosen == [origin for origin in everything if origin in chosen]
    assert set(origins(50, num_samples=5, seed=3)) < set(chosen)
    assert origins(3, num_samples=10) == origins(3)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, np.float64(2), np.int64(0), "2"])
def test_choice_refuses(number):
    assert refusal([{"image": RED, "question": "q"}], num_samples=number).startswith(
        f"num_samples={number!r} must be"
    )


# ---- mistakes ------------------------------------------------------------------------------------

GOOD = {"image": "a.png", "question": "what ?", "answer": "red"}


def chat(*messages):
    return {"messages": list(messages)}


def user(*parts):
    return {"role": "user", "content": list(parts)}


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"question": "what ?", "answer": "red"},
            'key "image" is missing; add it (null for a question without a picture)',
        ),
        (
            {"imgae": "a.png", "question": "what ?"},
            'key "image" is missing; add it (null for a question without a picture); is "imgae" to',
        ),
        (
            {"img": "a.png", "question": "what ?"},
            'key "image" is missing; add it (null for a question without a picture); is "img" to',
        ),
        (
            {"image": "a.png", "question": "what ?", "Anser": "red"},
            'key "Anser" is unknown here, and "answer" is missing; rename or remove',
        ),
        (
            {"image": "a.png", "quesion": "what ?"},
            'no known format (keys: image, quesion); give "messages", or "image" and',
        ),
        ({"image": "a.png", "quesion": "what ?"}, '(is "quesion" to be "question"?)'),
        (
            {"imgae": "a.png", "conversations": LLAVA},
            'key "imgae" is unknown here, and "image" is missing; rename or remove it',
        ),
        (
            {"conversations": [{"from": "human", "valeu": "x"}]},
            'key "conversations[0].value" is missing; add it; is "valeu" to be it?',
        ),
        (
            {"conversations": [{"from": "human", "value": "x", "image": "a.png"}]},
            'key "conversations[0].image" has no place here',
        ),
        ({"image": "a.png", "answer": "red"}, "no known format (keys: image, answer); give"),
        ({**GOOD, "answer": 3}, 'key "answer" is int; give text'),
        ({**GOOD, "question": " "}, 'key "question" is empty'),
        ({**GOOD, "kind": 3}, 'key "kind" is int'),
        ({**GOOD, "image": 3}, 'key "image" is int; give a path or a PIL image'),
        (
            {**GOOD, "image": "https://x.org/a.png"},
            'key "image" is a URL ("https://x.org/a.png"); pictures are read from disk only',
        ),
        ({**GOOD, "image": "gone.png"}, 'key "image": no such picture: '),
        ({**GOOD, "image": "broken.png"}, 'key "image": unreadable picture '),
        ({**GOOD, "image": "."}, 'key "image": unreadable picture '),
        (
            {"image": "a.png", "conversations": LLAVA[1:]},
            'key "conversations" has 0 <image> placeholders for 1 pictures',
        ),
        ({"conversations": LLAVA}, 'key "conversations" has 1 <image> placeholders for 0 pictures'),
        ({"image": "gone.png", "conversations": LLAVA}, 'key "image": no such picture: '),
        (
            {
                "image": ["a.png", "gone.png"],
                "conversations": [{"from": "human", "value": "<image><image>"}],
            },
            'key "image[1]": no such',
        ),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "key \"conversations[0].from\" is 'bot'; give human, gpt or system",
        ),
        ({"conversations": [{"from": "human"}]}, 'key "conversations[0].value" is missing'),
        (
            {"conversations": [{"from": "gpt", "value": "x"}]},
            "message 0 has the role 'assistant' where \"user\" belongs",
        ),
        ({"conversations": []}, 'key "conversations" is empty'),
        ({"messages": "hello"}, 'key "messages" is str; give a list'),
        (chat(), 'key "messages" is empty'),
        (chat("hello"), 'key "messages[0]" is str'),
        (chat({"role": "user"}), 'key "messages[0].content" is missing'),
        (
            chat({"role": "user", "contents": "a"}),
            'key "messages[0].content" is missing; add it; is "contents" to be it?',
        ),
        (
            chat({"role": "user", "content": "a", "images": ["a.png"]}),
            'key "messages[0].images" has no place here; write a picture as',
        ),
        (
            {**chat({"role": "user", "content": "a"}), "images": ["a.png"]},
            'key "images" holds what no message shows; write a picture as',
        ),
        (chat({"role": "human", "content": "a"}), "message 0 has the role 'human'"),
        (chat(user(TEXT), user(TEXT)), "message 1 has the role 'user' where \"assistant\" belongs"),
        (chat({"role": "system", "content": "a"}), "message 0 has the role 'system'"),
        (
            chat(user({"type": "video", "path": "a.mp4"})),
            "key \"messages[0].content[0].type\" is 'video'",
        ),
        (chat(user(3)), 'key "messages[0].content[0]" is int'),
        (
            chat(user(TEXT, {"type": "image", "url": "a.png"})),
            'key "messages[0].content[1].url" is a URL',
        ),
        (
            chat(user(TEXT, {"type": "image", "path": "gone.png"})),
            'key "messages[0].content[1].path": no such picture',
        ),
        (chat(user({"type": "image"})), 'key "messages[0].content[0].image" is missing'),
        (
            chat(user({"type": "text", "content": "a"})),
            'key "messages[0].content[0].text" is missing; add it',
        ),
        (
            chat(user({**TEXT, "image": "a.png"})),
            'key "messages[0].content[0].image" has no place here; write a picture as',
        ),
        (
            chat(user({"type": "image", "path": "a.png", "text": "a"})),
            'key "messages[0].content[0].text" has no place here; write text as',
        ),
        (
            chat(user({"type": "image", "path": "a.png", "image": "b.png"})),
            'key "messages[0].content[0].image" has no place here',
        ),
        ({**GOOD, "answer": "\ud800"}, 'key "answer" holds half of a surrogate pair'),
        ([1], "is list; give an object with keys"),
    ],
)
def test_mistakes_name_file_line_and_key(folder, record, expected):
    # The mistake is on line 3, after a good sample of the same format and an empty line: the number
    # is the file's, not the sample's.
    layout = record if isinstance(record, dict) else {}
    good = (
        {"messages": CHAT}
        if "messages" in layout
        else {"image": "a.png", "conversations": LLAVA}
        if "conversations" in layout
        else GOOD
    )
    message = refusal(write_lines(folder, good, "", record))
    assert message.startswith("data.jsonl:3: ")
    assert expected in message


def test_mixed_formats_are_refused(folder):
    message = refusal(write_lines(folder, GOOD, {"messages": CHAT}))
    assert (
        message
        == 'data.jsonl:2: is in the "messages" format, but data.jsonl:1 is in the "question" '
        "format; keep one format per source"
    )
    sample = load_samples([{"image": RED, "question": "q"}])[0]
    assert "dataset[1]: is in the" in refusal([sample, {"image": RED, "question": "q"}])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("data.jsonl", '{"image": 1}\n{"image": ', "data.jsonl:2: not valid JSON at column"),
        ("data.json", '[{"a": 1},\n {"a": }]', "data.json:2: not valid JSON at column 8"),
        ("data.json", '[{"image": null, "question": "a"}\n', "data.json:2: not valid JSON"),
        ("data.json", '{"a": 1}', "data.json: holds no list"),
        ("data.json", " [ ]", "data.json has no samples"),
        ("data.jsonl", "\n\n", "data.jsonl has no samples"),
        ("data.csv", "a,b", 'ends in ".csv"; give a .jsonl file'),
    ],
)
def test_unreadable_files(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert expected in refusal(tmp_path / name)


def test_not_utf8(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"question": "\xff"}')
    assert "is not UTF-8 text (byte 14)" in refusal(tmp_path / "data.jsonl")


def test_sources_that_are_none(tmp_path):
    assert "gone.jsonl: no such file or folder" in refusal(tmp_path / "gone.jsonl")
    assert "data/train.jsonl: no such file or folder" in refusal("data/train.jsonl")
    assert "is no ScienceQA folder (problems.json is missing)" in refusal(tmp_path)
    assert "dataset has no samples" in refusal([])
    assert "dataset is a mapping with the keys train, test" in refusal({"train": [], "test": []})
    assert "dataset is int; give a path" in refusal(3)


def test_only_chosen_pictures_are_looked_at(folder):
    records = [GOOD] * 20
    broken = [*records, {**GOOD, "image": "gone.png"}]
    path = write_lines(folder, *broken)
    seed = next(
        seed
        for seed in range(100)
        if "data.jsonl:21" not in [s.origin for s in _chosen(folder, records, seed)]
    )
    assert len(load_samples(path, num_samples=3, seed=seed)) == 3
    assert "data.jsonl:21" in refusal(path)


def _chosen(folder, records, seed):
    return load_samples(
        write_lines(folder, *records, GOOD, name="data.jsonl.jsonl"), num_samples=3, seed=seed
    )


def test_picture_cut_short_is_named_when_opened(folder):
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (sample,) = load_samples(write_lines(folder, {**GOOD, "image": "a.png"}))
    (folder / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r'data.jsonl:1: key "image": unreadable picture .*a\.png'):
        sample.images()
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r'data.jsonl:1: key "image": no such picture'):
        fingerprint([sample])


def test_pictures_are_upright_rgb(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (8, 6), 100).save(folder / "turned.jpg", exif=exif)
    (sample,) = load_samples(write_lines(folder, {**GOOD, "image": "turned.jpg"}))
    (picture,) = sample.images()
    assert (picture.size, picture.mode) == ((6, 8), "RGB")


def test_handmade_sample_is_checked():
    with pytest.raises(ValueError, match=r"mine: the content of message 0 is no list of"):
        Sample(messages=({"role": "user", "content": "text"},), origin="mine")
    with pytest.raises(ValueError, match=r"mine: has no messages"):
        Sample(messages=(), origin="mine")


# ---- keys that name no content -------------------------------------------------------------------

EXTRA = {
    "question_id": 7,
    "category": ["a", {"b": None}],
    "score": 1.5,
    "meta": {"x": [1]},
    "image_id": "x",
    "none": None,
}


def notes(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("qvlm_hf")]


def with_extra(layout):
    """A record of each layout with keys of no content at every level."""
    part = {"type": "text", "text": "what colour ?", "index": 3}
    return {
        "messages": {
            "messages": [
                user({"type": "image", "path": "a.png", "detail": "high"}, part) | {"name": "me"}
            ],
            **EXTRA,
        },
        "conversations": {"image": "a.png", "conversations": [LLAVA[0] | {"weight": 0}], **EXTRA},
        "question": {"image": "a.png", "question": "what colour ?", **EXTRA},
    }[layout]


@pytest.mark.parametrize(
    ("layout", "inner"),
    [
        (
            "messages",
            ["messages[].content[].detail", "messages[].content[].index", "messages[].name"],
        ),
        ("conversations", ["conversations[].weight"]),
        ("question", []),
    ],
)
@pytest.mark.parametrize("source", ["file", "list", "rows"])
def test_keys_that_name_no_content_are_ignored_with_one_note(
    folder, caplog, monkeypatch, layout, inner, source
):
    monkeypatch.chdir(folder)
    records = [with_extra(layout) for _ in range(5)]
    if source == "rows":
        records = pytest.importorskip("datasets").Dataset.from_list(
            [{**r, "category": "c"} for r in records]
        )
    samples = load_samples(
        write_lines(folder, *records) if source == "file" else records, num_samples=3
    )
    assert [user_parts(sample) for sample in samples] == [
        [("image", None), ("text", "what colour ?")]
    ] * 3
    names = ", ".join(sorted(["category", "image_id", "meta", "question_id", "score", *inner]))
    name = f"{folder}/data.jsonl" if source == "file" else "dataset"
    assert notes(caplog) == [f"{name}: ignored the keys {names}: they are not needed"]


def test_a_note_names_few_of_many_keys_and_none_where_all_are_known(folder, caplog):
    load_samples(write_lines(folder, {**GOOD, "id": 3, "kind": "k", "note": None, "more": ""}))
    assert notes(caplog) == []
    load_samples(write_lines(folder, {**GOOD, **{f"k{i}": i for i in range(11)}}))
    assert notes(caplog) == [
        f"{folder}/data.jsonl: ignored the keys k0, k1, k10, k2, k3, k4, k5, k6 and 3 more: they "
        f"are not needed"
    ]


NO_ANSWER = {"image": "a.png", "question": "what ?"}
NO_PICTURE = {"image": None, "question": "what ?", "answer": "red"}
NO_LLAVA_PICTURE = {
    "image": None,
    "conversations": [{"from": "human", "value": "what ?"}, LLAVA[1]],
}
NO_CHAT_ANSWER = {"messages": CHAT[:1]}


def renamed(key, name, state="empty"):
    return f'key "{key}" is unknown here, and "{name}" is {state}; rename or remove it'


@pytest.mark.parametrize(
    ("record", "key", "expected"),
    [
        *[
            (base | {key: value}, key, renamed(key, "image"))
            for base in (NO_PICTURE, NO_LLAVA_PICTURE, {**NO_PICTURE, "image": ""}, {**NO_LLAVA_PICTURE, "image": []})
            for key, value in {
                "images": ["a.png"], "img": "a.png", "image_path": "a.png", "imageUrl": "http://x/a", "image_1": "a", "photos": ["a"],
                "file_name": "a.JPG", "shown": ["a.png", "b.png"], "imgae": "a", "picture": {"bytes": "x"},
            }.items()
        ],
        *[
            (base | {key: value}, key, renamed(key, "answer", "empty" if "answer" in base else "missing"))
            for base in (NO_ANSWER, {**NO_ANSWER, "answer": None}, {**NO_ANSWER, "answer": ""}, {**NO_ANSWER, "choices": []})
            for key, value in {
                "response": "red", "choice": "B", "label": 3, "answers": ["red"], "gt_answer": "a", "groundTruth": "a", "anwser": "a",
            }.items()
        ],
        ({**GOOD, "options": ["a", "b"]}, "options", renamed("options", "choices", "missing")),
        ({**NO_CHAT_ANSWER, "response": "red"}, "response", 'key "response" holds what no message '
                                                            'shows; write an answer as the last mes'),
        ({"image": "a.png", "conversations": LLAVA[:1], "label": 0}, "label", 'key "label" holds what no message shows; write an answer'),
        ({**chat({"role": "user", "content": "a"}), "image_path": "a.png"}, "image_path", "no message"),
        ({"messages": CHAT, "conversations": LLAVA}, "conversations", 'key "conversations" holds a chat beside "messages"; keep one of'),
        ({**GOOD, "conversation": LLAVA}, "conversation", 'key "conversation" holds a chat beside '
                                                          '"question"; keep one of them'),
        ({**GOOD, "image_2": "b.png"}, "image_2", 'key "image_2" holds more pictures than "image", '
                                                  'which alone is shown; give a chat'),
        ({**GOOD, "images": ["a.png", "b.png"]}, "images", 'key "images" holds more pictures than '
                                                           '"image"'),
        ({**GOOD, "image": ""}, "image", 'key "image" is empty; give a path, or null for a '
                                         'question without a picture'),
        (chat({"role": "user", "content": "", "contents": "a"}), "messages[0].contents", renamed("messages[0].contents", "content")),
        (chat({"role": "user", "content": "a", "image_url": "x"}), "messages[0].image_url", "has no place here; write a picture as"),
        ({"photo": "a.png", "question": "what ?"}, "image", 'key "image" is missing; add it'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["file", "list"])
def test_content_under_another_name_is_an_error_where_ours_is_missing_or_empty(
    folder, monkeypatch, record, key, expected, source
):
    monkeypatch.chdir(folder)
    message = refusal(write_lines(folder, "", record) if source == "file" else [record])
    assert message.startswith(
        f'{"data.jsonl:2" if source == "file" else "dataset[0]"}: key "{key}"'
    )
    assert expected in message


@pytest.mark.parametrize(
    ("record", "ignored"),
    [
        (
            {**GOOD, "image_url": "x.png", "answers": ["red"], "images": ["a.png"]},
            "answers, image_url, images",
        ),
        (
            {**NO_PICTURE, "image_id": "x", "imageId": 3, "image_width": 640, "images": 0},
            "imageId, image_id, image_width, images",
        ),
        ({**NO_PICTURE, "images": [], "messages": None, "conversations": [], "img": {}}, None),
        (
            {**NO_ANSWER, "answer_type": "word", "answer_id": 3, "question_type": "x"},
            "answer_id, answer_type, question_type",
        ),
        (
            {"messages": CHAT, "answer": "red", "images": ["a.png"], "conversations": None},
            "answer, images",
        ),
        (
            chat(user({"type": "image", "path": "a.png", "image": "", "image_url": "a.png"})),
            "messages[].content[].image_url",
        ),
        (chat(user({"type": "image", "path": "", "image": "a.png"})), None),
        ({"conversations": LLAVA, "image": "a.png", "messages": []}, None),
    ],
)
def test_content_under_another_name_is_ignored_where_ours_is_filled(
    folder, caplog, record, ignored
):
    load_samples(path := write_lines(folder, record))
    assert notes(caplog) == (
        [f"{path}: ignored the keys {ignored}: they are not needed"] if ignored else []
    )


def test_a_row_in_memory_may_hold_its_picture_under_any_name(caplog):
    assert 'key "scene" is unknown here, and "image" is empty' in refusal(
        [{**NO_PICTURE, "scene": RED}]
    )
    load_samples([{"image": RED, "question": "q", "thumbnail": RED.copy(), "images": [RED.copy()]}])
    assert notes(caplog) == ["dataset: ignored the keys images, thumbnail: they are not needed"]


def test_rows_of_a_table_have_the_format_whose_key_is_filled(folder):
    rows = [{"messages": None, "conversations": LLAVA, "image": "a.png", "question": None}] * 2
    assert [user_parts(sample)[0] for sample in load_samples(write_lines(folder, *rows))] == [
        ("image", None)
    ] * 2


# ---- nested and numeric values -------------------------------------------------------------------


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_deeply_nested_rows_are_read_or_named(caplog):
    class Indexable:
        def __init__(self, *rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    loop = {}
    loop["self"] = loop
    rows = [
        {"image": None, "question": "q", "meta": value}
        for value in (nested(10_000), loop, [loop, loop])
    ]
    assert len(load_samples(Indexable(*rows), num_samples=2)) == 2
    assert notes(caplog) == ["dataset: ignored the keys meta: they are not needed"]
    for bad, expected in (
        (
            {"conversations": [{"from": nested(10_000), "value": "x"}]},
            'key "conversations[0].from" is a list nested too deep; give human',
        ),
        (
            {"conversations": [{"from": ["human"], "value": "x"}]},
            "key \"conversations[0].from\" is ['human']; give human, gpt or system",
        ),
        (
            chat({"role": nested(10_000), "content": "x"}),
            "message 0 has the role a list nested too deep where",
        ),
        (
            chat(user({"type": nested(10_000)})),
            'key "messages[0].content[0].type" is a list nested too deep; give',
        ),
        (
            {"question": "q", "choices": ["a"], "answer": nested(10_000)},
            'key "answer" is a list nested too deep; give the index',
        ),
    ):
        assert refusal(Indexable(bad, bad), num_samples=1).split(": ", 1)[1].startswith(expected)


INTEGERS = [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)]


@pytest.mark.parametrize("two", INTEGERS, ids=lambda value: type(value).__name__)
def test_integers_of_any_library_are_integers(processor, two):
    rows = [{"image": RED, "question": f"q{i}"} for i in range(9)]
    assert load_samples(rows, num_samples=two, seed=two) == load_samples(
        rows, num_samples=2, seed=2
    )
    assert load_samples(iter(rows), num_samples=two) == load_samples(iter(rows), num_samples=2)
    assert [len(batch.origins) for batch in batches(load_samples(rows[:3]), processor, two)] == [
        2,
        1,
    ]
    (sample,) = load_samples(
        [{"question": "q", "choices": ["x", "y", "z"], "answer": np.int64(2), "image": None}]
    )
    assert sample.answer == "C"


@pytest.mark.parametrize(
    "bad",
    [None, "1", 1.0, np.float64(1), True, np.bool_(True), -1, np.ones(2, int), nested(10_000)],
    ids=lambda bad: type(bad).__name__,
)
def test_a_seed_is_a_whole_number(bad):
    assert refusal([GOOD], seed=bad).startswith(("seed=", "seed is "))


# ---- every kind of content in the draw -----------------------------------------------------------


def of_kinds(folder, *kinds):
    """Chats of the named kinds, as records."""
    picture, turns = (
        {"type": "image", "path": "a.png"},
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    )
    made = {
        "picture": chat(user(picture, TEXT), turns[1]),
        "text": chat(*turns),
        "pictures": chat(user(picture, picture, TEXT), turns[1]),
        "turns": chat(*turns, *turns),
    }
    return [made[kind] for kind in kinds]


RARE = ["picture", "text", "pictures", "turns"]


@pytest.mark.parametrize("rare", RARE)
@pytest.mark.parametrize("source", ["file", "list"])
def test_a_draw_keeps_what_is_rare(folder, monkeypatch, rare, source):
    monkeypatch.chdir(folder)
    common = "text" if rare in ("picture", "turns") else "picture"
    records = of_kinds(folder, *[common] * 6, rare, *[common] * 3)
    for seed in range(12):
        chosen = load_samples(
            write_lines(folder, *records) if source == "file" else records, num_samples=4, seed=seed
        )
        assert len(chosen) == 4
        assert [sample.origin for sample in chosen if sample.origin.endswith((":7", "[6]"))], seed
        kept, rest = hold_out(load_samples(records), 4, seed)
        assert (len(kept), len(rest)) == (4, 6)
        assert [sample for sample in kept if sample.origin == "dataset[6]"], seed


def test_a_draw_of_one_takes_a_picture_and_of_four_all_kinds(folder, monkeypatch):
    monkeypatch.chdir(folder)
    records = of_kinds(folder, *["text"] * 20, *RARE, *["text"] * 20)
    for seed in range(12):
        (one,) = load_samples(records, num_samples=1, seed=seed)
        assert one.pictures()
        assert {origin.origin for origin in load_samples(records, num_samples=4, seed=seed)} >= {
            "dataset[22]",
            "dataset[23]",
        }
        smaller, larger = (
            {s.origin for s in load_samples(records, num_samples=n, seed=seed)} for n in (5, 9)
        )
        assert smaller < larger


def test_a_draw_that_had_every_kind_anyway_is_as_before(folder, monkeypatch):
    monkeypatch.chdir(folder)
    records = of_kinds(folder, *["picture", "text"] * 20)
    for seed in range(12):
        order = list(range(40))
        random.Random(seed).shuffle(order)
        if len({index % 2 for index in order[:10]}) == 2:
            assert [s.origin for s in load_samples(records, num_samples=10, seed=seed)] == [
                f"dataset[{i}]" for i in sorted(order[:10])
            ]


def test_rows_are_read_until_one_has_a_picture():
    read = []

    class Rows:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            read.append(index)
            return {"image": RED if index == 6 else None, "question": f"q{index}"}

    for seed in range(12):
        read.clear()
        chosen = load_samples(Rows(), num_samples=4, seed=seed)
        assert "dataset[6]" in [sample.origin for sample in chosen]
        assert len(chosen) == 4
        assert read[-1] == 6 or len(read) == 4
        assert len(set(read)) == len(read)


# ---- files that are nearly JSON ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 200_000 + "]" * 200_000, "it is nested too deep"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "it is nested too deep"),
        ("9" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
        ('{"b": 1, "b": 2}', 'key "b" stands twice in one object'),
    ],
    ids=["lists", "objects", "digits", "twice"],
)
def test_json_that_cannot_be_used_is_named_with_its_line(tmp_path, name, value, reason):
    good = '{"image": null, "question": "a"}'
    bad = f'{{"image": null, "question": "b", "extra": {value}}}'
    (tmp_path / name).write_text(
        f"{good}\n{bad}\n" if name == "data.jsonl" else f"[{good},\n{bad}]\n"
    )
    message = refusal(tmp_path / name)
    assert message.startswith(f"{name}:2: cannot be used as JSON ({reason}")
    assert message.endswith("; mend the file")


def test_scienceqa_tables_nested_too_deep(tmp_path):
    (tmp_path / "pid_splits.json").write_text("{}")
    (tmp_path / "problems.json").write_text('{"1": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert (
        refusal(tmp_path)
        == f"{tmp_path}/problems.json: cannot be used as JSON (it is nested too deep); mend the "
        f"file"
    )


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_numbers_of_python_and_endings_of_windows_are_read(tmp_path, name):
    rows = [
        '{"image": null, "question": "a", "x": NaN}',
        '{"image": null, "question": "b", "x": -Infinity, "x": -Infinity}',
    ]
    text = "\r\n\r\n".join(rows) if name == "data.jsonl" else "[" + ",\r\n\r\n".join(rows) + "]\r\n"
    (tmp_path / name).write_bytes(("\ufeff" + text + "\r\n").encode())
    samples = load_samples(tmp_path / name)
    assert [(s.origin, user_parts(s)[0][1]) for s in samples] == [
        (f"{name}:1", "a"),
        (f"{name}:3", "b"),
    ]


def test_encodings_and_leftovers_are_refused(tmp_path):
    row = '{"image": null, "question": "a"}'
    path = tmp_path / "data.jsonl"
    path.write_bytes(row.encode("utf-16"))
    assert "is not UTF-8 text (byte 0); save it as UTF-8" in refusal(path)
    path.write_bytes(row.encode("utf-16-le"))
    assert "is not UTF-8 text (a NUL at character 1); save it as UTF-8" in refusal(path)
    (tmp_path / "data.json").write_text(f"[{row}]\n\n[{row}]")
    assert (
        refusal(tmp_path / "data.json")
        == "data.json:3: more follows after the list's end; put all samples into one list"
    )


# ---- objects that are nearly data sets -----------------------------------------------------------


class Rows:
    """A map-style data set as torch has it: no length, no iteration."""

    def __getitem__(self, index):
        return {"image": RED, "question": f"q{index}"}


class BrokenRows(Rows):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise KeyError(index)


def columns():
    return {"image": [RED, None], "question": ["a", "b"]}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (columns, "dataset is function; call it and give what it returns"),
        (Rows, "dataset is type; give an object of it"),
        (
            Rows(),
            "dataset is Rows; it has no length: give it __len__, or give a list of its samples",
        ),
        (
            BrokenRows(),
            "dataset[0]: BrokenRows does not give it (KeyError: 0); give a list of samples",
        ),
        (
            columns(),
            "dataset is a mapping with the keys image, question, which are columns; give its rows: "
            "datasets.Dataset.from_dict(",
        ),
        (
            {"image": RED, "question": "a"},
            "dataset is a mapping with the keys image, question, a single sample; give a list of "
            "samples",
        ),
        (
            {"train": [], "test": []},
            'keys train, test; give a list of samples, or one split such as dataset["train"]',
        ),
        (np.zeros((2, 4, 4, 3)), "dataset[0]: is ndarray; give an object with keys"),
        (np.zeros(()), "dataset is ndarray without a length"),
        (
            torch.utils.data.TensorDataset(torch.zeros(3, 2)),
            "dataset[0]: is tuple; give an object with keys",
        ),
        (b"[]", "dataset is bytes; give a path"),
        (None, "dataset is NoneType; give a path"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_near_misses_say_what_to_give(source, expected):
    assert expected in refusal(source)


def test_tables_say_how_to_get_their_rows():
    datasets, pandas, arrow = (
        pytest.importorskip(name) for name in ("datasets", "pandas", "pyarrow")
    )
    rows = {"image": [None, None], "question": ["a", "b"]}
    frame = pandas.DataFrame(rows)
    remedy = "datasets.Dataset.from_pandas(dataset)"
    assert refusal(frame) == f"dataset is a pandas DataFrame; give its rows: {remedy}"
    assert refusal(frame["question"]) == f"dataset is a pandas Series; give its rows: {remedy}"
    table = arrow.table(rows)
    assert refusal(table) == "dataset is a pyarrow Table; give its rows: dataset.to_pylist()"
    for given in (
        eval(remedy, {"datasets": datasets, "dataset": frame}),
        table.to_pylist(),
        datasets.Dataset.from_dict(rows),
    ):
        assert [user_parts(sample)[0][1] for sample in load_samples(given)] == ["a", "b"]
    both = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    assert refusal(both).endswith(
        'keys train; give a list of samples, or one split such as dataset["train"]'
    )
    polars = type(
        "DataFrame", (), {"__module__": "polars.dataframe.frame"}
    )  # a stand-in: the package is not among the test's
    assert refusal(polars()) == "dataset is a polars DataFrame; give its rows: dataset.to_dicts()"


# ---- pictures of other modes ---------------------------------------------------------------------


def gradient(mode):
    """12 x 4 pixels of any mode of 8 bits, from a colour gradient with transparency."""
    values = np.arange(12 * 4 * 4, dtype=np.uint8).reshape(4, 12, 4)
    if mode in ("CMYK", "RGBA", "RGBX"):
        return (
            Image.fromarray(values, mode="RGBA")
            if mode == "RGBA"
            else Image.frombytes(mode, (12, 4), values.tobytes())
        )
    if mode == "P with transparency":
        picture = Image.fromarray(values[..., :3]).convert("P")
        picture.info["transparency"] = 3
        return picture
    return Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"],
)
def test_pictures_of_8_bits_are_what_transformers_makes_of_them(mode):
    from transformers.image_utils import load_image

    picture = gradient(mode)
    (sample,) = load_samples([{"image": picture, "question": "q"}])
    expected = load_image(picture)
    (found,) = sample.images()
    assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())


@pytest.mark.parametrize("name", ["a.png", "a.tiff", None, "big-endian"])
def test_pictures_of_16_bits_keep_their_content(folder, name):
    values = np.array([[0, 257, 300, 32896], [65535, 25700, 25828, 128]], dtype=np.uint16)
    picture = Image.fromarray(values)
    if name == "big-endian":
        picture = Image.frombytes("I;16B", (4, 2), values.byteswap().tobytes())
    elif name:
        picture.save(folder / name)
    (sample,) = load_samples(
        [{"image": folder / name if name in ("a.png", "a.tiff") else picture, "question": "q"}]
    )
    (found,) = sample.images()
    expected = [[0, 1, 1, 128], [255, 100, 100, 0]]
    assert found.mode == "RGB"
    assert np.asarray(found).tolist() == [[[v] * 3 for v in row] for row in expected]


def png_of_16_bit_colours(values):
    """A PNG of 16-bit RGB, which PIL can read and not write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def tiff_of_12_bits(values):
    """A TIFF that says 12 bits; an even number of values in a row."""
    height, width = values.shape
    bits = "".join(f"{value:012b}" for value in values.flat)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {
        256: width,
        257: height,
        258: 12,
        259: 1,
        262: 1,
        273: 8 + 2 + 12 * 9 + 4,
        277: 1,
        278: height,
        279: len(data),
    }
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
        for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + data


@pytest.mark.parametrize("top", [1, 255, 1023, 4095])
@pytest.mark.parametrize("kind", ["gray.png", "gray.tiff", "memory", "colour.png"])
def test_16_bit_pictures_of_fewer_bits_are_refused(folder, kind, top):
    values = np.linspace(0, top, 8).astype(np.uint16).reshape(2, 4)
    value = folder / kind
    if kind == "colour.png":
        value.write_bytes(png_of_16_bit_colours(np.stack([values] * 3, axis=2)))
    elif kind == "memory":
        value = Image.fromarray(values)
    else:
        Image.fromarray(values).save(value)
    expected = (
        'dataset[0]: key "image": the picture has 16 bits and no value of 4096 or more: almost '
        "black, if 65535 is white; "
        "if 1023 or 4095 is, scale it to 8 bits, 0 to 255"
    )
    assert refusal([{"image": value, "question": "q"}]) == expected
    part = {"type": "image", "image": value}
    sample = Sample(messages=({"role": "user", "content": [part]},), origin="mine")
    with pytest.raises(ValueError, match=r"^mine: .* the picture has 16 bits"):
        sample.images()


def test_dark_pictures_of_16_bits_stay_what_they_are(folder):
    dark, black = np.array([[0, 257, 4096, 2570]], np.uint16), np.zeros((1, 4), np.uint16)
    (folder / "colour.png").write_bytes(png_of_16_bit_colours(np.stack([dark] * 3, axis=2)))
    rows = [
        {"image": value, "question": "q"}
        for value in (Image.fromarray(dark), Image.fromarray(black), folder / "colour.png")
    ]
    found = [
        np.asarray(picture)[0, :, 0].tolist()
        for sample in load_samples(rows)
        for picture in sample.images()
    ]
    assert found == [[0, 1, 16, 10], [0, 0, 0, 0], [0, 1, 16, 10]]


def test_files_that_say_12_bits_are_scaled_from_12_bits(folder):
    (folder / "a.tiff").write_bytes(
        tiff_of_12_bits(np.array([[0, 4095, 2048, 16], [0, 161, 1, 4095]]))
    )
    (sample,) = load_samples([{"image": folder / "a.tiff", "question": "q"}])
    assert np.asarray(sample.images()[0])[..., 1].tolist() == [[0, 255, 128, 1], [0, 10, 0, 255]]


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_pictures_without_pixels_are_named(mode, size):
    picture = Image.new(mode, size)
    message = f"the picture has no pixels ({size[0]} x {size[1]}); replace it or remove the sample"
    assert (
        refusal([{"image": RED, "question": "q"}, {"image": picture, "question": "q"}])
        == f'dataset[1]: key "image": {message}'
    )
    sample = Sample(
        messages=({"role": "user", "content": [{"type": "image", "image": picture}]},),
        origin="mine",
    )
    with pytest.raises(ValueError, match=r"^mine: .* has no pixels"):
        sample.images()


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "32-bit integers")])
def test_pictures_without_a_known_range_are_refused(folder, dtype, kind):
    picture = Image.fromarray(np.full((4, 4), 0.5).astype(dtype))
    expected = f'key "image": the picture holds {kind} (mode "{picture.mode}"), whose black and white are unknown; scale it to 8 bits'
    assert refusal([{"image": picture, "question": "q"}]).startswith(f"dataset[0]: {expected}")
    picture.save(folder / "a.tiff")
    path = write_lines(folder, GOOD, {**GOOD, "image": "a.tiff"})
    assert refusal(path).startswith(f"data.jsonl:2: {expected}")
    (sample,) = load_samples(write_lines(folder, GOOD))
    picture.save(folder / "a.png", format="TIFF")  # the file changes after it was checked
    with pytest.raises(ValueError, match="whose black and white are unknown"):
        sample.images()


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint16), torch.zeros(3, 4, 4)],
    ids=["float", "uint16", "torch"],
)
def test_arrays_are_no_pictures(array):
    kind = type(array).__name__
    expected = f'dataset[0]: key "image" is {kind}; give a path or a PIL image; of an array of 8-bit values make one with PIL.Image.fromarray'
    assert refusal([{"image": array, "question": "q"}]) == expected


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
    rows = [
        {"image": Image.new("RGB", (8, 8), colour), "question": "what ?"}
        for colour in ("red", "blue", "red")
    ]
    message = r"^dataset\[1\]: LlavaProcessor makes NaN or infinity of the pictures \(pixel_values\); check them, and the processor's image_mean"
    with pytest.raises(ValueError, match=message):
        collate(load_samples(rows), processor)


# ---- samples longer than the model's positions ---------------------------------------------------


def of_lengths(*words):
    return load_samples(
        [{"image": RED, "question": "what " * count, "answer": "red"} for count in words]
    )


def test_samples_without_positions_are_left_out_with_counts(processor, caplog):
    samples = of_lengths(3, 50, 4, 90)
    lengths = [
        int(collate([sample], processor).inputs["attention_mask"].sum()) for sample in samples
    ]
    assert without_too_long(samples, processor, max(lengths)) == samples
    assert without_too_long(samples, processor, None) == samples
    assert without_too_long([], processor, 1) == []
    assert notes(caplog) == []
    assert without_too_long(samples, processor, lengths[1] - 1) == [samples[0], samples[2]]
    counts = f"2 of 4 samples are longer than the model's {lengths[1] - 1} positions"
    assert notes(caplog) == [f"{counts} and are left out (dataset[3]: {lengths[3]} tokens)"]
    with pytest.raises(
        ValueError,
        match=rf"^4 of 4 samples are .* 5 positions \(dataset\[3\]: {lengths[3]} tokens\): give "
        rf"shorter texts",
    ):
        without_too_long(samples, processor, 5)
    with pytest.raises(
        ValueError,
        match=rf"^dataset\[1\]: {lengths[1]} tokens are more than the model's {lengths[1] - 1} "
        rf"positions; leave",
    ):
        list(batches(samples, processor, 2, max_tokens=lengths[1] - 1))


def scaled(**rope):
    class Text:
        max_position_embeddings, rope_parameters = 4096, rope or None

    class Config:
        get_text_config = Text

    model = torch.nn.Module()
    model.config = Config()
    return longest_sample(model)


def test_longest_sample_follows_the_text_models_configuration():
    assert longest_sample(tiny_llava()) == 512
    assert longest_sample(torch.nn.Linear(1, 1)) is None
    assert scaled() == 4096
    assert scaled(rope_type="default", rope_theta=1e4) == 4096
    assert scaled(rope_type="linear", factor=4.0) == 16384  # the figure is that before scaling
    assert (
        scaled(rope_type="llama3", factor=8.0, original_max_position_embeddings=512) == 4096
    )  # that after it
    assert scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096) == 16384


# ---- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_depends_on_text_picture_and_order(folder):
    def of(*records):
        return fingerprint(
            load_samples([{**record, "image": folder / record["image"]} for record in records])
        )

    other = {**GOOD, "question": "which ?"}
    assert of(GOOD) == of(dict(GOOD))
    assert len(of(GOOD)) == 64
    different = [
        of(GOOD),
        of(other),
        of(GOOD, other),
        of(other, GOOD),
        of({**GOOD, "image": "b.png"}),
        of({**GOOD, "answer": "re"}),
    ]
    assert len(set(different)) == len(different)
    before = of(GOOD)
    Image.new("RGB", (8, 6), "green").save(folder / "a.png")
    assert of(GOOD) != before


def test_fingerprint_counts_pixels_in_memory_and_not_origins():
    def of(picture):
        return fingerprint(load_samples([{"image": picture, "question": "q"}]))

    changed = RED.copy()
    changed.putpixel((0, 0), (254, 0, 0))
    assert of(RED) == of(RED.copy()) != of(changed)
    (sample,) = load_samples([{"image": RED, "question": "q"}])
    assert fingerprint([dataclasses.replace(sample, origin="elsewhere")]) == fingerprint([sample])


# ---- collate -------------------------------------------------------------------------------------


def labelled(batch, processor):
    return [processor.tokenizer.decode(row[row != -100]) for row in batch.labels]


def mixed_samples():
    return load_samples(
        [
            {"image": RED, "question": "what colour is this ?", "answer": "red"},
            {"image": None, "question": "which letter ?", "answer": "A"},
            {
                "image": RED,
                "question": "what shape is in the picture ?",
                "answer": "the red square",
            },
            {"image": RED, "question": "what ?"},
        ]
    )


def test_collate_labels_the_answer_and_pads_on_the_right(processor):
    batch = collate(mixed_samples(), processor)
    assert labelled(batch, processor) == ["red </s>", "A </s>", "the red square </s>", ""]
    assert batch.labels.dtype == torch.int64
    assert batch.labels.shape == batch.inputs["input_ids"].shape
    answered = batch.labels != -100
    assert torch.equal(batch.labels[answered], batch.inputs["input_ids"][answered])
    assert batch.inputs["pixel_values"].shape == (3, 3, 32, 32)
    assert (batch.inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [
        IMAGE_TOKENS,
        0,
        IMAGE_TOKENS,
        IMAGE_TOKENS,
    ]
    mask = batch.inputs["attention_mask"]
    assert (mask[:, 1:] <= mask[:, :-1]).all()
    assert mask.sum(1).unique().numel() > 1
    assert (batch.inputs["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [
        1
    ] * 4
    assert batch.origins == ("dataset[0]", "dataset[1]", "dataset[2]", "dataset[3]")
    text = processor.tokenizer.decode(batch.inputs["input_ids"][1][mask[1].bool()])
    assert text == "<s> USER : which letter ? ASSISTANT : A </s>"
    assert processor.tokenizer.decode(batch.inputs["input_ids"][3][mask[3].bool()]).endswith(
        "what ? ASSISTANT :"
    )


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
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what colour ?"}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "which shape ?"},
        {"role": "assistant", "content": "square"},
    ]
    assert labelled(collate(load_samples([{"messages": chat}]), processor), processor) == [
        "square </s>"
    ]


TURNS = "{% for m in messages %}{{ m['role'] + ' : ' }}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (
            TURNS
            + "{% endfor %}{{ ' </s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant "
            ": ' }}{% endif %}",
            "red </s>",
        ),
        (
            TURNS
            + "{% endfor %}{{ ' .\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' "
            "}}{% endif %}",
            "red .",
        ),
        # The prompt ends in a word that the conversation with the answer does not have.
        (
            TURNS
            + "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : "
            "here' }}{% endif %}",
            "red </s>",
        ),
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


def test_nothing_is_truncated(processor):
    own = tiny_processor()
    own.tokenizer.model_max_length = 10
    own.tokenizer.backend_tokenizer.enable_truncation(10)
    assert torch.equal(
        collate(mixed_samples(), own).inputs["input_ids"],
        collate(mixed_samples(), processor).inputs["input_ids"],
    )


def changed(**attributes):
    processor = tiny_processor()
    for name, value in attributes.items():
        setattr(processor, name, value)
    return processor


def test_collate_refuses():
    samples = mixed_samples()[:1]
    with pytest.raises(
        ValueError,
        match=r"^LlavaProcessor has no chat template; add chat_template.jinja to its files",
    ):
        collate(samples, changed(chat_template=None))
    with pytest.raises(
        ValueError, match=r"^dataset\[0\]: the chat template does not show the answer 'red'"
    ):
        collate(samples, changed(chat_template="USER: <image> what"))
    with pytest.raises(
        ValueError,
        match=r"^dataset\[0\]: the processor's chat template fails on this sample \(.*no system",
    ):
        collate(samples, changed(chat_template="{{ raise_exception('no system') }}"))
    with pytest.raises(
        ValueError,
        match=r"^dataset\[0\]: LlavaProcessor refuses this batch \(The total number of <image>",
    ):
        collate(
            samples,
            changed(
                chat_template="{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
            ),
        )
    with pytest.raises(ValueError, match=r"^dict is no chat processor"):
        collate(samples, {})
    with pytest.raises(ValueError, match=r"got no samples"):
        collate([], tiny_processor())
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad_token; set it in tokenizer_config.json"):
        collate(samples, processor)


def test_placeholder_in_the_users_text(processor):
    (sample,) = load_samples([{"image": RED, "question": "what is an <image> ?", "answer": "red"}])
    with pytest.raises(
        ValueError,
        match=r"^dataset\[0\]: 2 <image> placeholders in the rendered text for 1 pictures; remove",
    ):
        collate([sample], processor)


def test_check_image_tokens():
    ids = torch.tensor([1, 4, 4, 7, 4, 4])
    assert check_image_tokens(ids, 4, 2, 2, "here") == 4
    assert check_image_tokens(ids, 4, None, 2, "here") == 4
    assert check_image_tokens(ids, 9, 2, 0, "here") == 0
    for expected, images, token in ((3, 2, 4), (2, 1, 4), (None, 1, 9), (2, 0, 4)):
        with pytest.raises(
            ValueError,
            match=r"^here: \d picture tokens for \d pictures, .* expected; the processor does not "
            r"fit",
        ):
            check_image_tokens(ids, token, expected, images, "here")


def test_unequal_expansion_is_found(monkeypatch):
    processor = tiny_processor()
    lengths = iter([16, 12])
    monkeypatch.setattr(
        type(processor), "replace_image_token", lambda *_args, **_options: "<image>" * next(lengths)
    )
    samples = load_samples([{"image": RED, "question": "what ?", "answer": "red"}] * 2)
    with pytest.raises(
        ValueError, match=r"^dataset\[1\]: 12 picture tokens for 1 pictures, 16 expected"
    ):
        collate(samples, processor)


def test_batches_cover_all_in_order(processor):
    samples = load_samples(tiny_messages(5))
    made = list(batches(samples, processor, 2))
    assert [len(batch.origins) for batch in made] == [2, 2, 1]
    assert sum((batch.origins for batch in made), ()) == tuple(sample.origin for sample in samples)
    assert isinstance(made[0].to("cpu"), Batch)
    assert made[0].to("meta").labels.device.type == "meta"
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        list(batches(samples, processor, 0))


def test_import_stays_light():
    code = (
        "import sys, qvlm_hf.calibration.samples; "
        "found = {'transformers', 'huggingface_hub', 'optimum', 'datasets'} & set(sys.modules); "
        "sys.exit(repr(found) if found else 0)"
    )
    package = Path(sys.modules["qvlm_hf.calibration.samples"].__file__).parents[3]
    if "transformers" in (package / "qvlm_hf" / "__init__.py").read_text():
        pytest.skip(
            "the package's own __init__ registers with Transformers; import-linter checks this file"
        )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=package)
