"""Values of `QVLMConfig` beside the options: publishing, callbacks, and what files hold."""

import json
import os
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qvlm_hf.calibration.values import shown, to_plain
from qvlm_hf.errors import first_line
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import canonical_name

__all__ = [
    "FORMAT_VERSION",
    "check_version",
    "checked_callbacks",
    "checked_folder",
    "checked_modules",
    "checked_provenance",
    "checked_publishing",
]

FORMAT_VERSION = 1
_MAX_MODULES = 100_000  # a model of 70 B parameters has about 600 linear modules
_MAX_CALLBACKS = 1000


def check_version(version: object) -> None:
    """Raises ValueError for a `format_version` that this version does not read."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"format_version={version!r} must be an integer of at least 1: the file is damaged."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version} is newer than {FORMAT_VERSION}, which this version reads: "
            f"upgrade qvlm_hf (pip install -U qvlm_hf)."
        )


def checked_publishing(push_to_hub: Any, hub_model_id: Any, hub_private: Any) -> dict[str, Any]:
    """Where to publish, as plain values; raises ValueError where they do not go together."""
    push_to_hub, hub_private = map(
        to_plain, ("push_to_hub", "hub_private"), (push_to_hub, hub_private)
    )
    hub_model_id = to_plain("hub_model_id", hub_model_id)
    if not isinstance(push_to_hub, bool):
        raise ValueError(f"push_to_hub={push_to_hub!r} must be True or False.")
    if hub_private is not None and not isinstance(hub_private, bool):
        raise ValueError(f"hub_private={hub_private!r} must be True, False or None.")
    if push_to_hub and hub_model_id is None:
        raise ValueError("push_to_hub=True must know where: pass hub_model_id='owner/name'.")
    if hub_model_id is not None:
        try:
            validate_repo_id(hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id={hub_model_id!r}: {first_line(error)}.") from error
    return {"push_to_hub": push_to_hub, "hub_model_id": hub_model_id, "hub_private": hub_private}


def checked_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """The callbacks as a tuple; raises ValueError where one has no method that is called."""
    try:
        kept = tuple(islice(callbacks, _MAX_CALLBACKS + 1))
    except TypeError:  # a tensor without dimensions has __iter__ as well
        kept = None
    if kept is None or isinstance(callbacks, str) or len(kept) > _MAX_CALLBACKS:
        raise ValueError(f"callbacks={shown(callbacks)} must be a list of objects.")
    for callback in kept:
        if not (hasattr(callback, "on_step") or hasattr(callback, "on_calibration_end")):
            raise ValueError(
                f"callback {shown(callback)} must have on_step(name, done, total) or "
                f"on_calibration_end(model, report)."
            )
    return kept


def checked_folder(name: str, folder: Any) -> str | None:
    """The field `name` as text; raises ValueError where it names no directory."""
    if folder is None:
        return None
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ValueError(f"{name}={shown(folder)} must be the name of a directory.")
    return str(os.fspath(folder))


def checked_modules(modules: Mapping[str, Any] | None) -> dict[str, QuantScheme]:
    """Canonical name -> scheme; raises ValueError for an entry of a damaged checkpoint."""
    if modules is None:
        return {}
    if not isinstance(modules, Mapping) or len(modules) > _MAX_MODULES:
        raise ValueError(
            f"modules must be a mapping of at most {_MAX_MODULES} module names: the checkpoint is "
            f"damaged."
        )
    checked = {}
    for name, entry in modules.items():
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII)
            or canonical_name(name) != name
        ):
            raise ValueError(
                f"modules: {shown(name)} is no canonical module name: the checkpoint is damaged."
            )
        try:
            checked[name] = (
                entry
                if isinstance(entry, QuantScheme)
                else QuantScheme.from_dict(to_plain("entry", entry))
            )
        except ValueError as error:
            raise ValueError(f"modules: {name}: {error}") from error
    return checked


def checked_provenance(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """What JSON holds of it; raises ValueError where it is no mapping of such values."""
    if provenance is None:
        return {}
    if not isinstance(provenance, Mapping):
        raise ValueError(f"provenance={shown(provenance)} must be a mapping.")
    plain = to_plain("provenance", provenance)
    try:
        return json.loads(json.dumps(plain, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"provenance must hold what JSON can: {error}.") from error
