"""C++ that is compiled where it runs: once per source, flags, compiler, processor and PyTorch, kept in the user's cache.

A library is written whole or not at all and ends with the digest of all before it, because one that lost its end loads, and kills the
process at the first call into it.

Processes that start together compile once: the first holds a lock, the others wait for it and find the library. The lock only saves work:
where it cannot be had, or not in time, a process compiles for itself and replaces an equal file.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypeVar

import torch

__all__ = ["address", "apart", "compiled", "compiler", "load", "load_module", "openmp"]

_SECONDS = 300
T = TypeVar("T")


def load(sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> ctypes.CDLL:
    """Compiles a library if the cache has none, and loads it.

    Args:
        sources: the file to compile, and those that it includes.
        flags: of the compiler.
        libraries: what to link with, as arguments after the source.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: nothing can be written or loaded.
        ValueError: CXX cannot be read.
        subprocess.TimeoutExpired: the compiler takes minutes.
    """
    path = compiled(sources, flags, libraries)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged in the cache: once more
        path.unlink(missing_ok=True)  # another process may have found it damaged too
        return ctypes.CDLL(str(compiled(sources, flags, libraries)))


def address(function: Any) -> int:  # noqa: ANN401 - of a ctypes library
    """Where a function of a library begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def load_module(name: str, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> ModuleType:
    """The same for an extension module of Python.

    Args:
        name: of the module, for which `PyInit_...` is named.
        sources: as in `load`.
        flags: as in `load`.
        libraries: as in `load`.

    Raises:
        ImportError: it cannot be imported.
        OSError, RuntimeError, ValueError, subprocess.TimeoutExpired: as in `load`.
    """
    path = compiled(sources, flags, libraries)
    try:
        return _module(name, str(path))
    except ImportError:  # as in `load`
        path.unlink(missing_ok=True)
        return _module(name, str(compiled(sources, flags, libraries)))


def _module(name: str, path: str) -> ModuleType:
    loader = ExtensionFileLoader(name, path)
    module = module_from_spec(ModuleSpec(name, loader, origin=path))
    loader.exec_module(module)
    return module


def apart(check: Callable[[], T]) -> T:
    """What `check` returns in a thread of its own, where the caller's modes, default device, autocast and inference mode do not reach.

    A check that one of them changed would speak against a kernel for the rest of the process.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(check).result()


def compiled(sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """The library for these sources, compiler and processor, from the cache or compiled now; arguments and errors as in `load`."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"no kernels for {platform.system()} on {platform.machine()}")
    command = compiler()
    version = _output(*command, "--version")
    words = (*command, *flags, torch.__version__)
    identity = [*(path.read_bytes() for path in sources), " ".join(words).encode(), version, _processor()]
    target = _cache() / f"{sources[0].stem}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:20]}.so"
    if not _intact(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not _intact(target):  # now, another process may have made it
                _compile([*command, *flags], sources[0], libraries, target)
    return target


def _compile(command: Sequence[str], source: Path, libraries: Sequence[str], target: Path) -> None:
    log = logging.getLogger(__name__)
    log.warning("compiling %s for this machine, once: up to a minute (kept in %s)", source.stem, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        _output(*command, "-o", str(made), str(source), "-Wl,--as-needed", *libraries)
        if not made.exists():
            raise RuntimeError(f"{command[0]} reported success and wrote nothing")
        code = made.read_bytes()
        made.write_bytes(code + hashlib.sha256(code).digest())  # the loader reads what the headers name, not what follows
        os.replace(made, target)


def _alone(target: Path) -> AbstractContextManager[object]:
    """Keeps other processes from compiling the same library; after `_SECONDS`, or where there are no locks, it goes on without."""
    try:
        lock = target.with_suffix(".lock").open("w")  # closing it lets go, as the end of a process does
    except OSError:  # where nothing can be written, the compiler says so
        return nullcontext()
    end = time.monotonic() + _SECONDS
    while not _taken(lock) and time.monotonic() < end:
        time.sleep(0.1)
    return lock


def _taken(lock: TextIO) -> bool:
    """Whether there is nothing to wait for: the lock is ours, or the file system has none."""
    import fcntl  # not at the top: Windows has none, and no kernels either

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def compiler() -> list[str]:
    """The command that compiles: CXX, with its flags if it has some, or the first of the usual names.

    Raises:
        RuntimeError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for name in asked[:1] or ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found, *asked[1:]]
    raise RuntimeError(f"CXX={asked[0]} is not there" if asked else "no C++ compiler found: install g++ or set CXX")


def openmp() -> list[str]:
    """The OpenMP runtime that PyTorch has loaded: a second one would be a second pool of threads."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [path for path in dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps) if "libgomp" in path or "libiomp" in path][:1]


def _intact(path: Path) -> bool:
    """Whether a library ends with the digest of all before: a cut one would end the process when its missing pages are touched."""
    try:
        code = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(code[: -hashlib.sha256().digest_size]).digest() == code[-hashlib.sha256().digest_size :]


def _output(*command: str) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RuntimeError(f"{Path(command[0]).name} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
    return done.stdout


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvlm_hf"


def _processor() -> bytes:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"|".join(dict.fromkeys(line for line in lines if line.startswith((b"model name", b"flags"))))
