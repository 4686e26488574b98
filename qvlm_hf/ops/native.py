"""C++ that is compiled where it runs and kept in the user's cache.

The key is a hash of sources, flags, compiler, processor and PyTorch. QVLM_CPU names a class of
processors (`_CLASSES`) to compile for instead of the one at hand: for tests and comparisons.

It is kept in a private folder (private_folders.py): a library is only loaded from where nobody else
could have put it.

A library is written whole or not at all and ends with the digest of all before it, because one that
lost its end loads, and kills the process at the first call into it.

Processes that start together compile once: the first holds a lock, the others wait for it and find
the library. The lock only saves work: where it cannot be had, or not in time, a process compiles
for itself and replaces an equal file.
"""

import ctypes
import errno
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypeVar

import torch

from qvlm_hf.ops.private_folders import cache_folders, make_private, stranger

__all__ = ["ERRORS", "address", "compiler", "in_clean_thread", "library", "load", "module"]
__all__ += ["openmp", "sources"]

# Of `load`: no compiler or a failing one, no folder, a CXX that shlex cannot read, minutes of work.
ERRORS = (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired)

_SECONDS = 300
# What QVLM_CPU stands for: flags instead of -march=native, and what the processor must have.
_CLASSES = {
    "avx2": (("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma", "f16c")),
    "avx2-vnni": (("-march=native", "-DQVLM_YMM"), ()),
    "portable": ((), ()),
}
_ROOM = 64 * 2**20  # bytes: the compiler's temporary files and the library
T = TypeVar("T")


def sources(*names: str) -> tuple[Path, ...]:
    """Files of the package's C++: those to compile, and those that they include."""
    return tuple(Path(__file__).with_name("csrc") / name for name in names)


def library(path: Path) -> ctypes.CDLL:
    """Loads a library, for `load`."""
    return ctypes.CDLL(str(path))


def module(name: str, path: Path) -> ModuleType:
    """Loads an extension module, for `load`; `PyInit_...` has its name."""
    loader = ExtensionFileLoader(name, str(path))
    made = module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    loader.exec_module(made)
    return made


def address(function: Any) -> int:
    """Where a function of a library begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def in_clean_thread(check: Callable[[], T]) -> T:
    """What `check` returns in a thread that the caller's modes, autocast and defaults do not reach.

    A check that one of them changed would speak against a kernel for the rest of the process.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(check).result()


def load(
    use: Callable[[Path], T],
    sources: Sequence[Path],
    flags: Sequence[str],
    libraries: Sequence[str] = (),
) -> T:
    """What `use` returns for a compiled file in the first folder where it can be kept and loaded.

    Args:
        use: `library`, `module` with a name, or `Path` for the file itself.
        sources: files to compile (.cpp), side by side, the first names the library; and those that
            they include.
        flags: of the compiler; -march=native becomes what QVLM_CPU asks for.
        libraries: what to link with, as arguments after the objects.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: no folder can be written and loaded from.
        ValueError: CXX cannot be read, or QVLM_CPU asks for what is not there.
        subprocess.TimeoutExpired: the compiler takes minutes.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"no kernels for {platform.system()} on {platform.machine()}")
    command, flags = compiler(), _of_class(flags)
    version = _output(*command, "--version")
    words = (*command, *flags, torch.__version__)
    contents = (path.read_bytes() for path in sources)
    identity = [*contents, " ".join(words).encode(), version, _processor()]
    name = f"{sources[0].stem}-{hashlib.sha256(b'|'.join(identity)).hexdigest()[:20]}.so"
    refused: list[str] = []
    compile_to = partial(_compile, [*command, *flags], sources, libraries, refused)
    for folder in cache_folders():
        try:
            target = make_private(folder) / name
            new = _keep(target, compile_to)
            try:
                return use(target)
            except (OSError, ImportError):  # damaged, or of another machine: once more
                target.unlink(missing_ok=True)  # another process may have found it damaged too
                if new:
                    raise
                _keep(target, compile_to)
                return use(target)
        # read-only, full, noexec, open to others: the next folder
        except (OSError, ImportError) as error:
            refused.append(str(error) if str(folder) in str(error) else f"{folder}: {error}")
    raise OSError(
        f"{'; '.join(refused)} (name a directory of yours in XDG_CACHE_HOME that can be written "
        f"and executed from)"
    )


def _keep(target: Path, compile_to: Callable[[Path], None]) -> bool:
    """Compiles the library if it is not there; returns whether it did."""
    if not _intact(target):
        with _alone(target):
            if not _intact(target):  # now, another process may have made it
                compile_to(target)
                return True
    return False


def _compile(
    command: Sequence[str],
    sources: Sequence[Path],
    libraries: Sequence[str],
    refused: Sequence[str],
    target: Path,
) -> None:
    if shutil.disk_usage(target.parent).free < _ROOM:
        reason = f"{os.strerror(errno.ENOSPC)}, compiling takes {_ROOM >> 20} MiB"
        raise OSError(errno.ENOSPC, reason, str(target.parent))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        why = f", because of {'; '.join(refused)}" if refused else ""
        log, start = logging.getLogger(__name__), time.monotonic()
        log.warning(
            "compiling %s for this machine, once: about 10 seconds on two cores (kept in %s%s)",
            *(sources[0].stem, target.parent, why),
        )
        made = Path(folder) / target.name
        # gcc and cc, which PEFT's BOFT leaves in CXX, compile C++ and link without its library
        is_cxx = re.search(r"\+\+(-[\d.]+)?$", command[0])
        runtime = [] if is_cxx else ["-lstdc++"]
        parts = [str(path) for path in sources if path.suffix == ".cpp"]
        if len(parts) > 1:
            objects = [str(Path(folder, Path(part).stem).with_suffix(".o")) for part in parts]
            jobs = [(*command, "-c", "-o", *pair) for pair in zip(objects, parts, strict=True)]
            with ThreadPoolExecutor(len(jobs)) as pool:
                list(pool.map(lambda words: _output(*words, temporary=folder), jobs))
            parts = objects
        arguments = ("-o", str(made), *parts, "-Wl,--as-needed", *libraries, *runtime)
        _output(*command, *arguments, temporary=folder)
        if not made.exists():
            raise RuntimeError(f"{command[0]} reported success and wrote nothing")
        code = made.read_bytes()
        # the loader reads what the headers name, not what follows
        made.write_bytes(code + hashlib.sha256(code).digest())
        made.chmod(0o755)  # whatever the umask is: what others can write is not loaded
        os.replace(made, target)
        log.info("compiled %s in %.1f seconds", sources[0].stem, time.monotonic() - start)


def _alone(target: Path) -> AbstractContextManager[object]:
    """Keeps other processes from compiling the same, for `_SECONDS`, where there are locks."""
    try:
        lock = target.with_suffix(".lock").open("w")  # closed when it is dropped: that lets go
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
    """The command that compiles: CXX, with its flags if it has some, or the first usual name.

    Raises:
        RuntimeError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for name in asked[:1] or ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found, *asked[1:]]
    if asked:
        raise RuntimeError(f"CXX={asked[0]} is not there")
    raise RuntimeError("no C++ compiler found: install g++ or set CXX")


def _of_class(flags: Sequence[str]) -> list[str]:
    """The flags for the class of processors that QVLM_CPU names, or as they are."""
    asked = os.environ.get("QVLM_CPU", "")
    if not asked:
        return list(flags)
    if asked not in _CLASSES:
        raise ValueError(f"QVLM_CPU={asked} must be one of {', '.join(_CLASSES)}")
    instead, needed = _CLASSES[asked]
    words = _processor().split()
    if missing := [name for name in needed if name.encode() not in words]:
        raise ValueError(f"QVLM_CPU={asked}: this processor has no {missing[0]}")
    return [word for flag in flags for word in (instead if flag == "-march=native" else (flag,))]


def openmp() -> list[str]:
    """The OpenMP runtime that PyTorch has loaded: another would be a second pool of threads."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[-1] for line in maps)
    return [path for path in paths if "libgomp" in path or "libiomp" in path][:1]


def _intact(path: Path) -> bool:
    """Whether a library is ours alone and ends with the digest of all before.

    A cut one would end the process when its missing pages are touched.
    """
    try:
        code, mine = path.read_bytes(), stranger(path) is None
    except (FileNotFoundError, PermissionError):
        return False
    size = hashlib.sha256().digest_size
    return mine and hashlib.sha256(code[:-size]).digest() == code[-size:]


def _output(*command: str, temporary: str | None = None) -> bytes:
    """What a command prints; temporary files go to `temporary`: /tmp may be read-only or full."""
    environment = None if temporary is None else {**os.environ, "TMPDIR": temporary}
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, env=environment)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{Path(command[0]).name} failed: {first}")
    return done.stdout


def _processor() -> bytes:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"|".join(dict.fromkeys(x for x in lines if x.startswith((b"model name", b"flags"))))
