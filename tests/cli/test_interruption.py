"""Ctrl-C ends the command line with one line and status 130, whatever it is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qvlm_hf.cli import inspect, main

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
    "qvlm_hf.hub.saved",
)
MORE_MODULES = ("qvlm_hf.cli.wording", "qvlm_hf.cli.inspect")
LINE = "qvlm: interrupted\n"
WRONG = "qvlm: error: {}: holds no config.json: name the directory of a saved model.\n"


def hear_interrupts():
    """A background job of a shell ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(tmp_path, *words, script=SCRIPT, **options):
    """Runs a script named qvlm, or `-m qvlm_hf`, in a process of its own."""
    (tmp_path / "qvlm").write_text(script)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | options.pop("environment", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    options["preexec_fn"] = hear_interrupts
    return subprocess.run([sys.executable, *words], text=True, env=environment, **options)


def interrupted(tmp_path, moment, *program):
    """Status, output and errors of `qvlm inspect` of an empty folder with Ctrl-C at a moment."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    words = [*(program or [str(tmp_path / "qvlm")]), "inspect", str(tmp_path)]
    done = start(tmp_path, *words, environment={"INTERRUPTED": moment})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("program", "module"),
    [
        *(((), module) for module in MODULES),
        *((("-m", "qvlm_hf"), module) for module in ("torch", "qvlm_hf.cli.inspect")),
        *(pytest.param((), module, marks=pytest.mark.slow) for module in MORE_MODULES),
    ],
)
def test_while_importing(tmp_path, program, module):
    assert interrupted(tmp_path, module, *program) == (130, "", LINE)


@pytest.mark.parametrize("moment", ["at exit", pytest.param("behind main", marks=pytest.mark.slow)])
def test_while_ending(tmp_path, moment):
    assert interrupted(tmp_path, moment) == (130, "", WRONG.format(tmp_path) + LINE)


def test_without_an_interruption_the_command_says_what_is_wrong(tmp_path):
    assert interrupted(tmp_path, "none") == (1, "", WRONG.format(tmp_path))


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
    done = start(tmp_path, str(tmp_path / "qvlm"), "inspect", str(tmp_path), script=TWICE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", LINE)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        pytest.param("/dev/full", "No space left on device", marks=pytest.mark.slow),
        ("pipe", ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(tmp_path, target, said):
    if target == "/dev/full":
        output = os.open(target, os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    words = (str(tmp_path / "qvlm"), "inspect", "--shape", "llava-1.5-7b")
    done = start(tmp_path, *words, stdout=output)
    os.close(output)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_while_a_command_runs_what_it_began_is_cleared_away(monkeypatch, capsys):
    cleared = []

    def stopped(_options):
        try:
            raise KeyboardInterrupt
        finally:
            cleared.append(True)

    monkeypatch.setattr(inspect, "run", stopped)
    assert main(["inspect", "x"]) == 130
    assert (capsys.readouterr().err, cleared) == (LINE, [True])


def test_programs_that_import_the_package_keep_their_own_handling(tmp_path):
    handler = "signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    (tmp_path / "program.py").write_text(f"import signal, qvlm_hf; print({handler})")
    assert start(tmp_path, str(tmp_path / "program.py")).stdout == "True\n"
