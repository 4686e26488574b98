"""Samples: every accepted format, every refused mistake with its message, and the tensors made of them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_TOKENS, tiny_messages, tiny_processor

from qvlm_hf.calibration.samples import Batch, Sample, batches, check_image_tokens, collate, fingerprint, load_samples

RED = Image.new("RGB", (8, 6), "red")
CHAT = [
    {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what colour ?"}]},
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
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), encoding="utf-8")
    return path


def refusal(source, **options):
    """The message with which load_samples refuses; always a single line."""
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:  # without DOTALL: one line
        load_samples(source, **options)
    return str(caught.value)


def user_parts(sample):
    return [(part["type"], part.get("text")) for part in sample.messages[0]["content"]]


# ---- formats -------------------------------------------------------------------------------------------------------------------------


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
        {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "a", "path": None}]},
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
    (sample,) = load_samples(write_lines(folder, {"image": ["a.png", "b.png"], "conversations": turns}))
    assert user_parts(sample) == [("text", "first"), ("image", None), ("text", "then"), ("image", None), ("text", "?")]
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
    problems = {"1": problem, "2": {**problem, "image": None, "hint": "", "answer": 0}, "9": {**problem, "split": "val"}}
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
        "Context: Look at the picture.\nQuestion: Which shape is red?\nOptions: (A) the square (B) the circle\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.answer, first.kind, first.origin) == ("B", "natural science", "ScienceQA/problems.json:1")
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
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 0, "image": RED, "hint": "", "subject": "s"}
    (sample,) = load_samples([row])
    assert (sample.answer, sample.kind) == ("A", "s")
    assert 'dataset[0]: key "answer" is 2' in refusal([{**row, "answer": 2}])


def test_datasets_dataset_reads_only_chosen_rows():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    rows = {"image": [RED] * 6, "question": [f"q{i}" for i in range(6)], "answer": ["red", None] * 3}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    chosen = load_samples(dataset, num_samples=3, seed=1)
    assert [sample.origin for sample in chosen] == sorted(sample.origin for sample in chosen)
    assert len(chosen) == 3
    assert all(sample.images()[0].size == (8, 6) for sample in chosen)
    texts = {f"dataset[{i}]": f"q{i}" for i in range(6)}
    assert all(sample.messages[0]["content"][1]["text"] == texts[sample.origin] for sample in chosen)

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

    assert [sample.origin for sample in load_samples(rows(), num_samples=2)] == ["dataset[0]", "dataset[1]"]
    assert taken == [0, 1]


def test_samples_pass_through():
    samples = load_samples(tiny_messages(3))
    assert load_samples(samples) == samples
    assert [sample.kind for sample in samples] == ["colour", "shape", "colour"]


# ---- choice --------------------------------------------------------------------------------------------------------------------------


def origins(count, **options):
    return [sample.origin for sample in load_samples([{"image": RED, "question": f"q{i}"} for i in range(count)], **options)]


def test_choice_is_seeded_nested_and_in_source_order():
    everything = origins(50)
    chosen = origins(50, num_samples=10, seed=3)
    assert chosen == origins(50, num_samples=10, seed=3)
    assert chosen != origins(50, num_samples=10, seed=4)
    assert chosen != everything[:10]
    assert chosen == [origin for origin in everything if origin in chosen]
    assert set(origins(50, num_samples=5, seed=3)) < set(chosen)
    assert origins(3, num_samples=10) == origins(3)


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_choice_refuses(number):
    assert refusal([{"image": RED, "question": "q"}], num_samples=number).startswith(f"num_samples is {number!r}")


# ---- mistakes ------------------------------------------------------------------------------------------------------------------------

GOOD = {"image": "a.png", "question": "what ?", "answer": "red"}


def chat(*messages):
    return {"messages": list(messages)}


def user(*parts):
    return {"role": "user", "content": list(parts)}


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**GOOD, "img": "x"}, 'key "img" is unknown here; known are answer, id, image, kind, question'),
        ({"question": "what ?", "answer": "red"}, 'key "image" is missing; add it (null for'),
        ({"image": "a.png", "answer": "red"}, "no known format (keys: image, answer); give"),
        ({**GOOD, "answer": 3}, 'key "answer" is int; give text'),
        ({**GOOD, "question": " "}, 'key "question" is empty'),
        ({**GOOD, "kind": 3}, 'key "kind" is int'),
        ({**GOOD, "image": 3}, 'key "image" is int; give a path or a PIL image'),
        ({**GOOD, "image": "https://x.org/a.png"}, 'key "image" is a URL ("https://x.org/a.png"); pictures are read from disk only'),
        ({**GOOD, "image": "gone.png"}, 'key "image": no such picture: '),
        ({**GOOD, "image": "broken.png"}, 'key "image": unreadable picture '),
        ({**GOOD, "image": "."}, 'key "image": unreadable picture '),
        ({"image": "a.png", "conversations": LLAVA[1:]}, 'key "conversations" has 0 <image> placeholders for 1 pictures'),
        ({"conversations": LLAVA}, 'key "conversations" has 1 <image> placeholders for 0 pictures'),
        ({"image": "gone.png", "conversations": LLAVA}, 'key "image": no such picture: '),
        ({"image": ["a.png", "gone.png"], "conversations": [{"from": "human", "value": "<image><image>"}]}, 'key "image[1]": no such'),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "key \"conversations[0].from\" is 'bot'; give human, gpt or system"),
        ({"conversations": [{"from": "human"}]}, 'key "conversations[0].value" is missing'),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "message 0 has the role 'assistant' where \"user\" belongs"),
        ({"conversations": []}, 'key "conversations" is empty'),
        ({"messages": "hello"}, 'key "messages" is str; give a list'),
        (chat(), 'key "messages" is empty'),
        (chat("hello"), 'key "messages[0]" is str'),
        (chat({"role": "user"}), 'key "messages[0].content" is missing'),
        (chat({"role": "user", "content": "a", "name": "b"}), 'key "messages[0].name" is unknown'),
        (chat({"role": "human", "content": "a"}), "message 0 has the role 'human'"),
        (chat(user(TEXT), user(TEXT)), "message 1 has the role 'user' where \"assistant\" belongs"),
        (chat({"role": "system", "content": "a"}), "message 0 has the role 'system'"),
        (chat(user({"type": "video", "path": "a.mp4"})), "key \"messages[0].content[0].type\" is 'video'"),
        (chat(user(3)), 'key "messages[0].content[0]" is int'),
        (chat(user(TEXT, {"type": "image", "url": "a.png"})), 'key "messages[0].content[1].url" is a URL'),
        (chat(user(TEXT, {"type": "image", "path": "gone.png"})), 'key "messages[0].content[1].path": no such picture'),
        (chat(user({"type": "image"})), 'key "messages[0].content[0].image" is missing'),
        (chat(user({"type": "text", "content": "a"})), 'key "messages[0].content[0].content" is unknown'),
        ([1], "is list; give an object with keys"),
    ],
)
def test_mistakes_name_file_line_and_key(folder, record, expected):
    # The mistake is on line 3, after a good sample of the same format and an empty line: the number is the file's, not the sample's.
    layout = record if isinstance(record, dict) else {}
    good = {"messages": CHAT} if "messages" in layout else {"image": "a.png", "conversations": LLAVA} if "conversations" in layout else GOOD
    message = refusal(write_lines(folder, good, "", record))
    assert message.startswith("data.jsonl:3: ")
    assert expected in message


def test_mixed_formats_are_refused(folder):
    message = refusal(write_lines(folder, GOOD, {"messages": CHAT}))
    assert message == 'data.jsonl:2: is in the "messages" format, but data.jsonl:1 is in the "question" format; keep one format per source'
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
    seed = next(seed for seed in range(100) if "data.jsonl:21" not in [s.origin for s in _chosen(folder, records, seed)])
    assert len(load_samples(path, num_samples=3, seed=seed)) == 3
    assert "data.jsonl:21" in refusal(path)


def _chosen(folder, records, seed):
    return load_samples(write_lines(folder, *records, GOOD, name="data.jsonl.jsonl"), num_samples=3, seed=seed)


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


# ---- fingerprint ---------------------------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_text_picture_and_order(folder):
    def of(*records):
        return fingerprint(load_samples([{**record, "image": folder / record["image"]} for record in records]))

    other = {**GOOD, "question": "which ?"}
    assert of(GOOD) == of(dict(GOOD))
    assert len(of(GOOD)) == 64
    different = [of(GOOD), of(other), of(GOOD, other), of(other, GOOD), of({**GOOD, "image": "b.png"}), of({**GOOD, "answer": "re"})]
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


# ---- collate -------------------------------------------------------------------------------------------------------------------------


def labelled(batch, processor):
    return [processor.tokenizer.decode(row[row != -100]) for row in batch.labels]


def mixed_samples():
    return load_samples(
        [
            {"image": RED, "question": "what colour is this ?", "answer": "red"},
            {"image": None, "question": "which letter ?", "answer": "A"},
            {"image": RED, "question": "what shape is in the picture ?", "answer": "the red square"},
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
    assert (batch.inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [IMAGE_TOKENS, 0, IMAGE_TOKENS, IMAGE_TOKENS]
    mask = batch.inputs["attention_mask"]
    assert (mask[:, 1:] <= mask[:, :-1]).all()
    assert mask.sum(1).unique().numel() > 1
    assert (batch.inputs["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1] * 4
    assert batch.origins == ("dataset[0]", "dataset[1]", "dataset[2]", "dataset[3]")
    text = processor.tokenizer.decode(batch.inputs["input_ids"][1][mask[1].bool()])
    assert text == "<s> USER : which letter ? ASSISTANT : A </s>"
    assert processor.tokenizer.decode(batch.inputs["input_ids"][3][mask[3].bool()]).endswith("what ? ASSISTANT :")


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
        {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what colour ?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "which shape ?"},
        {"role": "assistant", "content": "square"},
    ]
    assert labelled(collate(load_samples([{"messages": chat}]), processor), processor) == ["square </s>"]


TURNS = "{% for m in messages %}{{ m['role'] + ' : ' }}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}"


@pytest.mark.parametrize(
    ("template", "ending"),
    [
        (TURNS + "{% endfor %}{{ ' </s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}", "red </s>"),
        (TURNS + "{% endfor %}{{ ' .\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}", "red ."),
        # The prompt ends in a word that the conversation with the answer does not have.
        (TURNS + "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : here' }}{% endif %}", "red </s>"),
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
    assert torch.equal(collate(mixed_samples(), own).inputs["input_ids"], collate(mixed_samples(), processor).inputs["input_ids"])


def changed(**attributes):
    processor = tiny_processor()
    for name, value in attributes.items():
        setattr(processor, name, value)
    return processor


def test_collate_refuses():
    samples = mixed_samples()[:1]
    with pytest.raises(ValueError, match=r"^LlavaProcessor has no chat template; set processor.chat_template"):
        collate(samples, changed(chat_template=None))
    with pytest.raises(ValueError, match=r"^dataset\[0\]: the chat template does not show the answer 'red'"):
        collate(samples, changed(chat_template="USER: <image> what"))
    with pytest.raises(ValueError, match=r"^dataset\[0\]: the processor's chat template fails on this sample \(.*no system"):
        collate(samples, changed(chat_template="{{ raise_exception('no system') }}"))
    with pytest.raises(ValueError, match=r"^dataset\[0\]: LlavaProcessor refuses this batch \(The total number of <image>"):
        collate(samples, changed(chat_template="{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"))
    with pytest.raises(ValueError, match=r"^dict is no chat processor"):
        collate(samples, {})
    with pytest.raises(ValueError, match=r"got no samples"):
        collate([], tiny_processor())
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad_token; set processor.tokenizer.pad_token"):
        collate(samples, processor)


def test_placeholder_in_the_users_text(processor):
    (sample,) = load_samples([{"image": RED, "question": "what is an <image> ?", "answer": "red"}])
    with pytest.raises(ValueError, match=r"^dataset\[0\]: 2 <image> placeholders in the rendered text for 1 pictures; remove"):
        collate([sample], processor)


def test_check_image_tokens():
    ids = torch.tensor([1, 4, 4, 7, 4, 4])
    assert check_image_tokens(ids, 4, 2, 2, "here") == 4
    assert check_image_tokens(ids, 4, None, 2, "here") == 4
    assert check_image_tokens(ids, 9, 2, 0, "here") == 0
    for expected, images, token in ((3, 2, 4), (2, 1, 4), (None, 1, 9), (2, 0, 4)):
        with pytest.raises(ValueError, match=r"^here: \d picture tokens for \d pictures, .* expected; the processor does not fit"):
            check_image_tokens(ids, token, expected, images, "here")


def test_unequal_expansion_is_found(monkeypatch):
    processor = tiny_processor()
    lengths = iter([16, 12])
    monkeypatch.setattr(type(processor), "replace_image_token", lambda *_args, **_options: "<image>" * next(lengths))
    samples = load_samples([{"image": RED, "question": "what ?", "answer": "red"}] * 2)
    with pytest.raises(ValueError, match=r"^dataset\[1\]: 12 picture tokens for 1 pictures, 16 expected"):
        collate(samples, processor)


def test_batches_cover_all_in_order(processor):
    samples = load_samples(tiny_messages(5))
    made = list(batches(samples, processor, 2))
    assert [len(batch.origins) for batch in made] == [2, 2, 1]
    assert sum((batch.origins for batch in made), ()) == tuple(sample.origin for sample in samples)
    assert isinstance(made[0].to("cpu"), Batch)
    assert made[0].to("meta").labels.device.type == "meta"
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        list(batches(samples, processor, 0))


def test_import_stays_light():
    code = (
        "import sys, qvlm_hf.calibration.samples; "
        "found = {'transformers', 'huggingface_hub', 'optimum', 'datasets'} & set(sys.modules); sys.exit(repr(found) if found else 0)"
    )
    package = Path(sys.modules["qvlm_hf.calibration.samples"].__file__).parents[3]
    if "transformers" in (package / "qvlm_hf" / "__init__.py").read_text():
        pytest.skip("the package's own __init__ registers with Transformers; import-linter checks this file")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=package)
