"""Anything that a user passes as a data set -> rows with their places, not yet checked."""

import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from qvlm_hf.calibration.samples.errors import place, sample_error
from qvlm_hf.calibration.samples.json_files import read_entries, read_object
from qvlm_hf.calibration.samples.sample import Sample
from qvlm_hf.errors import first_line

__all__ = ["Row", "is_empty", "read_rows", "shuffled", "source_name"]

# Packages whose tables hold samples as columns -> how to get rows of them.
_TABLES = {
    "pandas": "datasets.Dataset.from_pandas(dataset)",
    "polars": "dataset.to_dicts()",
    "pyarrow": "dataset.to_pylist()",
}
_DEPTH = 5  # of a picture in a row: row, messages, message, content, part
_SEARCHED = 10_000  # rows that are read for one with a picture
_CONTENT = {"messages", "conversations", "image", "question", "answer", "choices"}
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>\w+))?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry of a source; `ignored` collects its keys that name no content."""

    origin: str
    value: Any
    folder: Path = Path()
    ignored: list[str] = field(default_factory=list)

    def error(self, key: str, problem: str, remedy: str) -> ValueError:
        """The error about one of its keys, or about the whole row (key "")."""
        return sample_error(place(self.origin, key), problem, remedy)


def source_name(dataset: object) -> str:
    """How messages call a data set."""
    return str(dataset) if isinstance(dataset, (str, os.PathLike)) else "dataset"


def shuffled(available: int, seed: int) -> list[int]:
    """All indices in a seeded order."""
    indices = list(range(available))
    random.Random(seed).shuffle(indices)
    return indices


def is_empty(value: object) -> bool:
    """Whether a key with this value is as good as absent: null, or "", [], {}."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def read_rows(dataset: object, num_samples: int | None, seed: int) -> list[Row]:
    """Reads a data set; arguments as in `load_samples`.

    Returns:
        All of a file or list; of a Hub data set or another indexable one `num_samples` in the
        seeded order (and one more, if that many rows show no picture and a later one does), of an
        iterable the first.

    Raises:
        ValueError: it cannot be read, or is nothing that could be.
    """
    if isinstance(dataset, (str, os.PathLike)):
        if not os.fspath(dataset):
            raise sample_error("dataset", "is empty", "give a path, a Hub id, or a list of samples")
        return _read_path(dataset, num_samples, seed)
    if not isinstance(dataset, (list, tuple)):
        _check_type(dataset)
        if _is_indexable(dataset):
            return _read_indexable(cast(Any, dataset), "dataset[{}]", num_samples, seed)
        dataset = islice(cast(Iterable[object], dataset), num_samples)
    return [Row(origin=f"dataset[{index}]", value=value) for index, value in enumerate(dataset)]


def _is_indexable(dataset: object) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _check_type(dataset: object) -> None:
    """Refuses what holds samples in a form of its own, and what holds none."""
    kind, package = type(dataset).__name__, type(dataset).__module__.partition(".")[0]
    if package in _TABLES:
        raise sample_error(
            "dataset", f"is a {package} {kind}", f"give its rows: {_TABLES[package]}"
        )
    if isinstance(dataset, Mapping):
        problem = f"is a mapping with the keys {', '.join(map(str, dataset)) or 'none'}"
        content = dataset.keys() & _CONTENT
        if not content:
            remedy = 'give a list of samples, or one split such as dataset["train"]'
        elif any(isinstance(dataset[key], str) for key in content):
            problem, remedy = f"{problem}, a single sample", "give a list of samples: [dataset]"
        else:
            problem = f"{problem}, which are columns"
            remedy = "give its rows: datasets.Dataset.from_dict(dataset)"
        raise sample_error("dataset", problem, remedy)
    raw = isinstance(dataset, (bytes, bytearray))
    if not raw and (isinstance(dataset, Iterable) or _is_indexable(dataset)):
        return
    remedy = "give a path, a Hub id, or a list or other iterable of samples"
    if isinstance(dataset, type):
        remedy = "give an object of it"
    elif callable(dataset):
        remedy = "call it and give what it returns"
    elif hasattr(dataset, "__getitem__") and not raw:
        remedy = "it has no length: give it __len__, or give a list of its samples"
    raise sample_error("dataset", f"is {kind}", remedy)


def _read_indexable(
    dataset: Sequence[object], origin: str, num_samples: int | None, seed: int
) -> list[Row]:
    """Rows of an indexable dataset, chosen before they are read: that decodes their pictures."""

    def row(index: int) -> Row:
        where = origin.format(index)
        try:
            return Row(origin=where, value=dataset[index])
        except Exception as error:  # foreign code: it may raise anything
            problem = f"{kind} does not give it ({type(error).__name__}: {first_line(error)})"
            raise sample_error(place(where), problem, "give a list of samples") from error

    kind = type(dataset).__name__
    try:
        order = shuffled(len(dataset), seed)
    except TypeError as error:  # a 0-dimensional array
        problem = f"is {kind} without a length ({first_line(error)})"
        raise sample_error("dataset", problem, "give a list of samples") from error
    if num_samples is None or num_samples >= len(order):
        return [row(index) for index in range(len(order))]
    rows = {index: row(index) for index in order[:num_samples]}
    if not any(_shows_picture(found.value) for found in rows.values()):
        # rows without a picture are cheap to read, so the search for one may go on for a while
        for index in order[num_samples : num_samples + _SEARCHED]:
            if _shows_picture((found := row(index)).value):
                rows[index] = found
                break
    return [rows[index] for index in sorted(rows)]


def _shows_picture(value: object, depth: int = _DEPTH) -> bool:
    """Whether an unchecked row holds a picture where a format reads one: no deeper than `depth`."""
    if isinstance(value, Sample):
        return bool(value.pictures())
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(
            (key in ("image", "path") and not is_empty(item)) or _shows_picture(item, depth - 1)
            for key, item in value.items()
        )
    items = value if isinstance(value, (list, tuple)) else ()
    return any(_shows_picture(item, depth - 1) for item in items)


def _read_path(dataset: "str | os.PathLike[str]", num_samples: int | None, seed: int) -> list[Row]:
    path = Path(os.path.expanduser(dataset))
    if path.is_file():
        if path.suffix not in (".json", ".jsonl"):
            remedy = "give a .jsonl file, a .json file with a list, or a ScienceQA folder"
            raise sample_error(place(str(path)), f'ends in "{path.suffix}"', remedy)
        return [
            Row(origin=f"{path.name}:{line}", value=value, folder=path.parent)
            for line, value in read_entries(path)
        ]
    if path.is_dir():
        return _read_scienceqa(path, "train")
    head, _, split = str(dataset).rpartition(":")
    if head and (folder := Path(os.path.expanduser(head))).is_dir():
        return _read_scienceqa(folder, split)
    hub_id = _HUB_ID.fullmatch(dataset) if isinstance(dataset, str) else None
    if hub_id and path.suffix not in (".json", ".jsonl"):
        return _read_hub(hub_id["name"], hub_id["split"] or "train", num_samples, seed)
    raise ValueError(f"{dataset}: no such file or folder (looked in {Path.cwd()})")


def _read_scienceqa(folder: Path, split: str) -> list[Row]:
    """Reads the folder as its authors publish it (github.com/lupantech/ScienceQA)."""
    names = ("problems.json", "pid_splits.json")
    for name in names:
        if not (folder / name).is_file():
            problem = f"is no ScienceQA folder ({name} is missing)"
            remedy = "give such a folder, or a .jsonl or .json file"
            raise sample_error(place(str(folder)), problem, remedy)
    problems, splits = (read_object(folder / name) for name in names)
    if split not in splits:
        problem = f'has no split "{split}"'
        remedy = f"choose one of {', '.join(splits)}"
        raise sample_error(place(f"{folder}/pid_splits.json"), problem, remedy)
    if not splits[split]:
        problem = f'has nothing in split "{split}"'
        remedy = f"name another behind the folder, as {folder.name}:test"
        raise sample_error(place(f"{folder}/pid_splits.json"), problem, remedy)
    rows = []
    for pid in splits[split]:
        origin = f"{folder.name}/problems.json problem {pid}"
        if not isinstance(entry := problems.get(pid), Mapping):
            problem = f'no such problem, though pid_splits.json lists it under "{split}"'
            raise sample_error(place(origin), problem, "fetch both files anew")
        value = dict(entry)
        # A problem names its own folder: "minival" is made of problems from "val".
        images = Path("images", str(value.get("split", split)), pid)
        value["image"] = images / str(value["image"]) if value.get("image") else None
        rows.append(Row(origin=origin, value=value, folder=folder))
    return rows


def _read_hub(name: str, split: str, num_samples: int | None, seed: int) -> list[Row]:
    nowhere = f'"{name}" is no file or folder here, and'
    try:
        from datasets import load_dataset  # lazy: an optional dependency, seconds to import
    except ImportError as error:
        raise ValueError(
            f"{nowhere} for the Hub datasets is missing: pip install datasets"
        ) from error
    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # the Hub, the network or the repository's own files
        raise ValueError(
            f'{nowhere} the Hub does not give its split "{split}" ({first_line(error)})'
        ) from error
    return _read_indexable(dataset, f"{name}:{{}}", num_samples, seed)
