"""Built models, kept in a cache directory of the user until their recipe changes."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["cached", "files_of"]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The directory that `build` fills, built where the sources of this folder are new.

    The cache is $XDG_CACHE_HOME/qvlm_hf_tests, or ~/.cache/qvlm_hf_tests.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        if source.stem in ("pictures", name):
            digest.update(source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvlm_hf_tests"
    target = root / f"{name}-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}-building-") as folder:
            build(Path(folder) / "built")
            (Path(folder) / "built").rename(target)
    return target


def files_of(package: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported; skips the test without it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs pip install {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))
