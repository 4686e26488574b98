"""Measurements are kept in the report and told by the card; the recorded command gives the same
result again.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from tiny_models import save_tiny, tiny_messages

from qvlm_hf import publish_folder
from qvlm_hf.cli import main
from qvlm_hf.cli.record import benchmark_entry
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.record import check_recordable, record_measurement
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, its quantized form and questions, in the working directory."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    save_tiny(tmp_path / "model")
    lines = []
    for index, record in enumerate(tiny_messages(6, seed=3)):
        part = record["messages"][0]["content"][0]
        part.pop("image").save(tmp_path / f"{index}.png")
        lines.append(json.dumps(record | {"messages": [{"role": "user", "content": [{"type": "image", "path": f"{index}.png"},
            *record["messages"][0]["content"][1:]]}, record["messages"][1]]}))  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    assert main(["quantize", "model", "--scheme", "W4A16", "--output", "packed"]) == 0
    yield tmp_path
    torch.set_num_threads(threads)


def entry(folder: Path, section: str) -> dict:
    return json.loads((folder / "packed" / REPORT_NAME).read_text())[section]


def test_an_evaluation_is_kept_and_repeats(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert entry(folder, "evaluation") is None
    full = [
        "evaluate",
        f"{folder}/packed",
        "--dataset",
        f"{folder}/questions.jsonl",
        "--against",
        f"{folder}/model",
        "--num-samples",
        "5",
    ]
    assert main([*full, "--seed", "3", "--record"]) == 0
    assert "recorded in qvlm_report.json and README.md" in capsys.readouterr().out
    found = entry(folder, "evaluation")
    assert found["command"] == (
        "qvlm evaluate packed --dataset questions.jsonl --against model --num-samples 5 "
        "--batch-size 16 --seed 3 --record"
    )
    assert (found["dataset"], found["questions"], found["seed"], found["reference"]) == (
        "questions.jsonl",
        5,
        3,
        "model",
    )
    assert len(found["sha256"]) == 64
    assert found["accuracy"]["total"] == found["comparison"]["reference_accuracy"]["total"] == 5
    assert found["comparison"]["answer_kl_nats"] > 0
    assert {"python", "qvlm_hf", "torch", "transformers"} <= set(found["versions"])
    text = (folder / "packed" / CARD_NAME).read_text()
    assert "| `model` in full precision |" in text
    assert f"SHA-256 `{found['sha256']}`" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_value, result.dataset_name) == (
        round(100 * found["accuracy"]["value"], 2),
        "questions.jsonl",
    )
    for file in (CARD_NAME, REPORT_NAME):
        assert str(folder) not in (folder / "packed" / file).read_text()
    assert main(shlex.split(found["command"])[1:]) == 0
    assert entry(folder, "evaluation") == found
    assert not list((folder / "packed").glob(".*"))
    # the model itself is as it was
    assert main(["inspect", "packed"]) == 0


def test_an_evaluation_alone_says_so(folder: Path) -> None:
    assert main(["evaluate", "packed", "--dataset", "questions.jsonl", "--record"]) == 0
    found = entry(folder, "evaluation")
    assert found["reference"] is None
    assert found["comparison"] is None
    assert (
        "Full precision was not measured beside it." in (folder / "packed" / CARD_NAME).read_text()
    )


def test_a_benchmark_is_kept_beside_the_evaluation(folder: Path) -> None:
    assert main(["evaluate", "packed", "--dataset", "questions.jsonl", "--record"]) == 0
    arguments = [
        "bench",
        f"{folder}/packed",
        "--against",
        f"{folder}/model",
        "--rounds",
        "2",
        "--new-tokens",
        "2",
    ]
    assert main([*arguments, "--record"]) == 0
    found = entry(folder, "benchmark")
    assert (
        found["command"] == "qvlm bench packed --against model --new-tokens 2 --rounds 2 --record"
    )
    assert {row["way"] for row in found["rows"]} >= {"bfloat16", "qvlm_hf W4A16"}
    assert entry(folder, "evaluation") is not None
    text = (folder / "packed" / CARD_NAME).read_text()
    quantized = next(row for row in found["rows"] if row["way"] == "qvlm_hf W4A16")
    assert f"| qvlm_hf W4A16 ({quantized['kernel']})" in text
    assert (
        f"{quantized['first_token']['speedup']:.2f} (spread "
        f"{100 * quantized['first_token']['spread']:.0f} %)" in text
    )
    assert str(folder) not in (folder / "packed" / REPORT_NAME).read_text()
    assert "Not measured. This times it" not in text


def test_paths_in_errors_are_not_kept() -> None:
    rows = [
        {"way": "a", "error": "OSError: /home/me/x.so: cannot open"},
        {"way": "b", "error": None},
        {"way": "c", "error": "not installed"},
    ]
    assert [row["error"] for row in benchmark_entry({"rows": rows}, command="x")["rows"]] == [
        "OSError",
        None,
        "not installed",
    ]


def test_a_report_that_was_not_kept_is_begun(folder: Path) -> None:
    (folder / "packed" / REPORT_NAME).unlink()
    record_measurement(folder / "packed", benchmark=None, evaluation=None)
    assert set(SavedModel(folder / "packed").report.modules) == set(
        json.loads((folder / "packed" / "config.json").read_text())["quantization_config"][
            "modules"
        ]
    )


def test_a_published_directory_keeps_its_name_on_the_hub(folder: Path, hub: FakeHub) -> None:
    card = folder / "packed" / CARD_NAME
    assert 'from_pretrained("packed")' in card.read_text()
    publish_folder("packed", "me/tiny-w4a16")
    published = card.read_text()
    record_measurement(folder / "packed")
    assert card.read_text() == published
    assert 'from_pretrained("me/tiny-w4a16")' in published
    publish_folder("packed", "me/elsewhere")
    assert 'from_pretrained("me/elsewhere")' in card.read_text()


@pytest.mark.parametrize("name", ["me/nowhere", "./nowhere"])
def test_a_missing_full_precision_model_is_named_before_measuring(
    folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture, name: str
) -> None:
    assert main(["bench", "packed", "--against", name, "--record"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"qvlm: error: --against {name}: is no model's directory and no Hub id that can be read ("
    )
    assert captured.err.endswith("): check the name.\n")
    assert not captured.out
    assert entry(folder, "benchmark") is None


def test_a_damaged_report_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "packed" / REPORT_NAME).write_text("{")
    for words in ("inspect packed", "evaluate packed --dataset questions.jsonl --record"):
        assert main(words.split()) == 1
        assert capsys.readouterr().err.startswith(f"qvlm: error: {REPORT_NAME}: is no JSON (")


def test_it_is_refused_before_measuring(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match="--record: me/model is no local directory: download the model first"
    ):
        check_recordable("me/model")
    shutil.rmtree(folder / "packed" / "nothing", ignore_errors=True)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match="--record: packed may not be written"):
        check_recordable("packed")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["evaluate", "model", "--dataset", "questions.jsonl", "--record"]) == 1
    assert "model: is not quantized by qvlm_hf" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--shape", "llava-1.5-7b", "--record"])
    assert "--record belongs to DIR" in capsys.readouterr().err
