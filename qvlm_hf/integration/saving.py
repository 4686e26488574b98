"""Saving a quantized model so that a full disk, an error or Ctrl-C leaves nothing half-written and nothing old destroyed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError

from qvlm_hf.calibration.report import CalibrationReport
from qvlm_hf.hub.contents import REPORT_NAME
from qvlm_hf.hub.model_card import write_card
from qvlm_hf.integration.directory import INDEX_NAME
from qvlm_hf.nn.footprint import count_parameters

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["REPORT_NAME", "check_output", "save_quantized", "written_whole"]


def save_quantized(
    model: PreTrainedModel,
    processor: Any,  # noqa: ANN401 - any Transformers processor
    output: str | os.PathLike[str],
    *,
    report: CalibrationReport | None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Writes model, processor, report and card into a directory beside `output` and renames it when everything is there.

    Args:
        model: quantized.
        processor: saved with it, because pipelines need it; None leaves it out.
        output: the directory to make.
        report: written as qvlm_report.json; None leaves it out.
        overwrite: replace an existing saved model, which stays until the new one is complete.
        max_shard_size: of one safetensors file.

    Returns:
        The directory.

    Raises:
        ValueError: `output` exists and may not be replaced, or the model is not quantized or has adapters on it.
        OSError: writing failed, for example on a full disk; `output` is as it was.
    """
    if not getattr(model, "is_quantized", False):
        raise ValueError("save_quantized needs a quantized model: quantize it first, or call model.save_pretrained.")
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            "save_quantized saves no PEFT adapter: save it with its own save_pretrained, and unload() it before the model is saved."
        )
    target = check_output(output, overwrite=overwrite)
    with written_whole(target) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _correct_index(partial, count_parameters(model))
        for file in partial.glob("*.safetensors"):
            _sort_metadata(file)
        if processor is not None:
            _forget_configuration(processor)
            processor.save_pretrained(partial)
        if report is not None:
            (partial / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_card(partial, name=target.name)
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; it takes the target's place when the block ends without an error.

    Its files get the permissions of any new file, so that whoever may read the directory can load the model.

    Args:
        target: from `check_output`.

    Raises:
        OSError: writing failed, for example on a full disk; `target` is as it was.
    """
    partial = target.with_name(f".{target.name}.partial-{uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _follow_umask(partial)
        _move_into_place(partial, target)
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own
        raise OSError(f"{target}: could not be saved ({' '.join(str(error).split())}); nothing was changed there.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Checks, before hours of work, that a directory may be written.

    Returns:
        Its real path.

    Raises:
        ValueError: it is a file; it holds something and `overwrite` is False; its parent may not be written; or it holds no saved
            model, so replacing it would destroy something else.
    """
    target = Path(output).resolve()
    if not target.exists():
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"{output}: cannot be made in {parent}: choose a directory that you may write to.")
        return target
    if not target.is_dir():
        raise ValueError(f"{output}: is a file, must be a directory: choose another name.")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise ValueError(f"{output}: exists and is not empty: choose another directory, or overwrite it (--overwrite).")
    if not (target / "config.json").is_file() or Path.cwd().is_relative_to(target):
        raise ValueError(f"{output}: holds no saved model (or the working directory) and is not replaced: choose another directory.")
    return target


def _forget_configuration(processor: Any) -> None:  # noqa: ANN401 - any Transformers processor
    """Takes a quantization configuration out of a processor, which could not be written to JSON with it.

    `transformers.pipeline` hands `model_kwargs` to the processor too, and the tokenizer keeps what it does not know.
    """
    getattr(getattr(processor, "tokenizer", None), "init_kwargs", {}).pop("quantization_config", None)


def _correct_index(folder: Path, parameters: int) -> None:
    """Writes the true parameter count into a shard index; Transformers counts packed words and scales."""
    index = folder / INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_parameters"] = parameters
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sort_metadata(file: Path) -> None:
    """Orders a safetensors header's metadata by key: safetensors writes it in random order, and equal models shall be equal files."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(content) == size:  # always, unless safetensors starts to write spaces
            opened.seek(8)
            opened.write(content)


def _follow_umask(folder: Path) -> None:
    """Gives every file the permissions that a new one gets here: safetensors writes through temporary files, which nobody else may read."""
    new = folder / f".new-{uuid4().hex[:8]}"  # os.umask could only be asked by changing it, for every thread
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode != mode:  # some file systems have one mode for all, and no chmod
            file.chmod(mode)


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{uuid4().hex[:8]}")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
