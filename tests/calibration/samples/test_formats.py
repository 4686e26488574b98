"""Formats: every layout that is accepted, and every mistake with file, line, key and remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_rows import (
    CHAT,
    GOOD,
    LLAVA,
    RED,
    chat,
    notes,
    refusal,
    sample_folder,
    user,
    user_parts,
    write_lines,
)

from qvlm_hf.calibration.samples import Sample, load_samples

folder = sample_folder

# ---- layouts -------------------------------------------------------------------------------------


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
    parts = [{"type": "image", "image": RED}, {"type": "text", "text": "a", "path": None}]
    (sample,) = load_samples([chat({"role": "system", "content": "be short"}, user(*parts))])
    assert [message["role"] for message in sample.messages] == ["system", "user"]
    assert sample.messages[0]["content"] == [{"type": "text", "text": "be short"}]
    assert sample.answer is None
    assert sample.images()[0].tobytes() == RED.tobytes()


RECORDS = {
    "messages": {"messages": CHAT},
    "conversations": {"image": "a.png", "conversations": LLAVA},
    "question": GOOD,
    "choices": {"question": "q", "choices": ["a", "b"], "answer": 1},
}


@pytest.mark.parametrize("layout", RECORDS)
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_chat_is_its_first_turn(folder, caplog, layout, key):
    record = RECORDS[layout]
    (plain,) = load_samples(write_lines(folder, record))
    (sample,) = load_samples(write_lines(folder, {**record, key: "be short"}))
    content = [{"type": "text", "text": "be short"}]
    assert sample.messages[0] == {"role": "system", "content": content}
    assert sample.messages[1:] == plain.messages
    assert sample.image_keys == plain.image_keys
    assert not notes(caplog)
    for nothing in ("", " ", None):
        assert load_samples(write_lines(folder, {**record, key: nothing})) == [plain]
    both = {**record, "system": "a", "system_prompt": "b"}
    message = 'data.jsonl:1: key "system_prompt" stands beside another system prompt; keep one of'
    assert message in refusal(write_lines(folder, both))


def test_llava_placeholders_keep_their_place(folder):
    turns = [
        {"from": "human", "value": "first <image> then <image>\n?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "sure ?"},
        {"from": "gpt", "value": "yes"},
    ]
    record = {"image": ["a.png", "b.png"], "conversations": turns}
    (sample,) = load_samples(write_lines(folder, record))
    picture = ("image", None)
    expected = [("text", "first"), picture, ("text", "then"), picture, ("text", "?")]
    assert user_parts(sample) == expected
    assert [picture.getpixel((0, 0)) for picture in sample.images()] == [(255, 0, 0), (0, 0, 255)]
    assert sample.answer == "yes"


def test_question_without_picture_or_answer(folder):
    (sample,) = load_samples(write_lines(folder, {"image": None, "question": "what ?"}))
    assert (sample.images(), sample.answer) == ([], None)


def test_scienceqa_rows_in_memory():
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 0, "image": RED, "subject": "s"}
    (sample,) = load_samples([{**row, "hint": ""}])
    assert (sample.answer, sample.kind, sample.columns) == ("A", "s", ())  # no subject of theirs
    (sample,) = load_samples([{**row, "answer": np.int64(1)}])
    assert sample.answer == "B"
    assert 'dataset[0]: key "answer" is 2' in refusal([{**row, "answer": 2}])
    del row["answer"]
    expected = 'dataset[0]: key "anwser" is unknown here, and "answer" is missing'
    assert expected in refusal([{**row, "anwser": 1}])


def test_samples_pass_through():
    samples = load_samples([{"image": RED, "question": "q", "kind": kind} for kind in "ab"])
    assert load_samples(samples) == samples
    assert [sample.kind for sample in samples] == ["a", "b"]


def test_rows_of_a_table_have_the_format_whose_key_is_filled(folder):
    rows = [{"messages": None, "conversations": LLAVA, "image": "a.png", "question": None}] * 2
    samples = load_samples(write_lines(folder, *rows))
    assert [user_parts(sample)[0] for sample in samples] == [("image", None)] * 2


def test_handmade_sample_is_checked():
    with pytest.raises(ValueError, match=r"mine: the content of message 0 is no list of"):
        Sample(messages=({"role": "user", "content": "text"},), origin="mine")
    with pytest.raises(ValueError, match=r"mine: has no messages"):
        Sample(messages=(), origin="mine")


# ---- mistakes ------------------------------------------------------------------------------------


def said(text):
    return {"from": "human", "value": text}


GONE = {"type": "image", "path": "gone.png"}
# A row in each second line, the message without its origin in the next one.
MISTAKES_FILE = Path(__file__).parent / "mistakes.txt"
MISTAKES = [entry.split("\n") for entry in MISTAKES_FILE.read_text().strip().split("\n\n")]


@pytest.mark.parametrize(("row", "message"), MISTAKES)
@pytest.mark.parametrize("source", ["file", "list"])
def test_mistakes_name_file_line_and_key(folder, monkeypatch, row, message, source):
    monkeypatch.chdir(folder)
    if source == "file":  # the number is the file's, not the sample's
        assert refusal(write_lines(folder, "", row)) == f"data.jsonl:2: {message}"
    else:
        assert refusal([json.loads(row)]) == f"dataset[0]: {message}"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**GOOD, "image": "gone.png"}, 'key "image": no such picture: '),
        ({**GOOD, "image": "broken.png"}, 'key "image": unreadable picture '),
        ({**GOOD, "image": "."}, 'key "image": unreadable picture '),
        ({"image": "gone.png", "conversations": LLAVA}, 'key "image": no such picture: '),
        (
            {"image": ["a.png", "gone.png"], "conversations": [said("<image><image>")]},
            'key "image[1]": no such picture',
        ),
        (chat(user(GONE)), 'key "messages[0].content[0].path": no such picture'),
    ],
)
def test_pictures_that_cannot_be_read_are_named(folder, record, expected):
    assert refusal(write_lines(folder, "", record)).startswith(f"data.jsonl:2: {expected}")


def test_mixed_formats_are_refused(folder):
    expected = (
        'data.jsonl:2: is in the "messages" format, but data.jsonl:1 is in the "question" format; '
        "keep one format per source"
    )
    assert refusal(write_lines(folder, GOOD, {"messages": CHAT})) == expected
    row = {"image": RED, "question": "q"}
    assert "dataset[1]: is in the" in refusal([*load_samples([row]), row])


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint16), torch.zeros(3, 4, 4)],
    ids=["float", "uint16", "torch"],
)
def test_arrays_are_no_pictures(array):
    remedy = "give a path or a PIL image; of an array of 8-bit values make one with PIL.Image.from"
    expected = f'dataset[0]: key "image" is {type(array).__name__}; {remedy}array'
    assert refusal([{"image": array, "question": "q"}]) == expected


# ---- keys that name no content -------------------------------------------------------------------

EXTRA = {"question_id": 7, "category": ["a", {"b": None}], "score": 1.5}
EXTRA |= {"meta": {"x": [1]}, "image_id": "x", "none": None}
EXTRA_TEXT = {"type": "text", "text": "what colour ?", "index": 3}
EXTRA_IMAGE = {"type": "image", "path": "a.png", "detail": "high"}
WITH_EXTRA = {
    "messages": (
        chat(user(EXTRA_IMAGE, EXTRA_TEXT) | {"name": "me"}),
        ["messages[].content[].detail", "messages[].content[].index", "messages[].name"],
    ),
    "conversations": (
        {"image": "a.png", "conversations": [LLAVA[0] | {"weight": 0}]},
        ["conversations[].weight"],
    ),
    "question": ({"image": "a.png", "question": "what colour ?"}, []),
}


@pytest.mark.parametrize(("record", "inner"), WITH_EXTRA.values(), ids=WITH_EXTRA)
@pytest.mark.parametrize("source", ["file", "list", "rows"])
def test_keys_that_name_no_content_are_ignored_with_one_note(
    folder, caplog, monkeypatch, record, inner, source
):
    monkeypatch.chdir(folder)
    data = [{**record, **EXTRA} for _ in range(5)]
    if source == "rows":
        rows = [{**row, "category": "c"} for row in data]
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
    samples = load_samples(write_lines(folder, *data) if source == "file" else data, num_samples=3)
    expected = [("image", None), ("text", "what colour ?")]
    assert [user_parts(sample) for sample in samples] == [expected] * 3
    names = ", ".join(sorted(["category", "image_id", "meta", "question_id", "score", *inner]))
    name = f"{folder}/data.jsonl" if source == "file" else "dataset"
    assert notes(caplog) == [f"{name}: ignored the keys {names}: they are not needed"]


def test_a_note_names_few_of_many_keys_and_none_where_all_are_known(folder, caplog):
    load_samples(write_lines(folder, {**GOOD, "id": 3, "kind": "k", "note": None, "more": ""}))
    assert notes(caplog) == []
    load_samples(write_lines(folder, {**GOOD, **{f"k{i}": i for i in range(11)}}))
    names = "k0, k1, k10, k2, k3, k4, k5, k6 and 3 more"
    assert notes(caplog) == [f"{folder}/data.jsonl: ignored the keys {names}: they are not needed"]


# ---- content under another name ------------------------------------------------------------------

NO_ANSWER = {"image": "a.png", "question": "what ?"}
NO_PICTURE_ROW = {"image": None, "question": "what ?", "answer": "red"}
NO_PICTURE_CHAT = {"image": None, "conversations": [{"from": "human", "value": "what ?"}, LLAVA[1]]}
PICTURES = dict.fromkeys(("img", "image_path", "image_1", "imgae"), "a")
PICTURES |= {"images": ["a"], "photos": ["a"]}
PICTURES |= {"imageUrl": "http://x/a", "file_name": "a.JPG", "shown": ["a.png", "b.png"]}
PICTURES |= {"picture": {"bytes": "x"}}
ANSWERS = dict.fromkeys(("response", "gt_answer", "groundTruth", "anwser"), "a")
ANSWERS |= {"choice": "B", "label": 3, "answers": ["red"]}


@pytest.mark.parametrize(
    ("base", "names", "ours", "state"),
    [
        (NO_PICTURE_ROW, PICTURES, "image", "empty"),
        (NO_PICTURE_ROW | {"image": ""}, PICTURES, "image", "empty"),
        (NO_PICTURE_CHAT, PICTURES, "image", "empty"),
        (NO_PICTURE_CHAT | {"image": []}, PICTURES, "image", "empty"),
        (NO_ANSWER, ANSWERS, "answer", "missing"),
        (NO_ANSWER | {"answer": None}, ANSWERS, "answer", "empty"),
        (NO_ANSWER | {"answer": ""}, ANSWERS, "answer", "empty"),
        (NO_ANSWER | {"choices": []}, ANSWERS, "answer", "missing"),
    ],
)
def test_content_under_another_name_is_an_error_where_ours_is_missing_or_empty(
    base, names, ours, state
):
    for key, value in names.items():
        problem = f'is unknown here, and "{ours}" is {state}; rename or remove it'
        assert refusal([base | {key: value}]) == f'dataset[0]: key "{key}" {problem}'


URL_BESIDE = {"type": "image", "path": "a.png", "image": "", "image_url": "a.png"}


@pytest.mark.parametrize(
    ("record", "ignored"),
    [
        (
            {**GOOD, "image_url": "x.png", "answers": ["red"], "images": ["a.png"]},
            "answers, image_url, images",
        ),
        (
            {**NO_PICTURE_ROW, "image_id": "x", "imageId": 3, "image_width": 640, "images": 0},
            "imageId, image_id, image_width, images",
        ),
        ({**NO_PICTURE_ROW, "images": [], "messages": None, "conversations": [], "img": {}}, None),
        (
            {**NO_ANSWER, "answer_type": "word", "answer_id": 3, "question_type": "x"},
            "answer_id, answer_type, question_type",
        ),
        (
            {"messages": CHAT, "answer": "red", "images": ["a.png"], "conversations": None},
            "answer, images",
        ),
        (chat(user(URL_BESIDE)), "messages[].content[].image_url"),
        (chat(user({"type": "image", "path": "", "image": "a.png"})), None),
        ({"conversations": LLAVA, "image": "a.png", "messages": []}, None),
    ],
)
def test_content_under_another_name_is_ignored_where_ours_is_filled(
    folder, caplog, record, ignored
):
    load_samples(path := write_lines(folder, record))
    expected = f"{path}: ignored the keys {ignored}: they are not needed"
    assert notes(caplog) == ([expected] if ignored else [])


def test_a_row_in_memory_may_hold_its_picture_under_any_name(caplog):
    expected = 'key "scene" is unknown here, and "image" is empty'
    assert expected in refusal([{**NO_PICTURE_ROW, "scene": RED}])
    load_samples([{"image": RED, "question": "q", "thumbnail": RED.copy(), "images": [RED.copy()]}])
    assert notes(caplog) == ["dataset: ignored the keys images, thumbnail: they are not needed"]


# ---- nested values -------------------------------------------------------------------------------


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


class Indexable:
    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_deeply_nested_keys_without_content_are_ignored(caplog):
    loop = {}
    loop["self"] = loop
    metas = (nested(10_000), loop, [loop, loop])
    rows = [{"image": None, "question": "q", "meta": value} for value in metas]
    assert len(load_samples(Indexable(*rows), num_samples=2)) == 2
    assert notes(caplog) == ["dataset: ignored the keys meta: they are not needed"]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (
            {"conversations": [{"from": nested(10_000), "value": "x"}]},
            'key "conversations[0].from" is',
        ),
        (chat({"role": nested(10_000), "content": "x"}), "message 0 has the role"),
        (chat(user({"type": nested(10_000)})), 'key "messages[0].content[0].type" is'),
        ({"question": "q", "choices": ["a"], "answer": nested(10_000)}, 'key "answer" is'),
    ],
    ids=["from", "role", "type", "answer"],
)
def test_deeply_nested_content_is_named(bad, expected):
    message = refusal(Indexable(bad, bad), num_samples=1).split(": ", 1)[1]
    assert message.startswith(f"{expected} a list nested too deep")
