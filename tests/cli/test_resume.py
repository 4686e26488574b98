"""`qvlm quantize --resume`: killed or interrupted, it goes on and gives the same bytes."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny, save_tiny_samples

from qvlm_hf.calibration.record.resume import SavedSteps
from qvlm_hf.cli import main
from qvlm_hf.hf import preflight, saving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    save_tiny(folder / "model")
    save_tiny_samples(folder, 12)
    return folder


def words(folder, output, *more):
    options = [
        "--recipe",
        "fixed",
        "--num-samples",
        "8",
        "--max-block-depth",
        "1",
        "--output",
        str(output),
    ]
    return ["quantize", f"{folder}/model", "--dataset", f"{folder}/samples.jsonl", *options, *more]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_gives_the_bytes_of_an_undisturbed_run(tmp_path, kills):
    save_tiny(tmp_path / "model")
    save_tiny_samples(tmp_path, 12)
    program, seed = Path(__file__).with_name("killed_quantize.py"), random.randrange(2**32)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, program, tmp_path, str(kills), str(seed)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"


def test_ctrl_c_keeps_the_steps_and_says_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    write = SavedSteps.write

    def stopped(self, step, value):
        write(self, step, value)
        if step == "block-0-1":
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedSteps, "write", stopped)
    command, state = words(folder, tmp_path / "out", "--resume"), tmp_path / "out.resume"
    assert main(command) == 130
    said = f"qvlm: interrupted; what is finished is kept in {state}: run the same again to go on\n"
    assert capsys.readouterr().err == said
    assert (state / "block-0-1.json").exists()
    monkeypatch.undo()
    assert main([*command, "--scheme", "W4A8"]) == 1
    assert "activation_bits 4 instead of 8: go on as it was begun" in capsys.readouterr().err
    read = []
    monkeypatch.setattr(
        SavedSteps,
        "read",
        lambda self, step, of=SavedSteps.read: read.append(step) or of(self, step),
    )
    assert main(command) == 0
    assert "block-0-1" in read
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not state.exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_disk_that_fills_while_saving_says_what_is_kept(
    folder, tmp_path, monkeypatch, capsys, resume
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_card", full)
    command = words(folder, tmp_path / "out", *(["--resume"] if resume else []))
    assert main(command) == 1
    said = capsys.readouterr().err
    state, kept = tmp_path / "out.resume", "No step of the calibration is kept: run it again with"
    if resume:
        kept = f"Finished steps are kept in {state}: run the same again"
    assert "out: could not be saved ([Errno 28] No space left on device); nothing was " in said
    assert said.count("\n") == 1
    assert kept in said
    assert sorted(tmp_path.iterdir()) == ([state] if resume else [])


def test_steps_and_result_must_fit_on_the_disk_together(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "free_disk", lambda _: 250_000)  # enough for each of them
    assert main(words(folder, tmp_path / "out", "--resume")) == 1
    assert "of the result and the steps to resume from, 0.2 MB are" in capsys.readouterr().err


def test_it_is_of_the_search_alone(folder, tmp_path, capsys):
    assert main(words(folder, tmp_path / "out", "--resume", "--method", "rtn")) == 1
    assert "--resume: plain rounding uses no data" in capsys.readouterr().err
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "letter.txt").touch()
    assert main(words(folder, tmp_path / "out", "--resume")) == 1
    assert "holds something else than a stopped calibration" in capsys.readouterr().err
