"""Ctrl-C ends the command line with one line and status 130, whatever it is doing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Python runs this first: Ctrl-C as soon as a named module is imported.
SITE = """
import os, signal, sys

class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
"""

# The script that pip writes for an entry point.
SCRIPT = "import sys\nfrom qvlm_hf.cli import main\nsys.exit(main())\n"
MODULES = ("torch", "transformers", "qvlm_hf.hf.config", "qvlm_hf.cli.wording", "qvlm_hf.cli.inspect", "qvlm_hf.hub.contents")


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


def test_without_an_interruption_the_command_says_what_is_wrong(tmp_path):
    done = run(tmp_path, "qvlm", "none")
    expected = f"qvlm: error: {tmp_path}: holds no config.json: name the directory of a saved model.\n"
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
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "True\n"
