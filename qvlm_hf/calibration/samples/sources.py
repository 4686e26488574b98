"""Whatever the user may pass as a data set -> rows: entries of it, each with the place that it comes from, not yet checked."""

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from qvlm_hf.calibration.samples.errors import first_line

__all__ = ["Row", "choose", "read_rows", "source_name"]

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>\w+))?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry of a source, not yet checked."""

    origin: str
    value: Any
    folder: Path = Path()

    def error(self, key: str, problem: str) -> ValueError:
        """What to raise about one of its keys."""
        return ValueError(f'{self.origin}: key "{key}" {problem}')


def source_name(dataset: object) -> str:
    """How messages call a data set."""
    return str(dataset) if isinstance(dataset, (str, os.PathLike)) else "dataset"


def choose(available: int, num_samples: int | None, seed: int) -> list[int]:
    """A seeded choice of indices, in order; a smaller one is part of a larger one."""
    indices = list(range(available))
    if num_samples is None or num_samples >= available:
        return indices
    random.Random(seed).shuffle(indices)
    return sorted(indices[:num_samples])


def read_rows(dataset: object, num_samples: int | None, seed: int) -> list[Row]:
    """Reads a data set; arguments as in `load_samples`.

    Returns:
        All of a file or list; of a Hub data set or another indexable one the rows that `choose` gives, of an iterable the first.

    Raises:
        ValueError: it cannot be read, or is nothing that could be.
    """
    if isinstance(dataset, (str, os.PathLike)):
        return _read_path(dataset, num_samples, seed)
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(str, dataset))
        raise ValueError(f'dataset is a mapping with the keys {keys}; give a list of samples, or one split such as dataset["train"]')
    if isinstance(dataset, (list, tuple)):
        return [Row(origin=f"dataset[{index}]", value=value) for index, value in enumerate(dataset)]
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return _rows_of(cast(Sequence[object], dataset), "dataset[{}]", num_samples, seed)
    if isinstance(dataset, Iterable):
        return [Row(origin=f"dataset[{index}]", value=value) for index, value in enumerate(islice(dataset, num_samples))]
    raise ValueError(f"dataset is {type(dataset).__name__}; give a path, a Hub id, or a list or other iterable of samples")


def _rows_of(dataset: Sequence[object], origin: str, num_samples: int | None, seed: int) -> list[Row]:
    """Rows of an indexable dataset, chosen before they are read: reading one decodes its picture."""
    return [Row(origin=origin.format(index), value=dataset[index]) for index in choose(len(dataset), num_samples, seed)]


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
        raise ValueError(f'{path}: ends in "{path.suffix}"; give a .jsonl file, a .json file with a list, or a ScienceQA folder')
    text = _read_text(path)
    pairs = _json_lines(text, path) if path.suffix == ".jsonl" else _json_list(text, path)
    return [Row(origin=f"{path.name}:{line}", value=value, folder=path.parent) for line, value in pairs]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines() would also split at characters that JSON allows inside strings.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise _json_error(f"{path.name}:{line}", error, "put one object on each line") from error


def _json_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Decodes a JSON list entry by entry, so that every entry has the line it starts on."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f'{path.name}: holds no list; write "[sample, sample, ...]", or pass the folder if this is ScienceQA')
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except json.JSONDecodeError as error:
            raise _json_error(f"{path.name}:{error.lineno}", error) from error
        yield line, value


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _json_error(where: str, error: json.JSONDecodeError, remedy: str = "mend the file") -> ValueError:
    return ValueError(f"{where}: not valid JSON at column {error.colno} ({error.msg}); {remedy}")


def _read_scienceqa(folder: Path, split: str) -> list[Row]:
    """Reads the folder as its authors publish it (github.com/lupantech/ScienceQA)."""
    problems, splits = _read_table(folder / "problems.json"), _read_table(folder / "pid_splits.json")
    if split not in splits:
        raise ValueError(f'{folder}/pid_splits.json: has no split "{split}"; choose one of {", ".join(splits)}')
    rows = []
    for pid in splits[split]:
        origin = f"{folder.name}/problems.json:{pid}"
        if not isinstance(problem := problems.get(pid), Mapping):
            raise ValueError(f'{origin}: no such problem, though pid_splits.json lists it under "{split}"; fetch both files anew')
        value = dict(problem)
        if value.get("image"):
            # A problem names its own folder: "minival" is made of problems from "val".
            value["image"] = Path("images", str(value.get("split", split)), pid, str(value["image"]))
        else:
            value["image"] = None
        rows.append(Row(origin=origin, value=value, folder=folder))
    return rows


def _read_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: is no ScienceQA folder ({path.name} is missing); give such a folder, or a .jsonl or .json file")
    try:
        table = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise _json_error(f"{path}:{error.lineno}", error, "fetch it anew") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds {type(table).__name__}; ScienceQA has an object there")
    return table


def _read_hub(name: str, split: str, num_samples: int | None, seed: int) -> list[Row]:
    try:
        from datasets import load_dataset  # lazy: an optional dependency that takes seconds to import
    except ImportError as error:
        raise ValueError(f'"{name}" is no file or folder here, and for the Hub datasets is missing: pip install datasets') from error
    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # whatever the Hub, the network or the repository's own files do wrong
        reason = first_line(error)
        raise ValueError(f'"{name}" is no file or folder here, and the Hub does not give its split "{split}" ({reason})') from error
    return _rows_of(dataset, f"{name}:{{}}", num_samples, seed)
