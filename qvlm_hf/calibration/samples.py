"""What a calibration or evaluation sample is: one chat, whatever the source.

    load_samples(source) -> [Sample]         read, check, choose; nothing of the model is needed yet
    batches(samples, processor, 8) -> Batch  render with the chat template, tokenize, pad on the right, label the answer

Sources are recognised by their keys (`_FORMATS`): Transformers chats, LLaVA JSON, image/question/answer rows and ScienceQA. Every error is
one line that names the file, the line and the key, and says how to mend it.

Left out on purpose: truncation (it cuts image tokens), URLs (a calibration set must be the same tomorrow) and any import of Transformers:
the processor is passed in.
"""

import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image, ImageOps

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Processor",
    "Sample",
    "Tokenizer",
    "batches",
    "by_picture",
    "check_image_tokens",
    "collate",
    "dataset_name",
    "fingerprint",
    "hold_out",
    "load_samples",
]

IGNORE_INDEX = -100  # label of every token that is no part of an answer; what torch's cross entropy skips
_SCIENCEQA_REQUEST = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's own words
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>\w+))?")
# What PIL raises for a file that is no picture or is cut short.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, Image.DecompressionBombError)


class Tokenizer(Protocol):
    """What is used of a Transformers tokenizer."""

    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None

    def __call__(self, text: str, **options: object) -> Mapping[str, Any]:
        """Tokenizes `text`; "input_ids" holds the token ids."""


class Processor(Protocol):
    """What is used of a Transformers processor, and of `image_token` and `image_token_id` where it has them."""

    tokenizer: Tokenizer

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: object) -> object:
        """Renders a chat as text."""

    def __call__(self, **inputs: object) -> Mapping[str, Any]:
        """Turns text and pictures into the model's tensors."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One chat.

    Attributes:
        messages: Transformers chat; every content is a list of {"type": "text", "text": str} and
            {"type": "image", "image": Path or PIL image}. Roles: an optional "system", then "user" and "assistant" in turn.
        origin: where it was read, "scienceqa_train.jsonl:12"; opens every error message.
        kind: kind of question, reported by the evaluation.
        image_keys: key of each picture in the source, in order; empty: named by their place in `messages`.

    Raises:
        ValueError: if the roles are not in that order or a content is not a list.
    """

    messages: tuple[dict[str, Any], ...]
    origin: str
    kind: str | None = None
    image_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_turns(self.messages, self.origin)

    @property
    def answer(self) -> str | None:
        """Text of the last message if it is the assistant's, else None."""
        last = self.messages[-1]
        return " ".join(_texts(last)) if last["role"] == "assistant" else None

    def images(self) -> list[Image.Image]:
        """Opens the pictures, in reading order, upright and in RGB.

        Raises:
            ValueError: if a picture is missing or unreadable.
        """
        return [_open_image(value, key, self.origin) for key, value in self._pictures()]

    def check_images(self) -> None:
        """Checks that every picture file exists and starts like a picture, without decoding it.

        Raises:
            ValueError: for the first that does not.
        """
        for key, value in self._pictures():
            if not isinstance(value, Image.Image):
                _verify_image(value, key, self.origin)

    def _pictures(self) -> list[tuple[str, Path | Image.Image]]:
        found = [
            (f"messages[{i}].content[{j}].image", part["image"])
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message["content"])
            if part["type"] == "image"
        ]
        return [(key, value) for key, (_, value) in zip(self.image_keys, found, strict=True)] if self.image_keys else found


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the model is fed.

    Attributes:
        inputs: the processor's tensors: input_ids and attention_mask [batch, tokens], padded on the right, and whatever the family
            needs (pixel_values, image_sizes); no pixel_values if no sample has a picture.
        labels: [batch, tokens] int64; the token itself at the last answer and its end-of-sequence token, `IGNORE_INDEX` elsewhere. The
            logits that predict position p are those at p - 1.
        origins: one per row.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    origins: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the same batch on `device`."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs=inputs, labels=self.labels.to(device), origins=self.origins)


def load_samples(dataset: object, *, num_samples: int | None = None, seed: int = 0) -> list[Sample]:
    """Reads, checks and chooses samples.

    Args:
        dataset: a .jsonl or .json file; a ScienceQA folder, "folder" or "folder:split" (default split "train"); a Hub id, "name/name" or
            "name/name:split" (needs the `datasets` package); a list, a `datasets.Dataset` or another iterable of dicts or `Sample`s.
            Pictures in files are relative to the file, others to the working directory.
        num_samples: how many to take; all if None or if there are fewer. From a source with a length a seeded random choice, in source
            order, and a smaller choice is part of a larger one; from a one-pass iterable the first.
        seed: of the choice.

    Returns:
        The chosen samples in source order. Files and lists are checked whole; pictures, and the rows of a `datasets.Dataset` (each costs
        a decode), only as far as they are chosen.

    Raises:
        ValueError: one line: what is wrong, where (file, line, key) and how to mend it.
    """
    if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1):
        raise ValueError(f"num_samples is {num_samples!r}; give a whole number of at least 1, or None to take all")
    rows = _read(dataset, num_samples, seed)
    if not rows:
        raise ValueError(f"{_name(dataset)} has no samples; at least one is needed")
    samples = _convert(rows)
    chosen = [samples[index] for index in _choose(len(samples), num_samples, seed)]
    for sample in chosen:
        sample.check_images()
    return chosen


def dataset_name(dataset: object) -> str:
    """How a record names the source of samples: a file or folder without its path, a Hub id, or what kind of object it was."""
    if not isinstance(dataset, (str, os.PathLike)):
        return f"{type(dataset).__name__} in memory"
    path = Path(dataset)
    if path.exists():
        return path.resolve().name
    head, _, split = str(dataset).rpartition(":")
    return f"{Path(head).resolve().name}:{split}" if head and Path(head).is_dir() else str(dataset)


def hold_out(samples: Sequence[Sample], num_samples: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into those to calibrate on and the rest, which checks the result; both keep their order.

    Args:
        samples: as `load_samples` gives them.
        num_samples: how many to calibrate on; all if there are not more.
        seed: of the choice.
    """
    chosen = set(_choose(len(samples), num_samples, seed))
    return [s for i, s in enumerate(samples) if i in chosen], [s for i, s in enumerate(samples) if i not in chosen]


def by_picture(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, those with the same pictures side by side: neighbouring batches then know little of each other."""
    places: dict[str, int] = {}
    return sorted(samples, key=lambda sample: places.setdefault(_picture_hash(sample), len(places)))


def _picture_hash(sample: Sample) -> str:
    digest = hashlib.sha256()
    for key, value in sample._pictures():
        digest.update(_image_bytes(key, value, sample.origin))
    return digest.hexdigest()


def fingerprint(samples: Sequence[Sample]) -> str:
    """Hashes roles, texts and pictures (file bytes, or pixels of those in memory), in order, with SHA-256; origins don't count."""
    digest = hashlib.sha256()
    for sample in samples:
        pictures = iter(sample._pictures())
        digest.update(f"sample {len(sample.messages)}\0".encode())
        for message in sample.messages:
            digest.update(f"{message['role']} {len(message['content'])}\0".encode())
            for part in message["content"]:
                payload = part["text"].encode() if part["type"] == "text" else _image_bytes(*next(pictures), sample.origin)
                # The length in front keeps "ab" + "c" and "a" + "bc" apart.
                digest.update(f"{part['type']} {len(payload)}\0".encode() + payload)
    return digest.hexdigest()


# ---- sources: anything the user may pass -> rows -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One entry of a source, not yet checked."""

    origin: str
    value: Any
    folder: Path = Path()

    def error(self, key: str, problem: str) -> ValueError:
        return ValueError(f'{self.origin}: key "{key}" {problem}')


def _name(dataset: object) -> str:
    return str(dataset) if isinstance(dataset, (str, os.PathLike)) else "dataset"


def _choose(available: int, num_samples: int | None, seed: int) -> list[int]:
    indices = list(range(available))
    if num_samples is None or num_samples >= available:
        return indices
    random.Random(seed).shuffle(indices)
    return sorted(indices[:num_samples])


def _read(dataset: object, num_samples: int | None, seed: int) -> list[_Row]:
    if isinstance(dataset, (str, os.PathLike)):
        return _read_path(dataset, num_samples, seed)
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(str, dataset))
        raise ValueError(f'dataset is a mapping with the keys {keys}; give a list of samples, or one split such as dataset["train"]')
    if isinstance(dataset, (list, tuple)):
        return [_Row(origin=f"dataset[{index}]", value=value) for index, value in enumerate(dataset)]
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return _rows_of(cast(Sequence[object], dataset), "dataset[{}]", num_samples, seed)
    if isinstance(dataset, Iterable):
        return [_Row(origin=f"dataset[{index}]", value=value) for index, value in enumerate(islice(dataset, num_samples))]
    raise ValueError(f"dataset is {type(dataset).__name__}; give a path, a Hub id, or a list or other iterable of samples")


def _rows_of(dataset: Sequence[object], origin: str, num_samples: int | None, seed: int) -> list[_Row]:
    """Rows of an indexable dataset, chosen before they are read: reading one decodes its picture."""
    return [_Row(origin=origin.format(index), value=dataset[index]) for index in _choose(len(dataset), num_samples, seed)]


def _read_path(dataset: "str | os.PathLike[str]", num_samples: int | None, seed: int) -> list[_Row]:
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


def _read_file(path: Path) -> list[_Row]:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f'{path}: ends in "{path.suffix}"; give a .jsonl file, a .json file with a list, or a ScienceQA folder')
    text = _read_text(path)
    pairs = _json_lines(text, path) if path.suffix == ".jsonl" else _json_list(text, path)
    return [_Row(origin=f"{path.name}:{line}", value=value, folder=path.parent) for line, value in pairs]


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


def _read_scienceqa(folder: Path, split: str) -> list[_Row]:
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
        rows.append(_Row(origin=origin, value=value, folder=folder))
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


def _read_hub(name: str, split: str, num_samples: int | None, seed: int) -> list[_Row]:
    try:
        from datasets import load_dataset  # lazy: an optional dependency that takes seconds to import
    except ImportError as error:
        raise ValueError(f'"{name}" is no file or folder here, and for the Hub datasets is missing: pip install datasets') from error
    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # whatever the Hub, the network or the repository's own files do wrong
        reason = _first_line(error)
        raise ValueError(f'"{name}" is no file or folder here, and the Hub does not give its split "{split}" ({reason})') from error
    return _rows_of(dataset, f"{name}:{{}}", num_samples, seed)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- formats: rows -> samples --------------------------------------------------------------------------------------------------------

_Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Format:
    """One accepted layout, recognised by the key `marker`; `convert` returns the messages and the key of each picture."""

    marker: str
    required: frozenset[str]
    optional: frozenset[str]
    convert: Callable[[Mapping[str, Any], _Row], tuple[list[_Message], list[str]]]


def _convert(rows: Sequence[_Row]) -> list[Sample]:
    samples, first = [], _recognise(rows[0])
    for row in rows:
        found = _recognise(row)
        if found is not first:
            here, there = _marker(found), _marker(first)
            raise ValueError(f"{row.origin}: is {here}, but {rows[0].origin} is {there}; keep one format per source")
        samples.append(row.value if found is None else _sample(row, found))
    return samples


def _marker(found: _Format | None) -> str:
    return "a Sample" if found is None else f'in the "{found.marker}" format'


def _recognise(row: _Row) -> _Format | None:
    """Finds the format by its keys; None for a ready-made Sample."""
    if isinstance(row.value, Sample):
        return None
    if not isinstance(row.value, Mapping):
        raise ValueError(f"{row.origin}: is {type(row.value).__name__}; give an object with keys, such as image, question and answer")
    for candidate in _FORMATS:
        if candidate.marker in row.value:
            return candidate
    keys, known = (
        ", ".join(map(str, row.value)) or "none",
        '"messages", or "image" and "conversations", or "image", "question" and "answer"',
    )
    raise ValueError(f"{row.origin}: no known format (keys: {keys}); give {known}")


def _sample(row: _Row, layout: _Format) -> Sample:
    _check_keys(row.value, layout.required, layout.optional | {"kind", "id"}, row)
    record = _present(row.value)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise row.error("kind", f"is {type(kind).__name__}; give text")
    messages, image_keys = layout.convert(record, row)
    if layout.marker == "choices":
        kind = kind or record.get("subject")
    return Sample(messages=tuple(messages), origin=row.origin, kind=kind, image_keys=tuple(image_keys))


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drops keys without a value: Arrow tables fill the keys that only other rows have with None."""
    return {key: value for key, value in record.items() if value is not None}


def _check_keys(record: Mapping[str, Any], required: Iterable[str], optional: Iterable[str], row: _Row, parent: str = "") -> None:
    required, allowed = set(required), {*required, *optional}
    for key in record:
        if key not in allowed and record[key] is not None:
            raise row.error(f"{parent}{key}", f"is unknown here; known are {', '.join(sorted(allowed))}: rename or remove it")
    for key in sorted(required):
        if key not in record:
            hint = " (null for a question without a picture)" if key == "image" else ""
            raise row.error(f"{parent}{key}", f"is missing; add it{hint}")


def _text(value: object, key: str, row: _Row) -> str:
    if not isinstance(value, str):
        raise row.error(key, f"is {type(value).__name__}; give text")
    if not value.strip():
        raise row.error(key, "is empty; give text or remove the sample")
    return value


def _image(value: object, key: str, row: _Row) -> Path | Image.Image:
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise row.error(key, f"is {type(value).__name__}; give a path or a PIL image")
    if _URL.match(str(value)):
        raise row.error(key, f'is a URL ("{str(value)[:80]}"); pictures are read from disk only: download it and give its path')
    return row.folder / value


def _turn(role: str, *parts: str | Path | Image.Image) -> _Message:
    """Builds a message: text becomes a text part, anything else a picture."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    return {"role": role, "content": content}


def _from_chat(record: Mapping[str, Any], row: _Row) -> tuple[list[_Message], list[str]]:
    """{"messages": [{"role", "content": text or [{"type": "image", "path" or "image"}, {"type": "text", "text"}]}]}."""
    messages: list[_Message] = []
    image_keys: list[str] = []
    for index, message in enumerate(_list(record.get("messages"), "messages", row)):
        key = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise row.error(key, f'is {type(message).__name__}; give an object with "role" and "content"')
        _check_keys(message, ("role", "content"), (), row, f"{key}.")
        content = message["content"]
        if isinstance(content, str):
            messages.append(_turn(message["role"], _text(content, f"{key}.content", row)))
            continue
        parts = []
        for place, part in enumerate(_list(content, f"{key}.content", row)):
            part_key, value = _part(part, f"{key}.content[{place}]", row)
            parts.append(value)
            image_keys += [] if isinstance(value, str) else [part_key]
        messages.append(_turn(message["role"], *parts))
    return messages, image_keys


def _list(value: object, key: str, row: _Row) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        found = "empty" if isinstance(value, (list, tuple)) else type(value).__name__
        raise row.error(key, f"is {found}; give a list with at least one entry")
    return value


def _part(part: object, key: str, row: _Row) -> tuple[str, str | Path | Image.Image]:
    """Reads one entry of a content list; returns its key and its text or picture."""
    if not isinstance(part, Mapping):
        raise row.error(key, f"is {type(part).__name__}; give an object with a type")
    kind, fields = part.get("type"), _present(part)
    if kind not in ("text", "image"):
        raise row.error(f"{key}.type", f'is {kind!r}; give {{"type": "text", "text": ...}} or {{"type": "image", "path": ...}}')
    if kind == "text":
        _check_keys(fields, ("text",), ("type",), row, f"{key}.")
        return f"{key}.text", _text(fields["text"], f"{key}.text", row)
    if "url" in fields:
        raise row.error(f"{key}.url", 'is a URL; pictures are read from disk only: download it and give its "path"')
    name = "path" if "path" in fields else "image"
    _check_keys(fields, (name,), ("type",), row, f"{key}.")
    return f"{key}.{name}", _image(fields[name], f"{key}.{name}", row)


def _from_llava(record: Mapping[str, Any], row: _Row) -> tuple[list[_Message], list[str]]:
    """{"image", "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value"}]}; a picture per placeholder."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    given = record.get("image", [])
    several = isinstance(given, (list, tuple))
    image_keys = [f"image[{index}]" for index in range(len(given))] if several else ["image"]
    images = [_image(value, key, row) for key, value in zip(image_keys, given if several else [given], strict=True)]
    messages, remaining = [], list(images)
    turns = _list(record.get("conversations"), "conversations", row)
    for index, turn in enumerate(turns):
        key = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise row.error(key, f'is {type(turn).__name__}; give an object with "from" and "value"')
        _check_keys(turn, ("from", "value"), (), row, f"{key}.")
        if turn["from"] not in roles:
            raise row.error(f"{key}.from", f"is {turn['from']!r}; give human, gpt or system")
        first, *others = _text(turn["value"], f"{key}.value", row).split("<image>")
        parts: list[str | Path | Image.Image] = [first.strip()]
        for text in others:
            parts += [*remaining[:1], text.strip()]
            del remaining[:1]
        messages.append(_turn(roles[turn["from"]], *(part for part in parts if part != "")))
    placeholders = sum(turn["value"].count("<image>") for turn in turns)
    if placeholders != len(images):
        raise row.error("conversations", f"has {placeholders} <image> placeholders for {len(images)} pictures; write <image> once for each")
    return messages, image_keys


def _from_question(record: Mapping[str, Any], row: _Row) -> tuple[list[_Message], list[str]]:
    """{"image", "question", "answer"}; image may be null, the answer may be absent."""
    pictures = [_image(record["image"], "image", row)] if "image" in record else []
    messages = [_turn("user", *pictures, _text(record.get("question"), "question", row))]
    if "answer" in record:
        messages.append(_turn("assistant", _text(record["answer"], "answer", row)))
    return messages, ["image"] * len(pictures)


def _from_scienceqa(record: Mapping[str, Any], row: _Row) -> tuple[list[_Message], list[str]]:
    """A ScienceQA problem as LLaVA-1.5 is asked it (its "CQM" prompt, answered by a letter); lecture and solution are not shown."""
    choices = [_text(choice, f"choices[{index}]", row) for index, choice in enumerate(_list(record.get("choices"), "choices", row))]
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    context = str(record.get("hint", "")).strip() or "N/A"
    question = _text(record.get("question"), "question", row)
    prompt = f"Context: {context}\nQuestion: {question}\nOptions: {options}\n{_SCIENCEQA_REQUEST}"
    pictures = [_image(record["image"], "image", row)] if "image" in record else []
    messages = [_turn("user", *pictures, prompt)]
    if "answer" in record:
        answer = record["answer"]
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(_LETTERS)):
            raise row.error("answer", f"is {answer!r}; give the index of one of the {len(choices)} choices, counted from 0")
        messages.append(_turn("assistant", _LETTERS[answer]))
    return messages, ["image"] * len(pictures)


_SCIENCEQA_OTHERS = (
    "answer",
    "hint",
    "image",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "split",
    "caption",
)
_FORMATS = (
    _Format(marker="messages", required=frozenset({"messages"}), optional=frozenset(), convert=_from_chat),
    # "model" stands in LLaVA's own training file.
    _Format(marker="conversations", required=frozenset({"conversations"}), optional=frozenset({"image", "model"}), convert=_from_llava),
    _Format(marker="choices", required=frozenset({"question", "choices"}), optional=frozenset(_SCIENCEQA_OTHERS), convert=_from_scienceqa),
    _Format(marker="question", required=frozenset({"image", "question"}), optional=frozenset({"answer"}), convert=_from_question),
)


def _check_turns(messages: Sequence[Mapping[str, Any]], origin: str) -> None:
    if not messages:
        raise ValueError(f"{origin}: has no messages; give at least the user's")
    expected = "user"
    for index, message in enumerate(messages):
        role = message.get("role")
        if role == "system" and index == 0 and len(messages) > 1:
            continue
        if role != expected:
            rule = "the user speaks first (after an optional system message), then assistant and user in turn"
            raise ValueError(f'{origin}: message {index} has the role {role!r} where "{expected}" belongs; {rule}')
        expected = "assistant" if role == "user" else "user"
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list) or not all(isinstance(part, Mapping) and part.get("type") in part for part in content):
            rule = '{"type": "text", "text": ...} and {"type": "image", "image": ...}; load_samples builds them'
            raise ValueError(f"{origin}: the content of message {index} is no list of {rule}")


def _texts(message: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in message["content"] if part["type"] == "text"]


# ---- pictures ------------------------------------------------------------------------------------------------------------------------


def _image_error(path: object, key: str, origin: str, error: BaseException) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f'{origin}: key "{key}": no such picture: {path}; paths are relative to the dataset file')
    return ValueError(f'{origin}: key "{key}": unreadable picture {path} ({_first_line(error)}); replace it or remove the sample')


def _verify_image(path: Path, key: str, origin: str) -> None:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except _UNREADABLE as error:
        raise _image_error(path, key, origin, error) from error


def _open_image(value: Path | Image.Image, key: str, origin: str) -> Image.Image:
    try:
        if isinstance(value, Image.Image):
            return ImageOps.exif_transpose(value).convert("RGB")
        with Image.open(value) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except _UNREADABLE as error:
        raise _image_error("in memory" if isinstance(value, Image.Image) else value, key, origin, error) from error


def _image_bytes(key: str, value: Path | Image.Image, origin: str) -> bytes:
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}\0".encode() + value.tobytes()
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise _image_error(value, key, origin, error) from error


# ---- samples -> tensors --------------------------------------------------------------------------------------------------------------


def batches(samples: Sequence[Sample], processor: Processor, batch_size: int) -> Iterator[Batch]:
    """Yields the samples in order, `batch_size` at a time (the last batch may be smaller).

    Raises:
        ValueError: for a batch size below 1, and as `collate` does.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    for start in range(0, len(samples), batch_size):
        yield collate(samples[start : start + batch_size], processor)


def collate(samples: Sequence[Sample], processor: Processor) -> Batch:
    """Renders the chats with the processor's template, tokenizes them and labels the last answer of each.

    The answer is found by rendering twice, with and without it: what the two token sequences share is the prompt. Its length is counted
    from the end, so it does not matter into how many tokens the processor expands the pictures before it.
    Whitespace after the answer is dropped; where the template leaves the answer open, as LLaVA's does, the end-of-sequence token is added,
    which the model was trained to say there. Samples without an answer get no labels and end in the template's generation prompt.

    Args:
        samples: at least one; with and without pictures may be mixed.
        processor: a Transformers processor (`apply_chat_template`, `__call__`, `tokenizer`).

    Raises:
        ValueError: if the processor has no chat template or no padding token, if a picture is missing or has no place in the text, or if
            the template does not show the answer.
    """
    if not samples:
        raise ValueError("collate got no samples; give at least one")
    _check_processor(processor)
    chats = [_render(sample, processor) for sample in samples]
    pictures = [sample.images() for sample in samples]
    for sample, (text, _), own in zip(samples, chats, pictures, strict=True):
        _check_placeholders(text, len(own), processor, sample.origin)
    inputs = _call_processor(processor, [text for text, _ in chats], pictures, [sample.origin for sample in samples])
    _check_expansion(inputs["input_ids"], pictures, processor, [sample.origin for sample in samples])
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    for row, (sample, (_, answer)) in enumerate(zip(samples, chats, strict=True)):
        if answer:
            positions = inputs["attention_mask"][row].nonzero().flatten()[-len(answer) :]
            if inputs["input_ids"][row, positions].tolist() != answer:
                raise ValueError(
                    f"{sample.origin}: the processor's tokens do not end in the answer's {answer}; it changes the rendered text"
                )
            labels[row, positions] = torch.tensor(answer)
    return Batch(inputs=inputs, labels=labels, origins=tuple(sample.origin for sample in samples))


def _check_processor(processor: Processor) -> None:
    name = type(processor).__name__
    if not callable(getattr(processor, "apply_chat_template", None)) or getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{name} is no chat processor (no apply_chat_template or tokenizer); use AutoProcessor.from_pretrained(model)")
    if getattr(processor, "chat_template", "") is None:
        raise ValueError(f"{name} has no chat template; set processor.chat_template, or load the processor of a chat model")
    if processor.tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {name} has no pad_token; set processor.tokenizer.pad_token = processor.tokenizer.eos_token")


def _render(sample: Sample, processor: Processor) -> tuple[str, list[int]]:
    """Returns the rendered chat, pictures as single placeholders, and the token ids of its last answer (empty if there is none)."""
    answer = sample.answer
    if answer is None:
        return _apply_template(sample.messages, processor, sample.origin, add_generation_prompt=True), []
    prompt = _apply_template(sample.messages[:-1], processor, sample.origin, add_generation_prompt=True)
    text = _apply_template(sample.messages, processor, sample.origin, add_generation_prompt=False).rstrip()
    shared = _shared(prompt, text)
    if answer.strip() not in text[shared:]:
        shown = repr(answer.strip()[:40])
        raise ValueError(f"{sample.origin}: the chat template does not show the answer {shown} after the prompt; use another template")
    tokenizer = processor.tokenizer
    if text.endswith(answer.strip()) and tokenizer.eos_token and _tokens(text, tokenizer)[-1] != tokenizer.eos_token_id:
        text += tokenizer.eos_token
    ids, prompt_ids = _tokens(text, tokenizer), _tokens(prompt, tokenizer)
    shared = _shared(ids, prompt_ids)
    return text, ids[shared:]


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns the length of the longest common beginning."""
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _apply_template(messages: Sequence[_Message], processor: Processor, origin: str, *, add_generation_prompt: bool) -> str:
    try:
        text = processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is foreign code: it may raise anything
        raise ValueError(f"{origin}: the processor's chat template fails on this sample ({_first_line(error)})") from error
    return str(text)


def _adds_special_tokens(text: str, tokenizer: Tokenizer) -> bool:
    """False if the template wrote the beginning-of-sequence token itself, the rule of `apply_chat_template(tokenize=True)`."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text, add_special_tokens=_adds_special_tokens(text, tokenizer), truncation=False)["input_ids"])


def _check_placeholders(text: str, pictures: int, processor: Processor, origin: str) -> None:
    placeholder = getattr(processor, "image_token", None)
    count = text.count(placeholder) if placeholder else 0
    # Zero is judged after tokenizing: some templates write another marker, which their processor replaces.
    if count and count != pictures:
        problem = f"{count} {placeholder} placeholders in the rendered text for {pictures} pictures"
        raise ValueError(f"{origin}: {problem}; remove {placeholder} from the sample's own text")


def _call_processor(
    processor: Processor, texts: list[str], pictures: list[list[Image.Image]], origins: list[str]
) -> dict[str, torch.Tensor]:
    images = {"images": pictures} if any(pictures) else {}
    special = _adds_special_tokens(texts[0], processor.tokenizer)
    try:
        output = processor(
            text=texts, **images, padding=True, padding_side="right", truncation=False, add_special_tokens=special, return_tensors="pt"
        )
    except ValueError as error:
        raise ValueError(f"{', '.join(origins)}: {type(processor).__name__} refuses this batch ({_first_line(error)})") from error
    for name, value in output.items():
        if not isinstance(value, torch.Tensor):
            problem = f"{type(processor).__name__} returns {name} as {type(value).__name__}, not as one tensor"
            raise ValueError(f"{', '.join(origins)}: {problem}; use batch size 1")
    return dict(output)


def _check_expansion(input_ids: torch.Tensor, pictures: list[list[Image.Image]], processor: Processor, origins: list[str]) -> None:
    """Checks every row, and that pictures of one size became equally many tokens."""
    image_token_id = getattr(processor, "image_token_id", None)
    if image_token_id is None:
        return  # nothing to count by; the model's own check remains
    per_size: dict[tuple[int, int], int] = {}
    for row, (own, origin) in enumerate(zip(pictures, origins, strict=True)):
        sizes = {picture.size for picture in own}
        size = sizes.pop() if len(sizes) == 1 else None
        count = check_image_tokens(input_ids[row], image_token_id, per_size.get(size) if size else None, len(own), origin)
        if size:
            per_size.setdefault(size, count // len(own))


def check_image_tokens(input_ids: torch.Tensor, image_token_id: int, expected_per_image: int | None, images: int, origin: str) -> int:
    """Counts the picture tokens of one sample and compares them with its pictures.

    Args:
        input_ids: [tokens].
        image_token_id: the token that stands for picture features.
        expected_per_image: tokens a picture, None if unknown: then any positive number will do.
        images: pictures of the sample.
        origin: for the message.

    Returns:
        The number of picture tokens.

    Raises:
        ValueError: if there are too few or too many.
    """
    count = int((input_ids == image_token_id).sum())
    expected = 0 if images == 0 else None if expected_per_image is None else expected_per_image * images
    if (expected is not None and count != expected) or (images and not count):
        wanted = "at least one each" if expected is None else str(expected)
        raise ValueError(
            f"{origin}: {count} picture tokens for {images} pictures, {wanted} expected; the processor does not fit the chat template"
        )
    return count
