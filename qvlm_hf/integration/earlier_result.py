"""What a save may replace: an earlier result of ours, known by its own content, and nothing else.

A directory is such a result if its config.json says so and every entry is one that we write.
Weights must carry our mark in their header, so that a full-precision model is never replaced.
Everything else is known by its name. Links are nobody's, because what they lead to is not ours.
"""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qvlm_hf.hub.model_card import CARD_NAME
from qvlm_hf.hub.payload import FILES, read_header
from qvlm_hf.integration.directory import INDEX_NAME
from qvlm_hf.integration.registry import QUANT_METHOD

__all__ = ["EXPORT_MARK", "OLD", "PARTIAL", "check_replaceable", "is_ours"]

EXPORT_MARK = "qvlm_export"  # in the header of every safetensors file of an export
_MARKS = {"qvlm_format", EXPORT_MARK}
_NAMES = (*FILES, INDEX_NAME, CARD_NAME, "qvlm_*.png")
_FOLDERS = {name.split("/")[0] for name in FILES if "/" in name}
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
# Folders of a save in progress begin so: what is written, and what it replaces.
PARTIAL, OLD = ".qvlm-partial-", ".qvlm-old-"


def check_replaceable(folder: Path, shown: object) -> None:
    """Checks that a directory holds an earlier result of ours and nothing besides.

    Args:
        folder: existing.
        shown: how messages call it.

    Raises:
        ValueError: it holds no such result, or something else too.
        OSError: it cannot be read.
    """
    entries = sorted(folder.iterdir())
    if left := [entry.name for entry in entries if entry.name.startswith((PARTIAL, OLD))]:
        remedy = "move what you need out of it and delete it"
        if len({name.startswith(OLD) for name in left}) > 1:  # the move itself was cut short
            remedy = (
                f"if none runs, both results are whole: move up what {OLD}... holds for the earlier one, or what "
                f"{PARTIAL}... holds for the new one, over files of the same name, and delete both folders"
            )
        raise ValueError(
            f"{shown}: holds {' and '.join(left)} of a save that was interrupted or still runs: {remedy}, or choose another directory."
        )
    if not _has_our_configuration(folder):
        raise ValueError(f"{shown}: holds no earlier result of qvlm_hf, so nothing there is replaced: choose another directory.")
    if foreign := [entry.name for entry in entries if not is_ours(entry)]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{shown}: holds {foreign[0]}{more}, which no earlier result of qvlm_hf wrote: move that away, or choose another directory."
        )


def is_ours(entry: Path) -> bool:
    """Whether a file or folder of a saved directory is one that we write."""
    return all(_is_our_file(file, entry.parent) for file in _files(entry))


def _files(entry: Path) -> Iterator[Path]:
    """The files of a folder that we may have written; anything else is itself."""
    if entry.name in _FOLDERS and entry.is_dir() and not entry.is_symlink():
        yield from entry.iterdir()
    else:
        yield entry


def _is_our_file(file: Path, folder: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    name = file.relative_to(folder).as_posix()
    if _WEIGHTS.fullmatch(name):
        return _has_mark(file)
    return any(fnmatchcase(name, pattern) for pattern in _NAMES)


def _has_mark(file: Path) -> bool:
    try:
        return not _MARKS.isdisjoint(json.loads(read_header(file))["__metadata__"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _has_our_configuration(folder: Path) -> bool:
    """Whether config.json is of a result of ours; that of an export needs weights that say so."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    exported = method == "compressed-tensors"  # other programs write these too
    return method == QUANT_METHOD or (exported and any(map(_has_mark, folder.glob("*.safetensors"))))
