"""The file of `--json`, looked at before hours of measuring: a result should not be lost because it cannot be written.

An earlier result is replaced, as one file; anything else that is there stays.
"""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

__all__ = ["check_result_file", "write_result_file"]

# What the results of `qvlm evaluate` and of `qvlm bench` hold, of any version.
_KEYS = ({"accuracy", "questions"}, {"threads", "versions", "rows"})


def check_result_file(name: str) -> None:
    """Checks that `--json name` can be written.

    What is there stays as it is: opening it would empty a file and end a pipe.

    Raises:
        ValueError: it is a directory, holds something else than an earlier result or may not be
            written, or its directory does not exist or takes no such file.
    """
    try:
        path = Path(name).resolve()
        if path.is_dir():
            raise ValueError(f"--json {name}: is a directory: name a file.")
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"--json {name}: may not be written: name another file.")
        if path.is_file() and not _is_result(path):
            raise ValueError(
                f"--json {name}: holds no earlier result, so it is not replaced: name another file."
            )
        if not path.exists():
            path.touch(exist_ok=False)
            path.unlink()
        if not path.exists() or path.is_file():  # else a pipe or a device
            partial = _partial(path)
            partial.touch(exist_ok=False)
            partial.unlink()
    except FileNotFoundError:
        raise ValueError(
            f"--json {name}: the directory does not exist: create it or name another."
        ) from None
    except OSError as error:
        raise ValueError(
            f"--json {name}: cannot be written ({error.strerror}): name another file."
        ) from error


def write_result_file(name: str, result: dict[str, Any]) -> None:
    """Writes a result as JSON, all or nothing, into a file that `check_result_file` found fit.

    Raises:
        OSError: it cannot be written; an earlier result stays.
    """
    path, text = Path(name).resolve(), json.dumps(result, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text, encoding="utf-8")
        return
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".qvlm-{uuid4().hex[:8]}")


def _is_result(path: Path) -> bool:
    """Whether a file is empty or holds what one of our commands wrote."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text else None
    except (ValueError, RecursionError):  # the latter for JSON nested very deep
        return False
    return not text or (isinstance(content, dict) and any(keys <= content.keys() for keys in _KEYS))
