"""Saving is all or nothing."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, modeling_utils

from qvlm_hf import QVLMConfig, quantize_model, save_quantized
from qvlm_hf.hf import saving
from qvlm_hf.hub.measurements import record_measurement


@pytest.fixture(scope="module")
def model():
    model = tiny_llava()
    quantize_model(model, QVLMConfig(scheme="W4A16"))
    return model


@pytest.fixture
def save(model, processor):
    """`save_quantized` of the model and its processor; without a report unless one is given."""
    usual = {"report": None}
    return lambda folder, **more: save_quantized(model, processor, folder, **usual | more)


@pytest.fixture
def output(save, tmp_path):
    """An earlier result."""
    return save(tmp_path / "out")


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fail_at_second_shard(monkeypatch, error):
    real, calls = modeling_utils.safe_save_file, []

    def write(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        real(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", write)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error:\n No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_leaves_nothing(save, model, tmp_path, monkeypatch, error):
    fail_at_second_shard(monkeypatch, error)
    message = r"out: could not be saved \(.*No space left on device.*\); nothing was changed there"
    with pytest.raises(OSError, match=message) as caught:
        save(tmp_path / "out", report=model.hf_quantizer.report, max_shard_size="60KB")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_model(save, model, tmp_path, monkeypatch):
    output = save(tmp_path / "out", report=model.hf_quantizer.report)
    before = snapshot(output)
    fail_at_second_shard(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="nothing was changed"):
        save(output, overwrite=True, max_shard_size="60KB")
    assert snapshot(output) == before
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupt_leaves_the_old_model(save, output, processor, tmp_path, monkeypatch):
    before = snapshot(output)
    monkeypatch.setattr(
        type(processor), "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save(output, overwrite=True)
    assert snapshot(output) == before
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 1, 7, 8, 9, 16])
def test_a_failing_move_is_taken_back_and_the_new_result_kept(
    save, output, model, monkeypatch, failing, error
):
    before, names = snapshot(output), sorted(os.listdir(output))
    rename, calls = Path.rename, []

    def fail(self, target):
        calls.append(self)
        if len(calls) == failing + 1:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)) as caught:
        save(output, report=model.hf_quantizer.report, overwrite=True)
    assert len(calls) > failing
    partial = next(output.glob(".qvlm-partial-*"))
    assert sorted([*names, partial.name]) == sorted(os.listdir(output))
    kept = {name: held for name, held in snapshot(output).items() if not name.startswith(".")}
    assert kept == before
    assert sorted(os.listdir(partial)) == sorted([*names, "qvlm_report.json"])
    if isinstance(error, OSError):
        expected = f"is as it was, the last step failed ([Errno 5] Input/output error); the new result is whole in {partial}."
        assert str(caught.value) == f"{output}: {expected}"
    message = rf"holds {partial.name} of a save that was interrupted or still runs: move"
    with pytest.raises(ValueError, match=message):
        saving.check_output(output, overwrite=True)


def test_while_files_are_moved_no_model_loads_that_is_neither(save, output, monkeypatch):
    old = (output / "config.json").read_bytes()
    rename, seen = Path.rename, []

    def watch(self, target):
        if (output / "config.json").exists():
            seen.append(
                (output / "config.json").read_bytes() == old
                and not any(output.glob(".qvlm-old-*/*"))
            )
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    save(output, overwrite=True)
    assert seen == [True]  # at the first move alone


@pytest.mark.parametrize("change", ["exchanged", "taken out"])
def test_a_model_that_was_changed_after_it_was_quantized_can_be_loaded(change, inputs, tmp_path):
    model = tiny_llava()
    quantize_model(model, QVLMConfig(scheme="W4A16"))
    if change == "exchanged":
        model.model.multi_modal_projector.linear_2 = torch.nn.Linear(64, 64)
    else:
        del model.model.language_model.layers[1]
        model.config.text_config.num_hidden_layers = 1
    save_quantized(model, None, tmp_path / "out", report=None)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_overwriting_replaces_the_whole_directory(save, model, processor, tmp_path):
    output = save(tmp_path / "out", max_shard_size="60KB")
    assert (output / "model.safetensors.index.json").is_file()
    assert not (output / "qvlm_report.json").exists()
    save(output, report=model.hf_quantizer.report, overwrite=True)
    assert (output / "model.safetensors").is_file()
    assert not list(output.glob("model-*"))
    assert set(json.loads((output / "qvlm_report.json").read_text())["modules"]) == set(
        model.hf_quantizer.report.modules
    )
    assert list(tmp_path.iterdir()) == [output]
    # saving over the directory that a model was loaded from is fine too
    loaded = AutoModelForImageTextToText.from_pretrained(output)
    before = (output / "model.safetensors").read_bytes()
    save_quantized(loaded, processor, output, report=None, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before


def test_directories_that_are_refused(save, model, processor, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, must be a directory"):
        save(tmp_path / "file", overwrite=True)
    message = "exists and is not empty: choose another directory, or overwrite it"
    with pytest.raises(ValueError, match=message):
        save(tmp_path)
    for content in ("{}", "[]", "no JSON", '{"quantization_config": {"quant_method": "gptq"}}'):
        (tmp_path / "config.json").write_text(content)
        message = "holds no earlier result of qvlm_hf that lists its files, so nothing there is"
        with pytest.raises(ValueError, match=message):
            save(tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "file"]
    with pytest.raises(ValueError, match="needs a quantized model"):
        save_quantized(tiny_llava(), processor, tmp_path / "new", report=None)
    message = (
        "processor='me/model' cannot be saved: give what AutoProcessor.from_pretrained returns"
    )
    with pytest.raises(ValueError, match=message):
        save_quantized(model, "me/model", tmp_path / "new", report=None)
    with pytest.raises(ValueError, match="processor='out' cannot be saved"):  # the order of PEFT's
        save_quantized(model, "out", processor, report=None)
    with pytest.raises(ValueError, match=r"report=True is no CalibrationReport: give model\.hf_"):
        save_quantized(model, processor, tmp_path / "new", report=True)
    assert not (tmp_path / "new").exists()


def a_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("kept")


def changed(path):
    path.write_bytes(path.read_bytes() + b" ")


def weights(file):
    save_file({"a": torch.ones(1)}, file, metadata={"format": "pt"})


def other_values(file):
    """Under the same header, as those of another training are."""
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        (last,) = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


TEMPLATES = "additional_chat_templates"  # a folder of ours
NAMES = [  # of files of the user's: some as ours are named
    *("README.md", "qvlm_holiday.png", "vocab.json", "merges.txt", "qvlm_report.json", "notes.txt"),
    *(f"{TEMPLATES}/mine.jinja", f"{TEMPLATES}/notes.txt", ".env", "images/1.png", "cat.png"),
    *("vocab.txt/x", "pytorch_model.bin", "model-00002-of-00002.safetensors"),
]
FOREIGN = {name: lambda folder, name=name: a_file(folder / name) for name in NAMES} | {
    "a card that was edited": lambda folder: changed(folder / "README.md"),
    "a configuration that was edited": lambda folder: changed(folder / "config.json"),
    "other weights": lambda folder: other_values(folder / "model.safetensors"),
    "an empty folder named as one of ours": lambda folder: (folder / TEMPLATES).mkdir(),
    "an empty folder": lambda folder: (folder / "data").mkdir(),
    "a file that became a link": lambda folder: (
        (folder / "README.md").rename(folder.parent / "moved"),
        (folder / "README.md").symlink_to(folder.parent / "moved"),
    ),
    "a link named as a file of ours": lambda folder: (folder / "vocab.json").symlink_to(
        folder / "tokenizer.json"
    ),
    "a dangling link": lambda folder: (folder / "vocab.json").symlink_to("nowhere"),
    "an adapter": lambda folder: weights(folder / "adapter_model.safetensors"),
    "full-precision weights": lambda folder: weights(folder / "model-00001-of-00002.safetensors"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_an_earlier_result_did_not_write_is_never_deleted(save, output, kind):
    FOREIGN[kind](output)
    before, names = snapshot(output), sorted(os.listdir(output))
    message = r"holds \S+, which no earlier result of qvlm_hf wrote like that: move that away, or"
    with pytest.raises(ValueError, match=message) as caught:
        save(output, overwrite=True)
    assert "\n" not in str(caught.value)
    assert (snapshot(output), sorted(os.listdir(output))) == (before, names)


def test_a_file_that_comes_while_saving_stays(save, output, model, monkeypatch):
    before, write = snapshot(output), saving.write_card

    def meanwhile(name):
        def written(*arguments, **options):
            (output / name).write_text("mine")
            write(*arguments, **options)

        monkeypatch.setattr(saving, "write_card", written)

    meanwhile("notes.txt")
    save(output, overwrite=True)
    assert snapshot(output) == before | {"notes.txt": b"mine"}
    (output / "notes.txt").unlink()
    meanwhile("qvlm_report.json")
    message = r"is as it was, the last step failed \(.*File exists.*\); the new result is whole in"
    with pytest.raises(OSError, match=message):
        save(output, report=model.hf_quantizer.report, overwrite=True)
    assert (output / "qvlm_report.json").read_text() == "mine"
    assert before.items() <= snapshot(output).items()


def test_what_lists_no_files_is_never_replaced(save, model, tmp_path):
    """As of `save_pretrained`, a download, or a result whose list is damaged."""
    model.save_pretrained(tmp_path / "out")
    saved = save(tmp_path / "damaged")
    (saved / "qvlm_files.json").write_text('{"config.json"')
    linked = save(tmp_path / "linked")
    (linked / "qvlm_files.json").rename(tmp_path / "list")
    (linked / "qvlm_files.json").symlink_to(tmp_path / "list")
    for folder in (tmp_path / "out", saved, linked):
        before = snapshot(folder)
        with pytest.raises(ValueError, match=r"that lists its files, .*: delete it yourself, or"):
            save(folder, overwrite=True)
        assert snapshot(folder) == before


def test_a_result_with_folders_can_be_overwritten(save, processor, tmp_path, monkeypatch):
    write = type(processor).save_pretrained

    def with_templates(self, folder):
        write(self, folder)
        a_file(Path(folder) / "additional_chat_templates" / "rag.jinja")

    output = save(tmp_path / "plain" / "out")
    plain = snapshot(output)
    with monkeypatch.context() as patched:
        patched.setattr(type(processor), "save_pretrained", with_templates)
        save(output, overwrite=True)
    assert (output / "additional_chat_templates" / "rag.jinja").is_file()
    save(output, overwrite=True)
    assert snapshot(output) == plain
    assert not (output / "additional_chat_templates").exists()


def test_what_was_recorded_later_is_still_ours(save, output):
    listed = (output / "qvlm_files.json").read_bytes()
    record_measurement(output)
    assert (output / "qvlm_report.json").is_file()
    assert (output / "qvlm_files.json").read_bytes() != listed
    save(output, overwrite=True)
    assert (output / "qvlm_files.json").read_bytes() == listed


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_existing_directory_stays_itself(save, tmp_path, monkeypatch, overwrite):
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    if overwrite:
        save(folder)
    inode = folder.stat().st_ino
    monkeypatch.chdir(folder)
    assert save(".", report=None, overwrite=overwrite) == folder
    assert (folder.stat().st_ino, Path.cwd()) == (inode, folder)
    assert "config.json" in os.listdir(".")
    assert not [name for name in os.listdir(".") if name.startswith(".")]
    save(tmp_path / "link", overwrite=True)
    assert (folder.stat().st_ino, (tmp_path / "link").is_symlink()) == (inode, True)
    assert AutoModelForImageTextToText.from_pretrained(folder).is_quantized


@pytest.mark.parametrize("length", [1, 236, 237, 255])
def test_a_name_of_any_length_that_the_file_system_takes(save, tmp_path, length):
    output = save(tmp_path / ("x" * length))
    save(output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x" * length]


def test_a_directory_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    message = r"cannot be written \(File name too long\): choose a shorter name\.$"
    with pytest.raises(ValueError, match=message):
        saving.check_output(tmp_path / ("x" * 256), overwrite=False)
    for length in (4060, 4085):  # the directory fits, the files in it do not
        deep = Path(str(tmp_path.joinpath(*["y" * 200] * 30))[:length])
        message = r"cannot be written \(File name too long\): choose a shorter name\.$"
        with pytest.raises(ValueError, match=message):
            saving.check_output(deep, overwrite=False)
    (tmp_path / "file").write_text("x")
    message = r"cannot be written \(Not a directory\): choose a directory that you may write to\.$"
    with pytest.raises(ValueError, match=message):
        saving.check_output(tmp_path / "file" / "out", overwrite=False)
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(
            Path,
            "touch",
            lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")),
        )
        for output in (tmp_path / "empty", tmp_path / "new" / "out"):
            message = r"cannot be written \(Read-only file system\): choose a directory that"
            with pytest.raises(ValueError, match=message):
                saving.check_output(output, overwrite=False)
    assert (
        saving.check_output(tmp_path / "new" / "out", overwrite=False) == tmp_path / "new" / "out"
    )
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]  # the look leaves nothing
    assert os.listdir(tmp_path / "empty") == []


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert saving.check_output("~/out", overwrite=False) == tmp_path.resolve() / "out"


def test_a_failed_save_takes_the_folders_above_it_away_again(save, tmp_path, monkeypatch):
    fail_at_second_shard(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="nothing was changed"):
        save(tmp_path / "a" / "b" / "out", max_shard_size="60KB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(save, model, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        output = save(tmp_path / "out", report=model.hf_quantizer.report, max_shard_size="60KB")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in output.iterdir()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 1
    assert modes == dict.fromkeys(modes, mode)


def test_an_empty_directory_is_taken_and_permissions_are_ordinary(model, tmp_path):
    (tmp_path / "empty").mkdir()
    output = save_quantized(model, None, tmp_path / "empty", report=None)
    (tmp_path / "other").mkdir()
    assert output.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert saving.REPORT_NAME not in os.listdir(output)


class Killed(BaseException):
    """What no handler of ours survives: from the first on, every rename ends in it."""


@pytest.mark.parametrize("wanted", [".qvlm-old-", ".qvlm-partial-"])
@pytest.mark.parametrize("done", [1, 2, 5, 9, 10, 14])
def test_after_a_kill_in_the_final_move_the_message_says_how_either_result_comes_back(
    model: torch.nn.Module,
    processor: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: int,
    wanted: str,
) -> None:
    earlier = save_quantized(model, processor, tmp_path / "out", report=model.hf_quantizer.report)
    expected = {".qvlm-old-": snapshot(earlier)}
    other = tiny_llava(seed=1)
    quantize_model(other, QVLMConfig(scheme="W3A16"))
    new = save_quantized(
        other, processor, tmp_path / "new" / "out", report=other.hf_quantizer.report
    )
    expected[".qvlm-partial-"] = snapshot(new)
    real, calls = Path.rename, []

    def rename(path: Path, place: Path) -> Path:
        if len(calls) == done:
            raise Killed
        calls.append(1)
        return real(path, place)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        save_quantized(other, processor, earlier, report=other.hf_quantizer.report, overwrite=True)
    monkeypatch.undo()
    remedy = (
        r"if none runs, both results are whole: move up what \.qvlm-old-\.\.\. holds for the "
        r"earlier one, or what "
        r"\.qvlm-partial-\.\.\. holds for the new one, over files of the same name, and delete "
        r"both folders, or choose another directory\.$"
    )
    message = r"holds \.qvlm-old-\w+ and \.qvlm-partial-\w+ of a save .* still runs: " + remedy
    with pytest.raises(ValueError, match=message):
        save_quantized(other, processor, earlier, report=None, overwrite=True)
    (folder,) = earlier.glob(f"{wanted}*")
    for file in folder.iterdir():
        file.replace(earlier / file.name)
    for left in earlier.glob(".qvlm-*"):
        shutil.rmtree(left)
    assert snapshot(earlier) == expected[wanted]


def test_an_empty_name_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = r"^output is empty, which names no directory: give its name, or '\.' for this one\.$"
    with pytest.raises(ValueError, match=message):
        saving.check_output("", overwrite=False)
