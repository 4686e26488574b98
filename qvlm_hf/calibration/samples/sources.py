"""Whatever the user may pass as a data set -> rows: entries of it, each with the place that it comes from, not yet checked."""

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from qvlm_hf.calibration.samples.errors import first_line
from qvlm_hf.calibration.samples.sample import Sample

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
    """One entry of a source, not yet checked; `ignored` collects the keys of it that name no content."""

    origin: str
    value: Any
    folder: Path = Path()
    ignored: list[str] = field(default_factory=list)

    def error(self, key: str, problem: str) -> ValueError:
        """What to raise about one of its keys."""
        return ValueError(f'{self.origin}: key "{key}" {problem}')


def source_name(dataset: object) -> str:
    """How messages call a data set."""
    return str(dataset) if isinstance(dataset, (str, os.PathLike)) else "dataset"


def shuffled(available: int, seed: int) -> list[int]:
    """All indices in a seeded order."""
    indices = list(range(available))
    random.Random(seed).shuffle(indices)
    return indices


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
        return _read_path(dataset, num_samples, seed)
    if isinstance(dataset, (list, tuple)):
        return [Row(origin=f"dataset[{index}]", value=value) for index, value in enumerate(dataset)]
    _check_type(dataset)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return _rows_of(cast(Sequence[object], dataset), "dataset[{}]", num_samples, seed)
    first = enumerate(islice(cast(Iterable[object], dataset), num_samples))
    return [Row(origin=f"dataset[{index}]", value=value) for index, value in first]


def _check_type(dataset: object) -> None:
    """Refuses what holds samples in a form of its own, and what holds none."""
    kind, package = type(dataset).__name__, type(dataset).__module__.partition(".")[0]
    if package in _TABLES:
        raise ValueError(f"dataset is a {package} {kind}; give its rows: {_TABLES[package]}")
    if isinstance(dataset, Mapping):
        problem = f"dataset is a mapping with the keys {', '.join(map(str, dataset)) or 'none'}"
        if not dataset.keys() & _CONTENT:
            raise ValueError(
                f'{problem}; give a list of samples, or one split such as dataset["train"]'
            )
        if any(isinstance(dataset[key], str) for key in dataset.keys() & _CONTENT):
            raise ValueError(f"{problem}, a single sample; give a list of samples: [dataset]")
        raise ValueError(
            f"{problem}, which are columns; give its rows: datasets.Dataset.from_dict(dataset)"
        )
    if isinstance(dataset, (bytes, bytearray)) or not (
        isinstance(dataset, Iterable)
        or (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
    ):
        remedy = "give a path, a Hub id, or a list or other iterable of samples"
        if callable(dataset):
            remedy = (
                "call it and give what it returns"
                if not isinstance(dataset, type)
                else "give an object of it"
            )
        elif hasattr(dataset, "__getitem__") and not isinstance(dataset, (bytes, bytearray)):
            remedy = "it has no length: give it __len__, or give a list of its samples"
        raise ValueError(f"dataset is {kind}; {remedy}")


def _rows_of(
    dataset: Sequence[object], origin: str, num_samples: int | None, seed: int
) -> list[Row]:
    """Rows of an indexable dataset, chosen before they are read: reading one decodes its picture."""
    order = shuffled(_length(dataset), seed)
    if num_samples is None or num_samples >= len(order):
        return [_row(dataset, index, origin) for index in range(len(order))]
    rows = {index: _row(dataset, index, origin) for index in order[:num_samples]}
    if not any(_shows_picture(row.value) for row in rows.values()):
        # rows without a picture are cheap to read, so the search for one may go on for a while
        for index in order[num_samples : num_samples + _SEARCHED]:
            row = _row(dataset, index, origin)
            if _shows_picture(row.value):
                rows[index] = row
                break
    return [rows[index] for index in sorted(rows)]


def _length(dataset: Sequence[object]) -> int:
    try:
        return len(dataset)
    except TypeError as error:  # a 0-dimensional array
        raise ValueError(
            f"dataset is {type(dataset).__name__} without a length ({first_line(error)}); give a "
            f"list of samples"
        ) from error


def _row(dataset: Sequence[object], index: int, origin: str) -> Row:
    place = origin.format(index)
    try:
        return Row(origin=place, value=dataset[index])
    except Exception as error:  # foreign code: it may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{place}: {type(dataset).__name__} does not give it ({reason}); give a list of samples"
        ) from error


def is_empty(value: object) -> bool:
    """Whether a key with this value is as good as absent: null, or text, a list or an object of nothing."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _shows_picture(value: object, depth: int = _DEPTH) -> bool:
    """Whether a row that is not checked yet holds a picture where a format reads one: no deeper than `depth`."""
    if isinstance(value, Sample):
        return bool(value.pictures())
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(
            (key in ("image", "path") and not is_empty(item)) or _shows_picture(item, depth - 1)
            for key, item in value.items()
        )
    return isinstance(value, (list, tuple)) and any(
        _shows_picture(item, depth - 1) for item in value
    )


def _read_path(dataset: "str | os.PathLike[str]", num_samples: int | None, seed: int) -> list[Row]:
    path = Path(dataset)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_scienceqa(path, "train")
    head, _, split = str(dataset).rpartition(":")
    if head and Path(head).is_dir():
        return _read_scienceqa(Path(head), split)
    hub_id = _HUB_ID.fullmatch(dataset) if isinstance(dataset, str) else None
    if hub_id and path.suffix not in (".json", ".jsonl"):
        return _read_hub(hub_id["name"], hub_id["split"] or "train", num_samples, seed)
    raise ValueError(f"{dataset}: no such file or folder (looked in {Path.cwd()})")


def _read_file(path: Path) -> list[Row]:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f'{path}: ends in "{path.suffix}"; give a .jsonl file, a .json file with a list, or a '
            f"ScienceQA folder"
        )
    text = _read_text(path)
    pairs = _json_lines(text, path) if path.suffix == ".jsonl" else _json_list(text, path)
    return [
        Row(origin=f"{path.name}:{line}", value=value, folder=path.parent) for line, value in pairs
    ]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    if (place := text.find("\0")) >= 0:  # UTF-16 without its mark reads as UTF-8 full of them
        raise ValueError(
            f"{path}: is not UTF-8 text (a NUL at character {place}); save it as UTF-8"
        )
    return text


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines() would also split at characters that JSON allows inside strings.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, _DECODER.decode(content)
            except (ValueError, RecursionError) as error:
                raise _json_error(
                    f"{path.name}:{line}", error, "put one object on each line"
                ) from error


def _json_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Decodes a JSON list entry by entry, so that every entry has the line it starts on."""
    line, counted = 1, 0
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(
            f'{path.name}: holds no list; write "[sample, sample, ...]", or pass the folder if '
            f"this is ScienceQA"
        )
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            raise _json_error(f"{path.name}:{getattr(error, 'lineno', line)}", error) from error
        yield line, value
    if (end := _skip_space(text, position + 1)) < len(text):
        line = 1 + text.count("\n", 0, end)
        raise ValueError(
            f"{path.name}:{line}: more follows after the list's end; put all samples into one list"
        )


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that stands there twice Python would take the last value, without a word."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f'key "{key}" stands twice in one object')
        found[key] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _json_error(
    where: str, error: ValueError | RecursionError, remedy: str = "mend the file"
) -> ValueError:
    if isinstance(error, json.JSONDecodeError):
        return ValueError(
            f"{where}: not valid JSON at column {error.colno} ({error.msg}); {remedy}"
        )
    reason = "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)
    return ValueError(f"{where}: cannot be used as JSON ({reason}); mend the file")


def _read_scienceqa(folder: Path, split: str) -> list[Row]:
    """Reads the folder as its authors publish it (github.com/lupantech/ScienceQA)."""
    problems, splits = (
        _read_table(folder / "problems.json"),
        _read_table(folder / "pid_splits.json"),
    )
    if split not in splits:
        raise ValueError(
            f'{folder}/pid_splits.json: has no split "{split}"; choose one of {", ".join(splits)}'
        )
    rows = []
    for pid in splits[split]:
        origin = f"{folder.name}/problems.json:{pid}"
        if not isinstance(problem := problems.get(pid), Mapping):
            raise ValueError(
                f'{origin}: no such problem, though pid_splits.json lists it under "{split}"; '
                f"fetch both files anew"
            )
        value = dict(problem)
        if value.get("image"):
            # A problem names its own folder: "minival" is made of problems from "val".
            value["image"] = Path(
                "images", str(value.get("split", split)), pid, str(value["image"])
            )
        else:
            value["image"] = None
        rows.append(Row(origin=origin, value=value, folder=folder))
    return rows


def _read_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent}: is no ScienceQA folder ({path.name} is missing); give such a folder, "
            f"or a .jsonl or .json file"
        )
    text = _read_text(path)
    try:
        table = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else f"{path}"
        raise _json_error(where, error, "fetch it anew") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds {type(table).__name__}; ScienceQA has an object there")
    return table


def _read_hub(name: str, split: str, num_samples: int | None, seed: int) -> list[Row]:
    try:
        from datasets import (
            load_dataset,
        )  # lazy: an optional dependency that takes seconds to import
    except ImportError as error:
        raise ValueError(
            f'"{name}" is no file or folder here, and for the Hub datasets is missing: pip install '
            f"datasets"
        ) from error
    try:
        dataset = load_dataset(name, split=split)
    except (
        Exception
    ) as error:  # whatever the Hub, the network or the repository's own files do wrong
        reason = first_line(error)
        raise ValueError(
            f'"{name}" is no file or folder here, and the Hub does not give its split "{split}" '
            f"({reason})"
        ) from error
    return _rows_of(dataset, f"{name}:{{}}", num_samples, seed)
