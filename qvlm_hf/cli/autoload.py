"""`qvlm autoload install|remove|status`: every Python of the environment knows quantized models.

A `.pth` file holds the text of hf/autoload_hook.py. It is written here and nowhere else: installing
the package alone changes nothing.
"""

import argparse
import os
import site
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from qvlm_hf.hf import autoload_hook

__all__ = ["PTH_NAME", "add_arguments", "pth_text", "run"]

PTH_NAME = "qvlm_hf_autoload.pth"

# A program that never heard of qvlm_hf reads a configuration.
_CHECK = """
import sys
from importlib.util import find_spec
if find_spec("qvlm_hf") is None:
    sys.exit("a new Python process finds no qvlm_hf: install it into this environment")
from transformers.quantizers.auto import AutoQuantizationConfig
AutoQuantizationConfig.from_dict({"quant_method": "qvlm"})
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    status = "status: 0 if it is installed and works, else 1"
    add("action", choices=("install", "remove", "status"), help=status)
    user = "install or remove in the user's own directory, not the environment's"
    add("--user", action="store_true", help=user)


def run(options: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: the directory may not be written, or this Python reads no user directory.
    """
    if options.action == "status":
        return _status()
    target = _target(options.user)
    if options.action == "install":
        _change(target, pth_text())
        return _status()
    found = target.exists()
    _change(target, None)
    print(f"removed {target}" if found else f"not installed in {target.parent}")
    return 0


def pth_text() -> str:
    """The file: a remark and the one line that Python executes at its start.

    The line compiles a finder alone, and the hook when Transformers' table is imported: parsing the
    hook at every start took three times as long. A virtual environment executes it twice, so it
    looks for its own finder first. It is ASCII: Python reads the file in the locale's encoding.
    """
    hook = Path(autoload_hook.__file__).read_text(encoding="utf-8")
    teach = f"(space := {{}}, exec({hook!a}, space), space['find'](cls))[-1]"
    find = f"{teach} if name == {autoload_hook.TABLE!r} and not cls.asking else None"
    arguments = "cls, name, path=None, target=None"
    members = f"{{'asking': False, 'find_spec': classmethod(lambda {arguments}: {find})}}"
    there = "any(getattr(finder, '__name__', '') == 'QVLMFinder' for finder in sys.meta_path)"
    line = f"import sys; {there} or sys.meta_path.insert(0, type('QVLMFinder', (), {members}))"
    return f"# Written by `qvlm autoload install`, deleted by `qvlm autoload remove`.\n{line}\n"


def _target(user: bool) -> Path:
    if not user:
        return Path(sysconfig.get_path("purelib")) / PTH_NAME
    if not site.ENABLE_USER_SITE:
        raise ValueError(
            "--user: this Python reads no user directory, as in every virtual environment: "
            "leave --user out."
        )
    return Path(site.getusersitepackages()) / PTH_NAME


def _change(target: Path, text: str | None) -> None:
    """Writes or deletes the file, wholly or not at all: Python may start at any moment."""
    # without .pth at the end: Python does not read it
    partial = target.with_name(f"{target.name}.{uuid4().hex[:8]}")
    try:
        if text is None:
            target.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="ascii")
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ValueError(
            f"{target.parent}: may not be written ({error.strerror or error}): "
            "use an environment of your own, or --user."
        ) from error


def _status() -> int:
    """Prints where the file lies and whether it does its work; returns the exit status."""
    places = [_target(user) for user in (False, True) if not user or site.ENABLE_USER_SITE]
    installed = [place for place in places if place.is_file()]
    if not installed:
        print(f"not installed in {' or '.join(str(place.parent) for place in places)}")
        return 1
    for place in installed:
        current = place.read_bytes() == pth_text().encode()
        note = "" if current else ", from another version: run qvlm autoload install"
        print(f"installed: {place}{note}")
    # -P: a qvlm_hf that merely lies in the working directory is not installed
    done = subprocess.run([sys.executable, "-P", "-c", _CHECK], capture_output=True, text=True)
    if done.returncode == 0:
        print("works: programs load quantized models without importing qvlm_hf")
        return 0
    reasons = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    print(f"does not work: {reasons[-1]}")
    return 1
