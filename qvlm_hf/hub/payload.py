"""What of a saved directory goes to the Hub: a list of names; everything else stays behind.

A directory also collects notes, keys and checkpoints, which `from_pretrained` does not need. The
list is made once: it is searched for secrets, and it is sent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qvlm_hf.errors import TOKEN
from qvlm_hf.format.files import INDEX_NAME, SINGLE_NAME, read_header, weight_files
from qvlm_hf.hub.file_list import FILE_LIST

__all__ = ["FILES", "STALE", "Payload", "check_secrets", "choose_files"]

# Besides weights and card: what Transformers writes for a model and its processor, and our report.
FILES = (
    "config.json", "generation_config.json", "qvlm_report.json", "processor_config.json",
    "preprocessor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
# Deleted on the Hub unless it is sent: what `from_pretrained` would read, even instead of ours.
STALE = (
    *FILES, "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json",
    "adapter_config.json", "qvlm_*.png",
)  # fmt: skip


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
    """Chooses what goes up: `card` names the card and its pictures.

    Raises:
        ValueError: weights are missing or ambiguous, or a file is a link that leaves
            the directory.
    """
    if (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        raise ValueError(
            f"{folder}: holds {SINGLE_NAME} and {INDEX_NAME}, two models: delete the one that is "
            f"old."
        )
    weights = [file.name for file in weight_files(folder)]
    paths = [path for pattern in (*FILES, INDEX_NAME) for path in folder.glob(pattern)]
    found = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    files = tuple(sorted(found.union(card, weights)))
    for name in files:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{name}: is a link to a file outside {folder.name}: put the file itself there."
            )
    sent = {name.split("/")[0] for name in files} | {FILE_LIST}
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in sent)
    return Payload(files=files, weights=tuple(weights), left_out=tuple(left_out))


def check_secrets(folder: Path, files: Iterable[str], token: str | None) -> None:
    """Looks for Hub tokens in what goes up; of weights, in the header alone.

    Raises:
        ValueError: a file holds one, or `token`. The message does not show it.
    """
    for name in files:
        path = folder / name
        content = read_header(path) if path.suffix == ".safetensors" else path.read_bytes()
        check_secret(name, content.decode("utf-8", errors="ignore"), token)


def check_secret(name: str, text: str, token: str | None) -> None:
    """Looks for Hub tokens in a text that goes up.

    Raises:
        ValueError: it holds one, or `token`. The message does not show it.
    """
    if TOKEN.search(text) or (token and token in text):
        raise ValueError(
            f"{name}: holds a Hub token (hf_...): nothing was sent; remove it, and revoke it if "
            f"others could read it."
        )
