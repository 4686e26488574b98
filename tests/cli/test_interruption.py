"""Ctrl-C ends the command line with one line and status 130, whatever it is doing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Python runs this first: Ctrl-C as soon as a named module is imported, or later.
SITE = """
import atexit, builtins, os, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass  # a handler runs between two steps of Python

class Last:
    def __del__(self):
        os.write(2, b"taken apart")

class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED"]:
            interrupt()
        if name == "qvlm_hf.cli.inspect":
            builtins.last = Last()
            if os.environ["INTERRUPTED"] == "at exit":
                atexit.register(interrupt)
            if os.environ["INTERRUPTED"] == "behind main":
                sys.modules["qvlm_hf.cli"].interruption.end_with = lambda status: interrupt()

sys.meta_path.insert(0, Interrupt)
"""

# The script that pip writes for an entry point.
SCRIPT = "import sys\nfrom qvlm_hf.cli import main\nsys.exit(main())\n"
MODULES = (
    "torch",
    "transformers",
    "qvlm_hf.hf.config",
    "qvlm_hf.cli.wording",
    "qvlm_hf.cli.inspect",
    "qvlm_hf.hub.contents",
)


def run(tmp_path, program, module):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "qvlm").write_text(SCRIPT)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [str(tmp_path / "qvlm")] if program == "qvlm" else ["-m", "qvlm_hf"]
    return subprocess.run(
        [sys.executable, *words, "inspect", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "INTERRUPTED": module},
    )  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_while_importing(tmp_path, module):
    done = run(tmp_path, "qvlm", module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qvlm: interrupted\n")


@pytest.mark.parametrize("module", ["torch", "qvlm_hf.cli.inspect"])
def test_while_importing_as_a_module(tmp_path, module):
    done = run(tmp_path, "python -m qvlm_hf", module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qvlm: interrupted\n")


@pytest.mark.parametrize("moment", ["at exit", "behind main"])
def test_while_ending(tmp_path, moment):
    done = run(tmp_path, "qvlm", moment)
    said = f"qvlm: error: {tmp_path}: holds no config.json: name the directory of a saved model.\nqvlm: interrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


TWICE = """
import os, signal, sys
from qvlm_hf import cli
from qvlm_hf.cli import inspect

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass

class Stream:  # of an impatient user, who presses again while the line is printed
    def write(self, text):
        interrupt()
        sys.__stderr__.write(text)
        interrupt()
    def flush(self):
        sys.__stderr__.flush()

inspect.run = interrupt
sys.stderr = Stream()
status = cli.main()
interrupt()
sys.exit(status)
"""


def test_a_second_one_adds_no_line(tmp_path):
    (tmp_path / "qvlm").write_text(TWICE)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(tmp_path / "qvlm"), "inspect", str(tmp_path)]
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qvlm: interrupted\n")


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [("/dev/full", 1, "No space left on device"), ("closed pipe", 1, "")],
)
def test_output_that_cannot_be_written_is_no_traceback(tmp_path, target, status, said):
    (tmp_path / "qvlm").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(tmp_path / "qvlm"), "inspect", "--shape", "llava-1.5-7b"]
    if target == "/dev/full":
        output = os.open(target, os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    done = subprocess.run(
        words,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    os.close(output)
    assert done.returncode == status
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_without_an_interruption_the_command_says_what_is_wrong(tmp_path):
    done = run(tmp_path, "qvlm", "none")
    expected = (
        f"qvlm: error: {tmp_path}: holds no config.json: name the directory of a saved model.\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_while_a_command_runs_what_it_began_is_cleared_away(monkeypatch, capsys):
    from qvlm_hf.cli import inspect, main

    cleared = []

    def interrupted(_options):
        try:
            raise KeyboardInterrupt
        finally:
            cleared.append(True)

    monkeypatch.setattr(inspect, "run", interrupted)
    assert main(["inspect", "x"]) == 130
    assert (capsys.readouterr().err, cleared) == ("qvlm: interrupted\n", [True])


def test_programs_that_import_the_package_keep_their_own_handling(tmp_path):
    code = "import signal, qvlm_hf; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "True\n"
