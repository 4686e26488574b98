"""What of a saved directory goes to the Hub: a list of names, each looked at; everything else stays behind.

A published repository holds what `from_pretrained` and a reader need and nothing besides, because a
directory also collects notes, keys and checkpoints. The list is made once and is what is searched
for secrets and what is sent.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qvlm_hf.hub.errors import TOKEN

__all__ = [
    "FILES",
    "FILE_LIST",
    "STALE",
    "Payload",
    "check_secrets",
    "check_text",
    "choose_files",
    "read_header",
    "weight_files",
]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Besides weights and card: what Transformers writes for a model and its processor, and our report.
FILES = (
    "config.json", "generation_config.json", "qvlm_report.json",
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
FILE_LIST = "qvlm_files.json"  # what we wrote into a directory; of no use elsewhere
# What is deleted on the Hub unless it is sent: anything that `from_pretrained` would read, even
# instead of ours.
STALE = (
    *FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "adapter_config.json",
    "qvlm_*.png",
)
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True, kw_only=True)
class Payload:
    """The files of a directory, sorted.

    Attributes:
        files: paths that are sent, relative to the directory.
        weights: those of them that hold weights.
        left_out: names in the directory that are not sent.
    """

    files: tuple[str, ...]
    weights: tuple[str, ...]
    left_out: tuple[str, ...]


def choose_files(folder: Path, card: Iterable[str]) -> Payload:
    """Chooses what goes up.

    Args:
        folder: a saved model.
        card: names of the card and its pictures.

    Raises:
        ValueError: config.json or weights are missing or ambiguous, or a file is a link that leaves
            the directory.
    """
    weights = weight_files(folder)
    found = {
        path.relative_to(folder).as_posix()
        for pattern in FILES
        for path in folder.glob(pattern)
        if path.is_file()
    }
    if "config.json" not in found:
        raise ValueError(f"{folder}: holds no config.json: name the directory of a saved model.")
    files = tuple(
        sorted(found | {*card, *weights} | ({_INDEX} if (folder / _INDEX).is_file() else set()))
    )
    for name in files:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{name}: is a link to a file outside {folder.name}: put the file itself there."
            )
    tops = {name.split("/")[0] for name in files} | {FILE_LIST}
    return Payload(
        files=files,
        weights=weights,
        left_out=tuple(sorted(path.name for path in folder.iterdir() if path.name not in tops)),
    )


def weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the weight files that `from_pretrained` reads from the directory; others may lie there and are no part of the model.

    Raises:
        ValueError: there are none, or two models, or the index is damaged or names what is not
            there.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{folder}: holds {_SINGLE} and {_INDEX}, two models: delete the one that is old."
        )
    if single.is_file():
        return (_SINGLE,)
    if not index.is_file():
        raise ValueError(
            f"{folder}: holds no {_SINGLE}: name the directory that qvlm quantize wrote."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{_INDEX}: is no index of weights ({type(error).__name__}): save the model again."
        ) from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(
                f"{_INDEX}: names {name!r}, which is no file in {folder.name}: save the model "
                f"again."
            )
    return tuple(names)


def check_secrets(folder: Path, files: Iterable[str], token: str | None) -> None:
    """Looks for Hub tokens in what goes up; of weights, in the header alone.

    Args:
        folder: where the files are.
        files: names in it.
        token: the one in use, whatever its form.

    Raises:
        ValueError: a file holds one. The message does not show it.
    """
    for name in files:
        content = (
            read_header(folder / name)
            if name.endswith(".safetensors")
            else (folder / name).read_bytes()
        )
        check_text(name, content.decode("utf-8", errors="ignore"), token)


def check_text(name: str, text: str, token: str | None) -> None:
    """Looks for Hub tokens in a text.

    Args:
        name: of the text.
        text: to look at.
        token: the one in use, whatever its form.

    Raises:
        ValueError: it holds one. The message does not show it.
    """
    if TOKEN.search(text) or (token and token in text):
        raise ValueError(
            f"{name}: holds a Hub token (hf_...): nothing was sent; remove it, and revoke it if "
            f"others could read it."
        )


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file.

    Raises:
        ValueError: it is cut short or none.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size) if size <= _MAX_HEADER else b""
    if not header or len(header) < size:
        raise ValueError(f"{file.name}: is no complete safetensors file: save the model again.")
    return header
