"""qvlm_files.json: what we wrote into a saved directory, file by file, with digests.

Only a file that is on the list, and is as we wrote it, may be replaced by a later result. Names
would not do: people put a README.md or a vocab.json of their own beside a model.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from qvlm_hf.format.files import read_header, write_json

__all__ = ["FILE_LIST", "list_files", "relist_files", "written_entries"]

FILE_LIST = "qvlm_files.json"
_END = 2**20  # bytes of weights that are read


def list_files(folder: Path) -> None:
    """Writes the list of all files of a directory."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != FILE_LIST)
    write_json(
        folder / FILE_LIST, {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    )


def relist_files(folder: Path, names: Iterable[str]) -> None:
    """Enters files that we have written anew, or deleted; a directory without a list gets none."""
    if (listed := _read(folder)) is not None:
        for name in names:
            listed.pop(name, None)
            if (folder / name).is_file():
                listed[name] = _digest(folder / name)
        write_json(folder / FILE_LIST, listed)


def written_entries(folder: Path) -> list[Path] | None:
    """Finds the files and folders in a directory that are as we wrote them, and the list itself.

    In order of their names; None if we wrote nothing there.
    """
    listed = _read(folder)
    if listed is None:
        return None
    entries = (path for path in sorted(folder.iterdir()) if path.name != FILE_LIST)
    return [*(path for path in entries if _is_ours(path, folder, listed)), folder / FILE_LIST]


def _is_ours(path: Path, folder: Path, listed: dict[str, str]) -> bool:
    """A folder is, if it holds something and all of it is; a link leads to what is another's."""
    if path.is_symlink():
        return False
    if path.is_dir():
        inside = list(path.iterdir())
        return bool(inside) and all(_is_ours(each, folder, listed) for each in inside)
    return path.is_file() and listed.get(path.relative_to(folder).as_posix()) == _digest(path)


def _digest(path: Path) -> str:
    """Of a file; of weights, which take long to read, of their size, header and end."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        header, size = read_header(path), path.stat().st_size
    except ValueError:  # no such file: not as we wrote it
        return ""
    with path.open("rb") as opened:
        opened.seek(max(size - _END, 0))
        return hashlib.sha256(header + str(size).encode() + opened.read()).hexdigest()


def _read(folder: Path) -> dict[str, str] | None:
    """File -> digest; None where there is no list, or one that cannot be read."""
    path = folder / FILE_LIST
    try:
        listed = None if path.is_symlink() else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return listed if isinstance(listed, dict) else None
