"""`qvlm ablate`: cells, files, going on, and what is refused before anything is measured."""

import csv
import json
import multiprocessing
import os
import signal
import threading
import time
from itertools import pairwise

import pytest
from tiny_models import save_tiny, tiny_messages

from qvlm_hf.cli import ablate, main
from qvlm_hf.hf.config import QVLMConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    save_tiny(folder / "model")
    for name, seed in (("calibration", 3), ("questions", 4)):
        records = tiny_messages(8, seed=seed)
        for index, record in enumerate(records):
            part = record["messages"][0]["content"][0]
            part.pop("image").save(folder / f"{name}{index}.png")
            part["path"] = f"{name}{index}.png"
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "text.txt").write_text("what red the blue square is circle green " * 20)
    return folder


def run(folder, output, *words, model=None):
    given = ["ablate", model or folder / "model", "--dataset", folder / "calibration.jsonl"]
    given += ["--questions", folder / "questions.jsonl", "--output", output]
    return main([*map(str, given), *words])


def test_cells_are_measured_apart_and_a_second_run_goes_on(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out"
    words = ["--schemes", "W4A4", "--num-samples", "4", "--text", str(folder / "text.txt")]
    assert run(folder, out, *words, "--lines", "RTN", "greedy", "--seeds", "2") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "ablation.csv", "ablation.json", "ablation.md", "ablation.png",
    ]  # fmt: skip
    rows = list(csv.DictReader((out / "ablation.csv").open()))
    assert [(r["line"], r["seed"]) for r in rows] == [
        ("RTN", "0"),
        ("greedy", "0"),
        ("greedy", "1"),
    ]
    for row in rows:
        assert float(row["answer_kl"]) > 0
        assert float(row["peak_mib"]) > 50
        assert float(row["full_perplexity"]) > 1
        assert not row["error"]
    assert rows[1]["answer_kl"] != rows[2]["answer_kl"]  # of another seed
    table = (out / "ablation.md").read_text()
    assert "## W4A4" in table
    assert "| greedy | 2 |" in table
    assert (out / "ablation.png").read_bytes()[:4] == b"\x89PNG"

    asked = []

    def measure(cell, threads):
        asked.append((cell["line"], cell["seed"]))
        return {"error": "as told"}

    monkeypatch.setattr(ablate, "_in_a_process", measure)
    assert run(folder, out, *words, "--lines", "RTN", "greedy", "auto", "--seeds", "2") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 cells measured, 2 failed: ")
    assert asked == [("auto", 0), ("auto", 1)]  # the others are there
    assert "| auto (as told) | 0 |" in (out / "ablation.md").read_text()
    assert run(folder, out, *words, "--lines", "auto", "auto", "--seeds", "1") == 1
    assert asked[2:] == [("auto", 0)]  # what failed is tried again


def test_another_setting_and_strangers_files_are_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "_in_a_process", lambda cell, threads: {"accuracy": 1.0})
    words = ["--schemes", "W4A4", "--lines", "RTN"]
    assert run(folder, tmp_path / "out", *words) == 0
    before = (tmp_path / "out" / "ablation.json").read_bytes()
    assert run(folder, tmp_path / "out", *words, "--num-samples", "5") == 1
    assert "holds an ablation with another num_samples" in capsys.readouterr().err
    assert (tmp_path / "out" / "ablation.json").read_bytes() == before
    other = save_tiny(tmp_path / "model", seed=1)  # of the same name
    assert run(folder, tmp_path / "out", *words, model=other) == 1
    assert "holds an ablation with another weights" in capsys.readouterr().err
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "ablation.md").write_text("mine")
    assert run(folder, tmp_path / "theirs", *words) == 1
    assert "ablation.md is not of an ablation" in capsys.readouterr().err
    assert (tmp_path / "theirs" / "ablation.md").read_text() == "mine"
    assert run(folder, tmp_path / "other", "--schemes", "W9A9") == 1
    quantized = save_tiny(tmp_path / "quantized")
    content = json.loads((quantized / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "qvlm"}
    (quantized / "config.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert run(folder, tmp_path / "other", model=quantized) == 1
    assert "quantized: is quantized already: give the full-pre" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
        (["--seeds", "0"], "--seeds 0 is below 1"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--questions", "{}/asked.jsonl"], "asked.jsonl:1: has no answer to compare with"),
    ],
)
def test_what_would_fail_every_cell_is_refused_at_once(folder, tmp_path, capsys, words, why):
    asked = {"image": str(folder / "questions0.png"), "question": "what ?"}
    (folder / "asked.jsonl").write_text(json.dumps(asked))
    assert run(folder, tmp_path / "out", *(word.format(folder) for word in words)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert not (tmp_path / "out").exists()


def test_a_cell_that_fails_says_why(folder):
    cell = {"model": str(folder / "nowhere"), "scheme": "W4A4", "line": "RTN", "seed": 0}
    (why,) = ablate._in_a_process(cell, 1).values()
    assert "nowhere" in why


def test_ctrl_c_ends_the_cell_in_one_line(folder, tmp_path, capfd):
    def interrupt():
        while not multiprocessing.active_children():
            time.sleep(0.1)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        assert run(folder, tmp_path / "out", "--schemes", "W4A4", "--lines", "paper") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    told = capfd.readouterr().err
    assert told.endswith("qvlm: interrupted\n")
    assert "Traceback" not in told
    assert not multiprocessing.active_children()


def test_one_dataset_is_split(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "_in_a_process", ablate._measure)
    monkeypatch.setattr(ablate, "silence", lambda: None)
    out = tmp_path / "out"
    given = [folder / "model", "--dataset", folder / "calibration.jsonl", "--output", out]
    words = ["--schemes", "W4A4", "--num-samples", "4", "--lines", "greedy", "--seeds", "1"]
    assert main(["ablate", *map(str, given), *words]) == 0
    (row,) = json.loads((out / "ablation.json").read_text())["rows"]
    assert row["answer_kl"] > 0
    apart = {"dataset": folder / "calibration.jsonl", "questions": None, "num_questions": None}
    samples, questions = ablate._samples(apart)
    assert len(questions) == (len(samples) + len(questions)) // 4
    assert not {one.origin for one in samples} & {one.origin for one in questions}
    assert main(["ablate", *map(str, given), *words, "--num-questions", "999"]) == 1
    assert "of which 999 cannot judge: give other ones as --questions" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["W4A4", "W4A16"])
@pytest.mark.parametrize("line", ablate.LINES)
def test_every_line_is_a_configuration(scheme, line):
    cell = {"scheme": scheme, "line": line, "dataset": "x.jsonl", "num_samples": 4}
    config = QVLMConfig(scheme=scheme, **ablate._fields(cell, None))
    assert (config.recipe == "auto") == (line == "auto")
    assert (config.dataset is None) == (line == "RTN")


def test_a_line_with_a_plus_adds_to_the_one_above():
    lines = list(ablate.LINES.items())
    for (_, above), (name, fields) in pairwise(lines):
        if name.startswith("+"):
            changed = {key for key in fields if fields[key] != above.get(key)}
            assert len(changed) == 1, name
