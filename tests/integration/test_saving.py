"""Saving is all or nothing."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, modeling_utils

from qvlm_hf import QVLMConfig, quantize_model, save_quantized
from qvlm_hf.integration import saving


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    model = tiny_llava()
    quantize_model(model, QVLMConfig(scheme="W4A16"))
    return model


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fail_at_second_shard(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real, calls = modeling_utils.safe_save_file, []

    def write(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error
        real(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", write)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error:\n No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing(
    model: torch.nn.Module, processor: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_at_second_shard(monkeypatch, error)
    with pytest.raises(OSError, match=r"out: could not be saved \(.*No space left on device.*\); nothing was changed there") as caught:
        save_quantized(model, processor, tmp_path / "out", report=model.hf_quantizer.report, max_shard_size="60KB")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_model(
    model: torch.nn.Module, processor: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = save_quantized(model, processor, tmp_path / "out", report=model.hf_quantizer.report)
    before = snapshot(output)
    fail_at_second_shard(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="nothing was changed"):
        save_quantized(model, processor, output, report=None, overwrite=True, max_shard_size="60KB")
    assert snapshot(output) == before
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupt_and_a_failing_rename_leave_the_old_model(
    model: torch.nn.Module, processor: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = save_quantized(model, processor, tmp_path / "out", report=None)
    before = snapshot(output)
    with monkeypatch.context() as patch:
        patch.setattr(type(processor), "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_quantized(model, processor, output, report=None, overwrite=True)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="Input/output error"):
            save_quantized(model, processor, output, report=None, overwrite=True)
    assert snapshot(output) == before
    assert list(tmp_path.iterdir()) == [output]


def test_overwriting_replaces_the_whole_directory(model: torch.nn.Module, processor: object, tmp_path: Path) -> None:
    output = save_quantized(model, processor, tmp_path / "out", report=None, max_shard_size="60KB")
    assert (output / "model.safetensors.index.json").is_file()
    assert not (output / "qvlm_report.json").exists()
    save_quantized(model, processor, output, report=model.hf_quantizer.report, overwrite=True)
    assert (output / "model.safetensors").is_file()
    assert not list(output.glob("model-*"))
    assert set(json.loads((output / "qvlm_report.json").read_text())["modules"]) == set(model.hf_quantizer.report.modules)
    assert list(tmp_path.iterdir()) == [output]
    # saving over the directory that a model was loaded from is fine too
    loaded = AutoModelForImageTextToText.from_pretrained(output)
    before = (output / "model.safetensors").read_bytes()
    save_quantized(loaded, processor, output, report=None, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before


def test_directories_that_are_refused(model: torch.nn.Module, processor: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, must be a directory"):
        save_quantized(model, processor, tmp_path / "file", report=None, overwrite=True)
    with pytest.raises(ValueError, match="exists and is not empty: choose another directory, or overwrite it"):
        save_quantized(model, processor, tmp_path, report=None)
    with pytest.raises(ValueError, match="holds no saved model"):
        save_quantized(model, processor, tmp_path, report=None, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working directory"):
        save_quantized(model, processor, ".", report=None, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "file"]
    with pytest.raises(ValueError, match="needs a quantized model"):
        save_quantized(tiny_llava(), processor, tmp_path / "new", report=None)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(model: torch.nn.Module, processor: object, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        output = save_quantized(model, processor, tmp_path / "out", report=model.hf_quantizer.report, max_shard_size="60KB")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in output.iterdir()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 1
    assert modes == dict.fromkeys(modes, mode)


def test_an_empty_directory_is_taken_and_permissions_are_ordinary(model: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    output = save_quantized(model, None, tmp_path / "empty", report=None)
    (tmp_path / "other").mkdir()
    assert output.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert saving.REPORT_NAME not in os.listdir(output)
