"""Several processes calibrate one model as one process does."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import together
from several_processes import run_together
from tiny_models import save_tiny, save_tiny_samples
from transformers import AutoModelForImageTextToText

from qvlm_hf.calibration.process import ranks

OPTIONS = {"batch_size": 1, "max_block_depth": 2, "percentiles": (1.0,), "margins": ()}


def dealt(monkeypatch, pictured, processes):
    monkeypatch.setattr(ranks, "world_size", lambda: processes)
    found = []
    for number in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        found.append(ranks.shard_batches(pictured))
    return found


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
@pytest.mark.parametrize(("pictures", "texts"), [(10, 2), (11, 2), (17, 0), (0, 12), (13, 4)])
def test_batches_are_dealt_in_pairs(monkeypatch, processes, pictures, texts):
    pictured = [True] * pictures + [False] * texts
    shares = dealt(monkeypatch, pictured, processes)
    assert sorted(place for share in shares for place in share) == list(range(len(pictured)))
    screening = []
    for share in shares:
        for count in (len(share), sum(pictured[place] for place in share)):  # all, with pictures
            assert [place % 2 for place in share[:count]] == [i % 2 for i in range(count)]
        assert not pictures or sum(pictured[place] for place in share) >= 2
        assert len(share) >= 2
        screening.append(sum(place // 2 % ranks.SCREENED == 0 for place in share[1::2]))
    assert max(screening) - min(screening) <= 1
    lengths = [len(share[::2]) for share in shares]  # in pairs
    assert max(lengths) - min(lengths) <= 1


def test_too_few_batches_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    said = "3 processes need 6 batches with pictures, and there are 5: start fewer processes, or x."
    with pytest.raises(ValueError, match=said):
        ranks.shard_batches([True] * 5 + [False] * 4, ", or x")
    with pytest.raises(ValueError, match="3 processes need 6 batches, and there are 5"):
        ranks.shard_batches([False] * 5)


def test_what_processes_exchange(tmp_path):
    first, second = run_together(2, tmp_path, together.exchange)
    assert first.pop("number") == 0
    assert second.pop("number") == 1
    assert (
        first["sum"] == (together.VALUES[0].double() + together.VALUES[1].double()).float().tolist()
    )
    assert first["largest"] == [2.0, 5.0]
    assert first["smallest"] == [1.0, -1.0]
    assert first["numbers"] == (7, 0.75)
    assert isinstance(first["numbers"][0], int)
    assert first["gathered"] == [[[0, 0, 0]], [[1], [1], [1]]]
    assert first["rows"] == list(range(7))
    assert first["first"] == [0.0]
    assert first["told"] == "first, ä"
    assert first["apart"] == (1, [3.0])
    assert first.pop("seen") == [0, 1, 15]
    assert second.pop("seen") == [3, 7]
    assert first == second


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (together.fail_in_second, ["OtherProcessError: no second", "ValueError: no second"]),
        pytest.param(
            together.fail_in_first_later,
            ["KeyError: 'late'", "OtherProcessError: KeyError('late')"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            together.differ,
            ["RuntimeError: the processes took different ways"] * 2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            together.other_samples,
            ["OtherProcessError: process 1", "ValueError: process 1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_of_one_process_ends_the_others(work, said, tmp_path):
    start = time.monotonic()
    found = run_together(2, tmp_path, work)
    assert all(text.startswith(own) for text, own in zip(found, said, strict=True)), found
    assert time.monotonic() - start < 600


def compare(alone, found, flips):
    """Every process has the same bytes; against one process few integers are others."""
    assert len({result["bytes"] for result in found}) == 1
    several = found[0]
    assert several["processes"] == len(found)
    assert alone["processes"] is None
    assert several["choices"] == alone["choices"]
    assert several["raised"] == alone["raised"]
    assert several["blocks"] == alone["blocks"]
    np.testing.assert_allclose(several["entropies"], alone["entropies"], rtol=1e-3)
    np.testing.assert_allclose(several["sensitivities"], alone["sensitivities"], rtol=1e-2)
    np.testing.assert_allclose(several["errors"], alone["errors"], rtol=2e-2)
    # of a few answer tokens, which a few integers move
    assert several["kl"] == pytest.approx(alone["kl"], rel=0.1)
    assert several["integers"].keys() == alone["integers"].keys()
    pairs = [(several["integers"][name], own) for name, own in alone["integers"].items()]
    assert sum(int((a != b).sum()) for a, b in pairs) <= flips * sum(b.size for _, b in pairs)
    for name, own in alone["scales"].items():
        np.testing.assert_allclose(several["scales"][name], own, rtol=0.02, err_msg=name)


def test_two_processes_decide_as_one_and_repeat_their_bytes(tmp_path):
    found = run_together(2, tmp_path, together.calibrated, OPTIONS)
    compare(together.calibrated(0, OPTIONS), found, 1e-3)
    again = run_together(2, tmp_path, together.calibrated, OPTIONS)
    assert again[0]["bytes"] == found[0]["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (4, {}),
        (3, {"count": 15, "activation_granularity": "channel", "max_block_depth": 3}),
        (2, {"optimize_vision": {"epochs": 1}, "precision_budget": 3.5}),
        (4, {"batch_size": 2, "count": 16, "written_text": True}),
        (2, {"recipe": "auto", "rotation": None}),
    ],
)
def test_more_processes_and_options(processes, options, tmp_path):
    options = {"batch_size": 1} | options
    found = run_together(processes, tmp_path, together.calibrated, options)
    compare(together.calibrated(0, options), found, 1e-2)
    again = run_together(processes, tmp_path, together.calibrated, options)
    assert again[0]["bytes"] == found[0]["bytes"]


@pytest.mark.slow
def test_what_the_first_process_kept_all_go_on_with(tmp_path):
    options = {"batch_size": 1, "max_block_depth": 1, "percentiles": (1.0,), "margins": ()}
    undisturbed = run_together(2, tmp_path, together.calibrated, options)
    options["resume_dir"] = tmp_path / "kept"
    assert run_together(2, tmp_path, together.stopped, options, 6) == [
        "OSError: stopped",
        "OtherProcessError: stopped",
    ]
    assert (tmp_path / "kept" / "block-0-1.json").exists()
    found = run_together(2, tmp_path, together.calibrated, options)
    assert {result["bytes"] for result in found} == {undisturbed[0]["bytes"]}
    (refused,) = run_together(1, tmp_path, together.calibrated, options)
    assert "was begun with processes 2 instead of 1" in refused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "mllama", "qwen2_vl"])
def test_other_families_and_samples_without_pictures(name, tmp_path):
    """Experts that only one process feeds, layers that text passes over, packed pictures."""
    options = {"num_samples": 14, "max_block_depth": 1}
    found = run_together(2, tmp_path, together.quantized_family, name, options)
    compare(together.quantized_family(0, name, options), found, 1e-2)


@pytest.fixture
def words(tmp_path):
    save_tiny(tmp_path / "model")
    save_tiny_samples(tmp_path, 6)
    data = ["--dataset", f"{tmp_path}/samples.jsonl", "--num-samples", "4"]
    options = ["--max-block-depth", "1", "--group-size", "32", "--recipe", "fixed", "--resume"]
    return ["quantize", f"{tmp_path}/model", *data, *options, "--output", f"{tmp_path}/out"]


def check_output(folder, said):
    assert said.count(f"34 modules quantized to W4A4; saved in {folder}/out") == 1
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["processes"] == 2
    assert not (folder / "out.resume").exists()
    assert AutoModelForImageTextToText.from_pretrained(folder / "out")


def test_the_first_process_alone_saves_and_speaks(words, tmp_path):
    words += ["--batch-size", "1"]
    first, second = run_together(2, tmp_path, together.command, words)
    assert first[0] == 0, first
    assert second == (0, "", "")
    check_output(tmp_path, first[1])


@pytest.mark.slow
def test_an_error_of_all_is_told_by_the_first(words, tmp_path):
    words += ["--batch-size", "2"]
    first, second = run_together(2, tmp_path, together.command, words)
    assert first[0] == second[0] == 1
    said = (
        "qvlm: error: 2 processes need 4 batches with pictures, and there are 2: start fewer "
        "processes, give more samples, or a smaller batch_size than 2.\n"
    )
    assert first[1:] == ("", said)
    assert second[1:] == ("", "")


@pytest.mark.slow
def test_accelerate_starts_them(words, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    place = ["--num_machines", "1", "--main_process_port", "0", "-m", "qvlm_hf"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, *launch, *place, *words, "--batch-size", "1"],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_output(tmp_path, done.stdout)
