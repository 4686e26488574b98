"""Measurements are kept in the report and told by the card; the recorded command gives the same
result again.
"""

import json
import shlex
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import save_tiny, save_tiny_samples

from qvlm_hf import publish_folder
from qvlm_hf.cli import main
from qvlm_hf.cli.results import benchmark_entry
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.measurements import check_recordable, record_measurement
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel

EVALUATE = "evaluate packed --dataset samples.jsonl --record"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its quantized form and questions."""
    path = tmp_path_factory.mktemp("made")
    save_tiny(path / "model")
    save_tiny_samples(path, 6)
    words = ["quantize", str(path / "model"), "--scheme", "W4A16", "--output", str(path / "packed")]
    assert main(words) == 0
    return path


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of them, and the working directory."""
    threads = torch.get_num_threads()
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    yield tmp_path / "made"
    torch.set_num_threads(threads)


def entry(folder, section):
    return json.loads((folder / "packed" / REPORT_NAME).read_text())[section]


def card(folder):
    return (folder / "packed" / CARD_NAME).read_text()


def test_an_evaluation_is_kept_and_repeats(folder, capsys):
    assert entry(folder, "evaluation") is None
    words = f"evaluate {folder}/packed --dataset {folder}/samples.jsonl --against {folder}/model "
    assert main([*words.split(), "--num-samples=5", "--seed=3", "--record"]) == 0
    assert "recorded in qvlm_report.json and README.md" in capsys.readouterr().out
    found = entry(folder, "evaluation")
    assert found["command"] == (
        "qvlm evaluate packed --dataset samples.jsonl --against model --num-samples 5 "
        "--batch-size 16 --seed 3 --record"
    )
    told = {"dataset": "samples.jsonl", "questions": 5, "seed": 3, "reference": "model"}
    assert told.items() <= found.items()
    assert len(found["sha256"]) == 64
    assert found["accuracy"]["total"] == found["comparison"]["reference_accuracy"]["total"] == 5
    assert found["comparison"]["answer_kl_nats"] > 0
    assert {"python", "qvlm_hf", "torch", "transformers"} <= set(found["versions"])
    assert "| `model` in full precision |" in card(folder)
    assert f"SHA-256 `{found['sha256']}`" in card(folder)
    (result,) = ModelCard(card(folder)).data.eval_results
    accuracy = round(100 * found["accuracy"]["value"], 2)
    assert (result.metric_value, result.dataset_name) == (accuracy, "samples.jsonl")
    for file in (CARD_NAME, REPORT_NAME):
        assert str(folder) not in (folder / "packed" / file).read_text()
    assert main(shlex.split(found["command"])[1:]) == 0
    assert entry(folder, "evaluation") == found
    assert not list((folder / "packed").glob(".*"))
    assert main(["inspect", "packed"]) == 0  # the model itself is as it was


def test_text_and_a_quantized_model_to_compare_with_are_kept(folder, capsys):
    (folder / "text.txt").write_text("what red the blue square is circle green " * 20)
    shutil.copytree(folder / "packed", folder / "other")
    words = f"evaluate packed --dataset samples.jsonl --text {folder}/text.txt --against other"
    assert main([*words.split(), "--record"]) == 0
    said, found = capsys.readouterr().out, entry(folder, "evaluation")
    assert "KL(other || packed) 0 nats per answer token" in said
    assert "KL(other || packed) 0 nats per token of text" in said
    assert "full precision" not in said
    assert "--dataset samples.jsonl --text text.txt --against other" in found["command"]
    text = found["text"]
    assert (found["reference"], found["reference_quantized"]) == ("other", True)
    assert (text["file"], text["kl"]) == ("text.txt", 0)
    assert text["perplexity"] == text["reference_perplexity"] > 1
    told, figure = " ".join(card(folder).split()), f"{text['perplexity']:.2f}"
    assert f"| `other` | {100 * found['accuracy']['value']:.1f} % |" in told
    assert "Difference from `other` +0.0 points" in told
    assert (
        f"On {text['tokens']} tokens of `text.txt`, without pictures: perplexity {figure}, "
        f"{figure} in `other`, KL divergence 0.0000 nats per token." in told
    )
    assert main(shlex.split(found["command"])[1:]) == 0
    assert entry(folder, "evaluation") == found


def test_a_benchmark_is_kept_beside_the_evaluation(folder):
    assert main(EVALUATE.split()) == 0
    evaluation = entry(folder, "evaluation")
    assert evaluation["reference"] is evaluation["comparison"] is None
    assert "Full precision was not measured beside it." in card(folder)
    words = f"bench {folder}/packed --against {folder}/model --rounds 2 --new-tokens 2 --record"
    assert main(words.split()) == 0
    found = entry(folder, "benchmark")
    said = "qvlm bench packed --against model --new-tokens 2 --rounds 2 --record"
    assert found["command"] == said
    assert entry(folder, "evaluation") == evaluation
    rows = {row["way"]: row for row in found["rows"]}
    assert rows.keys() >= {"bfloat16", "qvlm_hf W4A16"}
    row, text = rows["qvlm_hf W4A16"], card(folder)
    first, spread = row["first_token"]["speedup"], 100 * row["first_token"]["spread"]
    assert f"| qvlm_hf W4A16 ({row['kernel']}) | 1 | {first:.2f} (spread {spread:.0f} %)" in text
    assert str(folder) not in (folder / "packed" / REPORT_NAME).read_text()
    assert "Not measured. This times it" not in text


def test_paths_in_errors_are_not_kept():
    errors = ["OSError: /home/me/x.so: cannot open", None, "not installed"]
    kept = benchmark_entry({"rows": [{"error": error} for error in errors]}, command="x")["rows"]
    assert [row["error"] for row in kept] == ["OSError", None, "not installed"]


def test_a_report_that_was_not_kept_is_begun(folder):
    (folder / "packed" / REPORT_NAME).unlink()
    record_measurement(folder / "packed")
    config = json.loads((folder / "packed" / "config.json").read_text())
    modules = SavedModel(folder / "packed").report.modules
    assert modules.keys() == config["quantization_config"]["modules"].keys()


def test_a_published_directory_keeps_its_name_on_the_hub(folder, hub):
    assert 'from_pretrained("packed")' in card(folder)
    publish_folder("packed", "me/tiny-w4a16")
    published = card(folder)
    record_measurement(folder / "packed")
    assert card(folder) == published
    assert 'from_pretrained("me/tiny-w4a16")' in published
    publish_folder("packed", "me/elsewhere")
    assert 'from_pretrained("me/elsewhere")' in card(folder)


NO_MODEL = "is no model's directory and no Hub id that can be read ("


@pytest.mark.parametrize(
    ("damaged", "words", "message"),
    [
        (False, "bench packed --against me/nowhere --record", f"--against me/nowhere: {NO_MODEL}"),
        (False, "bench packed --against ./nowhere --record", f"--against ./nowhere: {NO_MODEL}"),
        (False, EVALUATE.replace("packed", "model"), "model: is not quantized by qvlm_hf"),
        (False, EVALUATE.replace("packed", "me/x"), "--record: me/x is no local directory: downl"),
        (True, EVALUATE, f"{REPORT_NAME}: is no JSON ("),
        (True, "inspect packed", f"{REPORT_NAME}: is no JSON ("),
    ],
)
def test_it_is_refused_before_measuring(folder, hub, capsys, damaged, words, message):
    if damaged:
        (folder / "packed" / REPORT_NAME).write_text("{")
    assert main(words.split()) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"qvlm: error: {message}")
    assert captured.err.count("\n") == 1
    assert "inspect" in words or not captured.out
    assert damaged or entry(folder, "evaluation") is entry(folder, "benchmark") is None


def test_a_directory_that_may_not_be_written_and_a_shape_keep_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match="--record: packed may not be written"):
        check_recordable("packed")
    with pytest.raises(SystemExit):
        main(["bench", "--shape", "llava-1.5-7b", "--record"])
    assert "--record belongs to DIR" in capsys.readouterr().err
