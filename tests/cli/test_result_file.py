"""`--json FILE` of `qvlm bench` and `qvlm evaluate`: refused before anything is loaded or measured, and never touched by the look."""

import os

import pytest

from qvlm_hf.cli import main
from qvlm_hf.cli.result_file import check_result_file


@pytest.mark.parametrize(
    "command", [["bench", "--kernels"], ["bench", "--shape", "demo-1b"], ["evaluate", "none", "--dataset", "none.jsonl"]]
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", ": is a directory: name a file."),
        ("/nowhere/rows.json", ": the directory does not exist: create it or name another."),
        ("/file/rows.json", ": cannot be written (Not a directory): name another file."),
        (f"/{'x' * 300}", ": cannot be written (File name too long): name another file."),
    ],
)
def test_refused_before_measuring(command, name, message, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert main([*command, "--json", f"{tmp_path}{name}"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"qvlm: error: --json {tmp_path}{name}{message}\n")


def test_what_is_there_is_kept_and_nothing_is_left(tmp_path):
    (tmp_path / "old.json").write_text("kept")
    check_result_file(f"{tmp_path}/old.json")
    check_result_file(f"{tmp_path}/new.json")
    assert (tmp_path / "old.json").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a reader
    check_result_file(f"{tmp_path}/pipe")


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("kept")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"old\.json: may not be written: name another file\."):
        check_result_file(f"{tmp_path}/old.json")
