"""Where full-precision weights came from: a Hub id and commit, or a directory's name, never a path.

A name that looks like a Hub id may be a directory that is gone by now, so it counts as one only
with evidence: weights read from a snapshot of the Hub cache, or at least a configuration in that
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils.hub import extract_commit_hash

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["origin"]


def origin(model: PreTrainedModel, files: Sequence[str] = ()) -> dict[str, str]:
    """What provenance says of the full-precision model.

    `files` are its weights, as Transformers resolved them; empty for a model that was in memory.

    Returns:
        `base_model` and, where the files tell it, `base_model_revision`; or `base_directory`; or
        nothing.
    """
    name = str(model.config.name_or_path or "")
    if not name:
        return {}
    if not Path(name).exists():
        commit = extract_commit_hash(files[0], None) if files else None
        if commit is not None:
            return {"base_model": name, "base_model_revision": commit}
        if _in_cache(name):
            return {"base_model": name}
    return {"base_directory": Path(name).resolve().name}


def _in_cache(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
