"""The file of `--json`, looked at before hours of measuring: a result should not be lost because it cannot be written."""

import os
from pathlib import Path

__all__ = ["check_result_file"]


def check_result_file(name: str) -> None:
    """Checks that `--json name` can be written. What is there stays as it is: opening it would empty a file and end a pipe.

    Raises:
        ValueError: it is a directory or may not be written, or its directory does not exist or takes no such file.
    """
    path = Path(name)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        if path.is_dir():
            raise ValueError(f"--json {name}: is a directory: name a file.") from None
        if not os.access(path, os.W_OK):
            raise ValueError(f"--json {name}: may not be written: name another file.") from None
    except FileNotFoundError:
        raise ValueError(f"--json {name}: the directory does not exist: create it or name another.") from None
    except OSError as error:
        raise ValueError(f"--json {name}: cannot be written ({error.strerror}): name another file.") from error
    else:
        path.unlink()
