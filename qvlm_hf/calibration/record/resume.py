"""Finished steps of a calibration in a directory: a stopped one goes on where it was.

    state.json             what the calibration is made from: nothing else may go on here
    STEP.safetensors       tensors of a finished step
    STEP.json              the rest of it; it comes last, without it the step never happened

Every file is written beside its place, brought to the disk and renamed. So a process that is killed
at any moment leaves whole steps alone. Steps that are repeated give the bits that they gave before:
the whole result is that of an undisturbed run (docs/decisions/0025).
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.record.coded import decode, encode
from qvlm_hf.calibration.record.inputs_hash import other_origin

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["SavedSteps", "alone_in", "check_resume_dir", "remove_state", "telling_how_to_go_on"]

_STATE, _PARTIAL = "state.json", ".partial"

_T = TypeVar("_T")


class SavedSteps:
    """Steps of one calibration, kept in a directory; without one nothing is kept.

    The first process writes, and all read.

    Args:
        folder: from `check_resume_dir`; None keeps nothing.
        origin: from `made_from` (inputs_hash.py).

    Raises:
        ValueError: the directory belongs to another calibration, or is damaged.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path | None = None, origin: Mapping[str, Any] | None = None) -> None:
        self._folder, self._finished = folder, frozenset[str]()
        if folder is None:
            return
        if ranks.is_main():
            self._begin(folder, origin)
        # what is there now, so that all processes agree while the first one writes more
        names = sorted(file.stem for file in folder.glob("*.json"))
        self._finished = frozenset(ranks.broadcast_object(names))

    def _begin(self, folder: Path, origin: Mapping[str, Any] | None) -> None:
        with _written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{_PARTIAL}"):  # of a process that was killed
                left.unlink()
        if any(file.name != _STATE for file in folder.glob("*.json")):
            found = _read_json(folder / _STATE)
            if not isinstance(found, dict):
                raise _damaged(folder / _STATE)
            if other := other_origin(found, json.loads(json.dumps(origin))):
                raise ValueError(
                    f"{folder}: was begun with {other}: go on as it was begun, or delete it to "
                    f"begin anew."
                )
        else:  # no step was finished: whoever mends a mistake goes on here
            self._write_json(_STATE, origin)

    def __contains__(self, step: str) -> bool:
        return step in self._finished

    def once(self, step: str, compute: Callable[[], _T], *, of_own_data: bool = False) -> _T:
        """What `compute` returns: read if the step was finished before, else computed and kept.

        A step `of_own_data` differs between processes: where there are several it is not kept.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be written, as on a full disk; earlier steps stay.
        """
        if of_own_data and ranks.world_size() > 1:
            return compute()
        if step in self:
            kept: _T = self.read(step)
            return kept
        value = compute()
        self.write(step, value)
        return value

    def read(self, step: str) -> Any:
        """What was kept of a finished step.

        Raises:
            ValueError: the file is damaged.
        """
        folder = self._folder or Path()
        entry, file = _read_json(folder / f"{step}.json"), folder / f"{step}.safetensors"
        try:
            tensors = load_file(file) if file.exists() else {}
            return decode(entry, tensors)
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file) from error

    def write(self, step: str, value: Any) -> None:
        """Keeps what a finished step found, as `once`.

        Raises:
            OSError: it cannot be written.
        """
        if self._folder is None or not ranks.is_main():
            return
        entry, tensors = encode(value)
        if tensors:
            self._write_file(f"{step}.safetensors", lambda path: save_file(tensors, path))
        self._write_json(f"{step}.json", entry)

    def _write_json(self, name: str, entry: Any) -> None:
        self._write_file(name, lambda path: path.write_text(json.dumps(entry), encoding="utf-8"))

    def _write_file(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a file beside its place and renames it when it is on the disk."""
        folder = self._folder or Path()
        partial = folder / f"{name}{_PARTIAL}"
        with _written(folder):
            write(partial)
            with partial.open("rb+") as opened:
                os.fsync(opened.fileno())
            partial.replace(folder / name)


def check_resume_dir(folder: str | os.PathLike[str]) -> Path:
    """Checks that a directory is empty, holds steps, or can be made. Returns its real path.

    Raises:
        ValueError: it is a file, holds something else, or may not be written.
    """
    path = Path(os.path.realpath(os.path.expanduser(folder)))
    if os.path.lexists(path) and not path.is_dir():
        kind = "a link to itself" if path.is_symlink() else "a file"
        raise ValueError(f"{path}: is {kind}: choose a directory to resume in.")
    if path.is_dir() and any(path.iterdir()) and not (path / _STATE).exists():
        raise ValueError(
            f"{path}: holds something else than a stopped calibration: choose another directory to "
            f"resume in."
        )
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(
            f"{path}: cannot be written: choose a directory to resume in that you may write to."
        )
    return path


def remove_state(folder: Path) -> None:
    """Deletes the steps, and the directory if it holds nothing else.

    What says that it is a directory of steps goes last: a process killed in between leaves one that
    can be used or deleted.
    """
    if not (folder / _STATE).exists():
        return
    for pattern in ("*.json", "*.safetensors", f"*{_PARTIAL}"):
        for file in folder.glob(pattern):
            if file.name != _STATE:
                file.unlink()
    (folder / _STATE).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Inside, no other calibration goes on in the directory; a killed one holds nothing.

    Raises:
        ValueError: another one is running in it.
        OSError: it cannot be made.
    """
    if folder is None or fcntl is None or not ranks.is_main():
        yield
        return
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another calibration is running in it: wait until that ends, or choose "
                f"another directory."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)


@contextmanager
def telling_how_to_go_on(folder: Path | None) -> Iterator[None]:
    """Inside, Ctrl-C says where finished steps are kept, if there are any."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if folder is None or not (folder / _STATE).exists():
            raise
        kept = f"what is finished is kept in {folder}: run the same again to go on"
        raise KeyboardInterrupt(kept) from stop


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """One kind of error for a directory that cannot be written; safetensors has its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(
            f"{folder}: cannot be written ({reason}): make room there or choose another directory "
            f"to resume in; finished steps are kept."
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(file) from error


def _damaged(file: Path) -> ValueError:
    return ValueError(f"{file}: is damaged: delete {file.parent} to begin the calibration anew.")
