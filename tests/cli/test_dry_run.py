"""`qvlm quantize MODEL --dry-run`: told from shapes, nothing read or written."""

import math
import re

import pytest
from tiny_models import save_tiny, save_tiny_samples

from qvlm_hf.bench.shapes import SHAPES
from qvlm_hf.cli import main
from qvlm_hf.hf import preflight


@pytest.mark.parametrize("shape", ["llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-72b"])
def test_shapes_are_promised_by_one_command(shape, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "whole_memory", lambda _: math.inf)
    monkeypatch.setattr(preflight, "free_memory", lambda _: math.inf)
    assert main(["quantize", shape, "--dry-run"]) == 0
    name, time, samples, memory, scratch, device, disk = capsys.readouterr().out.splitlines()
    assert name == f"{shape}, W4A4, on this machine"
    assert time.startswith("time ")
    assert samples.strip().startswith("64 samples; tokens of each: vision ")
    assert samples.endswith("(assumed, --dataset counts them)")
    assert memory.startswith("memory ")
    assert scratch.endswith(" (--scratch-dir)")
    assert device.endswith(" of a GPU's, where the model is on one")
    assert disk.startswith("disk ")


def test_the_status_is_that_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "whole_memory", lambda _: 2 * 10**9)
    assert main(["quantize", SHAPES[0], "--dry-run"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 7
    assert (
        "this process may have 2.0 GB: take a machine with more, or --scratch-dir, --max-block-depth 1, "
        in printed.err
    )
    monkeypatch.setattr(preflight, "whole_memory", lambda _: math.inf)
    monkeypatch.setattr(preflight, "free_disk", lambda _: 10**6)
    assert main(["quantize", SHAPES[0], "--dry-run", "--output", str(tmp_path / "x")]) == 1
    assert "no room for " in capsys.readouterr().err


def test_a_model_with_samples_is_counted_and_nothing_written(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    samples = save_tiny_samples(tmp_path, 6)
    before = sorted(tmp_path.rglob("*"))
    model = str(tmp_path / "model")
    assert main(["quantize", model, "--dataset", str(samples), "--dry-run"]) == 0
    assert "6 samples; tokens of each: vision 16, projector 16, " in capsys.readouterr().out
    assert main(["quantize", model, "--method", "rtn", "--dry-run"]) == 0
    assert "tokens of each" not in capsys.readouterr().out
    words = ["quantize", SHAPES[0], "--dataset", str(samples), "--dry-run"]
    assert main(words) == 1
    assert "is a shape without a processor" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_no_room_for_the_result_is_told_before_the_run(tmp_path, capsys, monkeypatch):
    save_tiny(tmp_path / "model")
    monkeypatch.setattr(preflight, "free_disk", lambda _: 1000)
    output = tmp_path / "out"
    words = ["quantize", str(tmp_path / "model"), "--scheme", "W4A16", "--output", str(output)]
    assert main(words) == 1
    assert f"{output}: no room for " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", str(tmp_path / "model")])  # where to


def test_a_size_that_no_width_reaches_is_refused(capsys, monkeypatch):
    command = ["quantize", "llava-1.5-13b", "--dry-run", "--precision-budget", "1GB"]
    assert main([*command, "--max-block-depth", "1"]) == 1
    found = re.search(r"--precision-budget 1GB is below (4\.\d\dGB),", capsys.readouterr().err)
    monkeypatch.setattr(preflight, "whole_memory", lambda _: math.inf)
    assert main([*command[:-1], found[1]]) == 0
    assert "disk    4." in capsys.readouterr().out
    assert main([*command[:-1], "100GB"]) == 0
    assert re.search(r"disk    1[34]\.", capsys.readouterr().out)  # with 8 bits
