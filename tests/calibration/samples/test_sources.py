"""Sources: files, folders, Hub ids and objects; what is chosen of them, and what they refuse."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sample_rows import GOOD, RED, TEXT_PART, chat, refusal, sample_folder, user, write_lines
from sample_rows import user_parts as parts

from qvlm_hf.calibration.samples import dataset_name, hold_out, load_samples

folder = sample_folder


def questions(count, **options):
    """The origins of what is chosen of a list."""
    rows = [{"image": RED, "question": f"q{i}"} for i in range(count)]
    return [sample.origin for sample in load_samples(rows, **options)]


# ---- files ---------------------------------------------------------------------------------------


def test_json_list_counts_lines(folder):
    path = folder / "data.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=1), encoding="utf-8")
    assert [sample.origin for sample in load_samples(path)] == ["data.json:2", "data.json:7"]


def test_jsonl_skips_empty_lines_and_reads_unicode(folder):
    record = {**GOOD, "question": "what\u2028colour ?", "answer": "röt"}
    path = folder / "data.jsonl"
    path.write_text("\ufeff\n" + json.dumps(record, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (sample,) = load_samples(str(path))
    assert (sample.origin, sample.answer) == ("data.jsonl:2", "röt")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_numbers_of_python_and_endings_of_windows_are_read(tmp_path, name):
    rows = [
        '{"image": null, "question": "a", "x": NaN}',
        '{"image": null, "question": "b", "x": -Infinity, "x": -Infinity}',
    ]
    text = "\r\n\r\n".join(rows) if name == "data.jsonl" else "[" + ",\r\n\r\n".join(rows) + "]\r\n"
    (tmp_path / name).write_bytes(("\ufeff" + text + "\r\n").encode())
    found = [(sample.origin, parts(sample)[0][1]) for sample in load_samples(tmp_path / name)]
    assert found == [(f"{name}:1", "a"), (f"{name}:3", "b")]


ROW = '{"image": null, "question": "a"}'
DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("data.jsonl", '{"image": 1}\n{"image": ', "data.jsonl:2: not valid JSON at column"),
        ("data.json", '[{"a": 1},\n {"a": }]', "data.json:2: not valid JSON at column 8"),
        ("data.json", f"[{ROW}\n", "data.json:2: not valid JSON"),
        ("data.json", '{"a": 1}', "data.json: holds no list"),
        ("data.json", " [ ]", "data.json has no samples"),
        ("data.json", f"[{ROW}]\n\n[{ROW}]", "data.json:3: more follows after the list's end; put"),
        ("data.jsonl", "\n\n", "data.jsonl has no samples"),
        ("data.csv", "a,b", 'ends in ".csv"; give a .jsonl file'),
        ("data.jsonl", b'{"question": "\xff"}', "is not UTF-8 text (byte 14)"),
        ("data.jsonl", ROW.encode("utf-16"), "is not UTF-8 text (byte 0); save it as UTF-8"),
        ("data.jsonl", ROW.encode("utf-16-le"), "is not UTF-8 text (a NUL at character 1); save"),
    ],
)
def test_unreadable_files(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (DEEP, "it is nested too deep"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "it is nested too deep"),
        ("9" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
        ('{"b": 1, "b": 2}', 'key "b" stands twice in one object'),
    ],
    ids=["lists", "objects", "digits", "twice"],
)
def test_json_that_cannot_be_used_is_named_with_its_line(tmp_path, name, value, reason):
    bad = f'{{"image": null, "question": "b", "extra": {value}}}'
    text = f"{ROW}\n{bad}\n" if name == "data.jsonl" else f"[{ROW},\n{bad}]\n"
    (tmp_path / name).write_text(text)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{name}:2: cannot be used as JSON ({reason}")
    assert message.endswith("; mend the file")


# ---- ScienceQA -----------------------------------------------------------------------------------


@pytest.fixture
def scienceqa(tmp_path):
    root = tmp_path / "ScienceQA"
    problem = {
        "question": "Which shape is red?",
        "choices": ["the square", "the circle"],
        "answer": 1,
        "hint": "Look at the picture.",
        "image": "image.png",
        "subject": "natural science",
        "grade": "grade6",
        "split": "train",
        "lecture": "L",
        "solution": "S",
    }
    textual = {**problem, "image": None, "hint": "", "answer": 0, "grade": "grade12"}
    problems = {"1": problem, "2": textual, "9": {**problem, "split": "val"}}
    for split, pid, colour in (("train", "1", "red"), ("val", "9", "blue")):
        place = root / "images" / split / pid
        place.mkdir(parents=True)
        Image.new("RGB", (5, 5), colour).save(place / "image.png")
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "minival": ["9"]}))
    return root


def test_scienceqa_folder(scienceqa):
    first, second = load_samples(scienceqa)
    assert first.messages[0]["content"][1]["text"] == (
        "Context: Look at the picture.\nQuestion: Which shape is red?\n"
        "Options: (A) the square (B) the circle\n"
        "Answer with the option's letter from the given choices directly."
    )
    found = (first.answer, first.kind, first.origin)
    assert found == ("B", "natural science", "ScienceQA/problems.json problem 1")
    columns = (first.columns, second.columns)
    assert columns == (("NAT", "TXT", "IMG", "G1-6"), ("NAT", "NO", "G7-12"))
    assert first.images()[0].getpixel((0, 0)) == (255, 0, 0)
    assert second.images() == []
    assert second.answer == "A"
    assert second.messages[0]["content"][0]["text"].startswith("Context: N/A\n")
    (validation,) = load_samples(f"{scienceqa}:minival")
    assert validation.images()[0].getpixel((0, 0)) == (0, 0, 255)


def test_scienceqa_mistakes(scienceqa):
    assert "choose one of train, minival" in refusal(f"{scienceqa}:test")
    (scienceqa / "images" / "train" / "1" / "image.png").unlink()
    assert 'ScienceQA/problems.json problem 1: key "image": no such picture' in refusal(scienceqa)
    (scienceqa / "pid_splits.json").write_text(json.dumps({"train": [], "test": ["1"]}))
    assert 'pid_splits.json: has nothing in split "train"; name another' in refusal(scienceqa)
    (scienceqa / "pid_splits.json").write_text(json.dumps({"train": ["3"]}))
    assert "ScienceQA/problems.json problem 3: no such problem" in refusal(scienceqa)
    problems = scienceqa / "problems.json"
    problems.write_text(f'{{"1": {DEEP}}}')
    expected = f"{problems}: cannot be used as JSON (it is nested too deep); mend the file"
    assert refusal(scienceqa) == expected
    problems.write_text("[]")
    assert refusal(scienceqa) == f"{problems}: holds list; ScienceQA has an object there"
    (scienceqa / "pid_splits.json").unlink()
    assert "pid_splits.json is missing" in refusal(scienceqa)


# ---- objects and Hub ids -------------------------------------------------------------------------


def test_datasets_dataset_reads_only_chosen_rows():
    datasets = pytest.importorskip("datasets")
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
    columns = {"image": [RED] * 6, "question": list("abcdef"), "answer": ["red", None] * 3}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    chosen = load_samples(dataset, num_samples=3, seed=1)
    origins = [sample.origin for sample in chosen]
    assert origins == sorted(origins)
    assert len(origins) == 3
    assert all(sample.images()[0].size == (8, 6) for sample in chosen)
    for sample in chosen:
        assert parts(sample)[1][1] == "abcdef"[int(sample.origin[8])]


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

    samples = load_samples(rows(), num_samples=2)
    assert [sample.origin for sample in samples] == ["dataset[0]", "dataset[1]"]
    assert taken == [0, 1]


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
        ([], "dataset has no samples"),
        ("", "dataset is empty; give a path, a Hub id, or a list of samples"),
        (3, "dataset is int; give a path"),
        ("gone.jsonl", "gone.jsonl: no such file or folder"),
        ("data/train.jsonl", "data/train.jsonl: no such file or folder"),
        (columns, "dataset is function; call it and give what it returns"),
        (Rows, "dataset is type; give an object of it"),
        (Rows(), "dataset is Rows; it has no length: give it __len__, or give a list of its"),
        (BrokenRows(), "dataset[0]: BrokenRows does not give it (KeyError: 0); give a list of"),
        (columns(), "keys image, question, which are columns; give its rows: datasets.Dataset."),
        (
            {"image": RED, "question": "a"},
            "dataset is a mapping with the keys image, question, a single sample; give a list of",
        ),
        (
            {"train": [], "test": []},
            'keys train, test; give a list of samples, or one split such as dataset["train"]',
        ),
        (np.zeros((2, 4, 4, 3)), "dataset[0]: is ndarray; give an object with keys"),
        (np.zeros(()), "dataset is ndarray without a length"),
        (torch.utils.data.TensorDataset(torch.zeros(3, 2)), "dataset[0]: is tuple; give an object"),
        (b"[]", "dataset is bytes; give a path"),
        (None, "dataset is NoneType; give a path"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_near_misses_say_what_to_give(source, expected):
    assert expected in refusal(source)


@pytest.mark.parametrize("form", ["file", "picture", "scienceqa", "split"])
def test_a_tilde_is_the_home_directory(folder, monkeypatch, form):
    monkeypatch.setenv("HOME", str(folder))
    write_lines(folder, GOOD)
    row = {"question": "q", "choices": ["a"], "answer": 0, "split": "train"}
    (folder / "problems.json").write_text(json.dumps({"1": row}))
    (folder / "pid_splits.json").write_text('{"train": ["1"]}')
    forms = {"file": "~/data.jsonl", "picture": [GOOD | {"image": "~/a.png"}]}
    source = forms | {"scienceqa": "~", "split": "~:train"}
    (sample,) = load_samples(source[form])
    assert len(sample.images()) == (form in ("file", "picture"))
    names = {"file": "data.jsonl", "scienceqa": folder.name, "split": f"{folder.name}:train"}
    assert dataset_name(source[form]) == names.get(form, "list in memory")


def test_folders_of_something_else_are_refused(tmp_path):
    assert "is no ScienceQA folder (problems.json is missing)" in refusal(tmp_path)


def test_tables_say_how_to_get_their_rows():
    names = ("datasets", "pandas", "pyarrow")
    datasets, pandas, arrow = (pytest.importorskip(name) for name in names)
    rows = {"image": [None, None], "question": ["a", "b"]}
    frame, table = pandas.DataFrame(rows), arrow.table(rows)
    remedy = "datasets.Dataset.from_pandas(dataset)"
    assert refusal(frame) == f"dataset is a pandas DataFrame; give its rows: {remedy}"
    assert refusal(frame["question"]) == f"dataset is a pandas Series; give its rows: {remedy}"
    assert refusal(table) == "dataset is a pyarrow Table; give its rows: dataset.to_pylist()"
    for given in (
        eval(remedy, {"datasets": datasets, "dataset": frame}),
        table.to_pylist(),
        datasets.Dataset.from_dict(rows),
    ):
        assert [parts(sample)[0][1] for sample in load_samples(given)] == ["a", "b"]
    both = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    assert refusal(both).endswith('one split such as dataset["train"]')
    # a stand-in: the package is not among the tests' own
    polars = type("DataFrame", (), {"__module__": "polars.dataframe.frame"})
    assert refusal(polars()) == "dataset is a polars DataFrame; give its rows: dataset.to_dicts()"


# ---- choice --------------------------------------------------------------------------------------


def test_choice_is_seeded_nested_and_in_source_order():
    everything, chosen = questions(50), questions(50, num_samples=10, seed=3)
    assert chosen == questions(50, num_samples=10, seed=3)
    assert chosen != questions(50, num_samples=10, seed=4)
    assert chosen != everything[:10]
    assert chosen == [origin for origin in everything if origin in chosen]
    assert set(questions(50, num_samples=5, seed=3)) < set(chosen)
    assert questions(3, num_samples=10) == questions(3)


NO_COUNTS = [None, "1", 1.0, np.float64(1), True, np.bool_(True), -1, np.ones(2, int)]


@pytest.mark.parametrize("bad", NO_COUNTS, ids=lambda bad: type(bad).__name__)
@pytest.mark.parametrize("option", ["num_samples", "seed"])
def test_counts_and_seeds_are_whole_numbers(option, bad):
    if option == "seed" or bad is not None:
        message = refusal([{"image": RED, "question": "q"}], **{option: bad})
        assert message.startswith(f"{option}=")
        assert "must be a whole number of at least" in message


def test_no_sample_is_too_few():
    assert refusal([GOOD], num_samples=0).startswith("num_samples=0 must be a whole number")


@pytest.mark.parametrize(
    "two",
    [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)],
    ids=lambda value: type(value).__name__,
)
def test_integers_of_any_library_are_integers(two):
    rows = [{"image": RED, "question": f"q{i}"} for i in range(9)]
    expected = load_samples(rows, num_samples=2, seed=2)
    assert load_samples(rows, num_samples=two, seed=two) == expected
    assert load_samples(iter(rows), num_samples=two) == load_samples(iter(rows), num_samples=2)


def test_only_chosen_pictures_are_looked_at(folder):
    path = write_lines(folder, *[GOOD] * 20, {**GOOD, "image": "gone.png"})
    whole = [GOOD | {"image": str(folder / "a.png")}] * 21
    seeds = range(100)
    seed = next(
        s
        for s in seeds
        if "dataset[20]" not in [f.origin for f in load_samples(whole, num_samples=3, seed=s)]
    )
    assert len(load_samples(path, num_samples=3, seed=seed)) == 3
    assert "data.jsonl:21" in refusal(path)


# ---- every kind of content in the draw -----------------------------------------------------------

PICTURE = {"type": "image", "image": RED}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
KINDS = {
    "picture": chat(user(PICTURE, TEXT_PART), TURNS[1]),
    "text": chat(*TURNS),
    "pictures": chat(user(PICTURE, PICTURE, TEXT_PART), TURNS[1]),
    "turns": chat(*TURNS, *TURNS),
}


def drawn(kinds, count, seed):
    samples = load_samples([KINDS[kind] for kind in kinds], num_samples=count, seed=seed)
    return {int(sample.origin[8:-1]) for sample in samples}


@pytest.mark.parametrize("rare", KINDS)
def test_a_draw_keeps_what_is_rare(rare):
    common = "text" if rare in ("picture", "turns") else "picture"
    kinds = [*[common] * 6, rare, *[common] * 3]
    for seed in range(12):
        chosen = drawn(kinds, 4, seed)
        assert len(chosen) == 4
        assert 6 in chosen, seed
        kept, rest = hold_out(load_samples([KINDS[kind] for kind in kinds]), 4, seed)
        assert {int(sample.origin[8:-1]) for sample in kept} == chosen
        assert len(rest) == 6


def test_a_draw_of_one_takes_a_picture_and_of_four_all_kinds():
    kinds = [*["text"] * 20, *KINDS, *["text"] * 20]
    for seed in range(12):
        assert drawn(kinds, 1, seed) <= {20, 22}
        assert drawn(kinds, 4, seed) >= {22, 23}
        assert drawn(kinds, 5, seed) < drawn(kinds, 9, seed)


def test_a_draw_that_had_every_kind_anyway_is_as_before():
    for seed in range(12):
        order = list(range(40))
        random.Random(seed).shuffle(order)
        if len({index % 2 for index in order[:10]}) == 2:
            assert drawn(["picture", "text"] * 20, 10, seed) == set(order[:10])


@pytest.mark.parametrize("picture", [6, None])
def test_rows_are_read_until_one_has_a_picture(picture):
    read = []

    class Recording(Rows):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            read.append(index)
            return {"image": RED if index == (picture or index) else None, "question": "q"}

    for seed in range(12):
        read.clear()
        chosen = [sample.origin for sample in load_samples(Recording(), num_samples=4, seed=seed)]
        assert len(chosen) == 4
        assert len(set(read)) == len(read)
        if picture:
            assert f"dataset[{picture}]" in chosen
            assert read[-1] == picture or len(read) == 4
        else:
            assert len(read) == 4  # reading a row decodes its picture
