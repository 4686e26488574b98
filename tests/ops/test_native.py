"""Where libraries are kept, who may have put them there, and the lock around compiling, which never
stands in the way.
"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvlm_hf.ops import native, private_folders

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
print(native.load(native.library, [folder / "answer.cpp"], ["-shared", "-fPIC"]).answer())
"""


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """A source, an empty cache, and a compiler that takes its time and leaves a file for every
    compilation.
    """
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
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "compilations"


def compile_answer(folder):
    return native.load(Path, [folder / "answer.cpp"], ["-shared", "-fPIC"])


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
    monkeypatch.setattr(native, "_output", lambda *command, temporary=None: run(command))
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
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target.with_suffix(".lock"))],
        stdout=subprocess.PIPE,
        text=True,
    )
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


@pytest.fixture
def cache(compilations):
    """The folder that is tried first."""
    return compilations.parent / "cache" / "qvlm_hf"


@pytest.fixture
def elsewhere(compilations):
    """The folder that is tried next."""
    return compilations.parent / "temporary" / f"qvlm_hf-{os.getuid()}"


def block(folder):
    """Lets nothing be made at a path; a mode would not do, root ignores it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


def test_folders_are_made_for_the_user_alone(compilations, cache):
    before = os.umask(0)
    try:
        target = compile_answer(compilations.parent)
    finally:
        os.umask(before)
    assert target.parent == cache
    assert [path.stat().st_mode & 0o777 for path in (cache.parent, cache, target)] == [
        0o700,
        0o700,
        0o755,
    ]


def test_another_folder_where_the_cache_cannot_be_written(compilations, cache, elsewhere, caplog):
    block(cache)
    target = compile_answer(compilations.parent)
    assert target.parent == elsewhere
    assert elsewhere.stat().st_mode & 0o777 == 0o700
    (record,) = caplog.records
    assert (
        f"kept in {elsewhere}, because of [Errno 17] File exists: '{cache}'" in record.getMessage()
    )
    assert compile_answer(compilations.parent) == target
    assert count(compilations) == 1


def test_no_home_and_a_relative_one(compilations, elsewhere, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", "home")
    assert compile_answer(compilations.parent).parent == elsewhere
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # of a user without an entry
    assert compile_answer(compilations.parent).parent == elsewhere
    assert not Path("cache").exists()
    assert not Path("home").exists()


def test_a_cache_filled_before_is_used_without_writing(compilations, cache):
    """As in an image whose cache is read-only when it runs."""
    target = compile_answer(compilations.parent)
    target.with_suffix(".lock").unlink()
    before = [(path, path.stat().st_mtime_ns) for path in (cache, target)]
    assert compile_answer(compilations.parent) == target
    assert [(path, path.stat().st_mtime_ns) for path in (cache, target)] == before
    assert list(cache.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["noexec", "full"])
def test_a_cache_that_nothing_is_loaded_from_or_nothing_fits_into(
    compilations, cache, elsewhere, monkeypatch, kind
):
    real_usage, real_statvfs = shutil.disk_usage, os.statvfs

    class Noexec:
        f_flag = os.ST_NOEXEC

    if kind == "noexec":
        monkeypatch.setattr(
            os, "statvfs", lambda path: Noexec if path == cache else real_statvfs(path)
        )
    else:
        full = real_usage("/")._replace(free=1000)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: full if path == cache else real_usage(path)
        )
    assert compile_answer(compilations.parent).parent == elsewhere


def test_a_library_that_the_loader_refuses_is_made_elsewhere(
    compilations, cache, elsewhere, monkeypatch
):
    """As a mandatory access control does, which no flag of the mount tells of."""
    tried = []

    def use(path):
        tried.append(path.parent)
        if path.parent == cache:
            raise OSError("failed to map segment from shared object")
        return path

    words = [compilations.parent / "answer.cpp"], ["-shared", "-fPIC"]
    assert native.load(use, *words).parent == elsewhere
    assert tried == [cache, elsewhere]


def test_the_compiler_keeps_its_temporary_files_beside_the_library(
    compilations, cache, monkeypatch
):
    """Where /tmp is read-only or full and the cache is not, it compiles all the same."""
    monkeypatch.setenv("TMPDIR", "/nope")
    compiler = compilations.parent / "slow-g++"
    compiler.write_text(
        compiler.read_text().replace("sleep 1", f'echo "$TMPDIR" > {compilations.parent}/seen')
    )
    assert compile_answer(compilations.parent).parent == cache
    assert (compilations.parent / "seen").read_text().startswith(f"{cache}/")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("place", ["cache", "parent"])
@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_folder_that_others_can_write_to_is_not_used(
    compilations, cache, elsewhere, caplog, place, mode
):
    planted = compile_answer(compilations.parent)
    caplog.clear()
    folder = {"cache": cache, "parent": cache.parent}[place]
    folder.chmod(mode)
    assert compile_answer(compilations.parent).parent == elsewhere
    (record,) = caplog.records
    assert f"others can write to it (chmod go-w mends that): '{folder}'" in record.getMessage()
    folder.chmod(0o1777)  # sticky, as /tmp: others cannot replace what is ours
    assert compile_answer(compilations.parent) == planted
    assert count(compilations) == 2


def test_a_library_that_others_can_write_is_made_anew(compilations):
    target = compile_answer(compilations.parent)
    target.chmod(0o666)
    assert compile_answer(compilations.parent) == target
    assert target.stat().st_mode & 0o777 == 0o755
    assert count(compilations) == 2


def test_a_group_may_write_if_it_is_the_users_own(compilations, cache, monkeypatch):
    target = compile_answer(compilations.parent)
    cache.chmod(0o770)
    monkeypatch.setattr(private_folders, "_alone_in", lambda group: group == cache.stat().st_gid)
    assert compile_answer(compilations.parent) == target
    monkeypatch.setattr(private_folders, "_alone_in", lambda group: False)
    assert compile_answer(compilations.parent).parent != cache


def test_whose_own_a_group_is(monkeypatch):
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    members = []
    monkeypatch.setattr(
        pwd, "getpwuid", lambda uid: pwd.struct_passwd(("ann", "x", uid, 7, "", "/", ""))
    )
    monkeypatch.setattr(
        grp,
        "getgrgid",
        lambda gid: grp.struct_group(({7: "ann", 8: "users"}[gid], "x", gid, members)),
    )
    assert private_folders._alone_in(7)
    assert not private_folders._alone_in(8)
    members += ["ann", "bob"]
    assert not private_folders._alone_in(7)
    assert not private_folders._alone_in(9)  # no such group


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["library", "folder", "link"])
def test_what_another_user_put_there_is_not_loaded(compilations, cache, elsewhere, place):
    target = compile_answer(compilations.parent)
    if place == "link":
        cache.rename(cache.with_name("theirs"))
        cache.symlink_to(cache.with_name("theirs"))
        os.chown(cache, 12345, 12345, follow_symlinks=False)
    else:
        os.chown({"library": target, "folder": cache}[place], 12345, 12345)
    found = compile_answer(compilations.parent)
    assert found.parent == (cache if place == "library" else elsewhere)
    assert found.stat().st_uid == 0
    assert count(compilations) == 2


def test_what_was_checked_is_what_is_loaded(compilations, cache):
    """A link on the way is followed before the check, so that it cannot be turned afterwards."""
    real = compilations.parent / "real"
    real.mkdir()
    cache.parent.symlink_to(real)
    assert compile_answer(compilations.parent).parent == real / "qvlm_hf"


@pytest.mark.parametrize("name", ["gcc", "cc", "g++", "c++"])
def test_a_compiler_of_c_links_what_c_plus_plus_needs(tmp_path, monkeypatch, name):
    """Kernels throw; a C compiler's driver leaves the library out that this needs."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    source = tmp_path / "answer.cpp"
    source.write_text("""
        #include <vector>
        extern "C" int answer(int i) { try { return std::vector<int>{1}.at(i); } catch (...) { return 42; } }
    """)
    monkeypatch.setenv("CXX", name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert native.load(native.library, [source], ["-shared", "-fPIC"]).answer(7) == 42


def test_what_never_loads_is_compiled_once_a_folder(compilations, cache, elsewhere, monkeypatch):
    """An undefined symbol is no damaged file: compiling again gives the same."""
    source = compilations.parent / "answer.cpp"
    source.write_text('extern "C" int nowhere(); extern "C" int answer() { return nowhere(); }\n')
    monkeypatch.setattr(private_folders, "_TEMPORARY", ())
    with pytest.raises(OSError, match="undefined symbol"):
        native.load(native.library, [source], ["-shared", "-fPIC", "-Wl,-z,now"])
    assert len(list(compilations.iterdir())) == len([cache, elsewhere])
