"""The lock around compiling: it saves work between processes, and never stands in the way."""

import errno
import fcntl
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvlm_hf.ops import native

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")

CODE = f"""
import sys, time, types
from pathlib import Path
package = types.ModuleType("qvlm_hf")  # a bare one: its own would import Transformers
package.__path__ = [{str(Path(native.__file__).parents[1])!r}]
sys.modules["qvlm_hf"] = package
from qvlm_hf.ops import native
folder = Path(sys.argv[1])
(folder / f"ready-{{sys.argv[2]}}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
print(native.load([folder / "answer.cpp"], ["-shared", "-fPIC"]).answer())
"""


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """A source, an empty cache, and a compiler that takes its time and leaves a file for every compilation."""
    (tmp_path / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    (tmp_path / "compilations").mkdir()
    compiler = tmp_path / "slow-g++"
    compiler.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) ;; *) mktemp {tmp_path}/compilations/XXXXXX >&2; sleep 1;; esac\n'
        f'exec {shutil.which("g++")} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "compilations"


def compile_answer(folder):
    return native.compiled([folder / "answer.cpp"], ["-shared", "-fPIC"])


def count(folder):
    return len(list(folder.iterdir()))


def test_processes_that_start_together_compile_once(compilations):
    folder = compilations.parent
    words = [sys.executable, "-c", CODE, str(folder)]
    running = [subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    while not all((folder / f"ready-{name}").exists() for name in "ab"):
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)
    (folder / "go").touch()
    assert [process.communicate(timeout=400)[0] for process in running] == ["42\n", "42\n"]
    assert count(compilations) == 1


def test_a_lock_that_nobody_lets_go_is_waited_for_so_long_and_no_longer(compilations, monkeypatch):
    target = compile_answer(compilations.parent)
    target.unlink()
    monkeypatch.setattr(native, "_output", lambda *command: run(command))
    monkeypatch.setattr(native, "_SECONDS", 1)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        assert compile_answer(compilations.parent) == target
        assert time.monotonic() - start >= 1
    assert count(compilations) == 2


def run(command):
    """`native._output` without its time limit, which the test shortens for the lock alone."""
    return subprocess.run(command, capture_output=True, check=True).stdout


HOLD = "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"


def test_the_lock_of_a_process_that_was_killed_holds_nobody(compilations):
    target = compile_answer(compilations.parent)
    target.unlink()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(target.with_suffix(".lock"))], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    start = time.monotonic()
    assert compile_answer(compilations.parent) == target
    assert time.monotonic() - start < 30  # of the 300 that a held lock is waited for


def test_a_file_system_without_locks_compiles_all_the_same(compilations, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert compile_answer(compilations.parent).is_file()
    assert count(compilations) == 1


def test_a_lock_file_that_cannot_be_opened_is_done_without(compilations):
    target = compile_answer(compilations.parent)
    target.unlink()
    target.with_suffix(".lock").unlink()
    target.with_suffix(".lock").mkdir()
    assert compile_answer(compilations.parent) == target
    assert target.is_file()
