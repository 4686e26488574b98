"""`--json FILE` of `qvlm bench` and `qvlm evaluate`: refused before anything is loaded or measured.

The look never touches the file.
"""

import errno
import json
import os
from pathlib import Path

import pytest

from qvlm_hf.cli import main
from qvlm_hf.cli.results import check_result_file, write_result_file

COMMANDS = ["bench --kernels", "bench --shape demo-1b", "evaluate none --dataset none.jsonl"]
RESULTS = (
    '{"accuracy": 1, "questions": []}',
    '{"threads": 2, "versions": {}, "rows": [], "device": "cpu"}',
    "",
)
REFUSED = ["kept", "[1]", '{"image": "a.png", "question": "?"}', '{"accuracy": 1}', "\u00ff"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a directory: name a file."),
        ("/nowhere/rows.json", "the directory does not exist: create it or name another."),
        ("/file/rows.json", "cannot be written (Not a directory): name another file."),
        (f"/{'x' * 300}", "cannot be written (File name too long): name another file."),
    ],
)
def test_refused_before_measuring(command, name, message, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert main([*command.split(), "--json", f"{tmp_path}{name}"]) == 1
    assert capsys.readouterr() == ("", f"qvlm: error: --json {tmp_path}{name}: {message}\n")


@pytest.mark.parametrize("text", RESULTS)
def test_an_earlier_result_is_kept_by_the_look_and_nothing_is_left(tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    for name in ("old.json", "new.json", "x" * 255):
        check_result_file(f"{tmp_path}/{name}")
    assert (tmp_path / "old.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("command", COMMANDS[::2])
@pytest.mark.parametrize("name", ["samples.jsonl", "link.json"])
def test_what_is_no_result_is_never_replaced(tmp_path, capsys, text, command, name):
    (tmp_path / "samples.jsonl").write_text(text, encoding="latin-1")
    (tmp_path / "link.json").symlink_to(tmp_path / "samples.jsonl")
    assert main([*command.split(), "--json", f"{tmp_path}/{name}"]) == 1
    told = "holds no earlier result, so it is not replaced: name another file.\n"
    assert capsys.readouterr().err == f"qvlm: error: --json {tmp_path}/{name}: {told}"
    assert (tmp_path / "samples.jsonl").read_text(encoding="latin-1") == text


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "real.json").write_text(RESULTS[0])
    (tmp_path / "link.json").symlink_to("real.json")
    write_result_file(f"{tmp_path}/link.json", {"a": 1})
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    assert (tmp_path / "link.json").is_symlink()

    def full(self, text, **options):
        with self.open("w") as opened:
            opened.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_result_file(f"{tmp_path}/real.json", {"b": 2})
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["link.json", "real.json"]


def test_a_pipe_is_not_opened_before_the_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a reader
    check_result_file(f"{tmp_path}/pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_result_file(f"{tmp_path}/pipe", {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("kept")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"old\.json: may not be written: name another file\."):
        check_result_file(f"{tmp_path}/old.json")
