"""Saving a quantized model, so that an error or Ctrl-C leaves nothing half-written or destroyed.

Only what an earlier result listed as its own is ever replaced (hub/file_list.py), and a directory
that exists stays itself.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError

from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.values import shown
from qvlm_hf.format.files import INDEX_NAME, write_json
from qvlm_hf.hf.earlier_result import OLD, PARTIAL, check_replaceable
from qvlm_hf.hub.card import write_card
from qvlm_hf.hub.file_list import list_files, written_entries
from qvlm_hf.hub.saved import REPORT_NAME
from qvlm_hf.nn.footprint import count_parameters

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["REPORT_NAME", "check_output", "save_quantized", "written_whole"]


def save_quantized(
    model: PreTrainedModel,
    processor: Any,
    output: str | os.PathLike[str],
    *,
    report: CalibrationReport | None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Writes model, processor, report and card, all or nothing (`written_whole` says how).

    Args:
        model: quantized.
        processor: saved with it, because pipelines need it; None leaves it out.
        output: the directory to make; an empty one, or one to overwrite, stays the same directory.
        report: written as qvlm_report.json; None leaves it out.
        overwrite: replace an earlier result, which stays until the new one is complete.
        max_shard_size: of one safetensors file.

    Returns:
        The directory.

    Raises:
        ValueError: as `check_output`, the model is not quantized or has adapters on it, or
            processor or report is none.
        OSError: writing failed, for example on a full disk; `output` is as it was.
    """
    if not getattr(model, "is_quantized", False):
        raise ValueError(
            "save_quantized needs a quantized model: quantize it first, or call "
            "model.save_pretrained."
        )
    if not (processor is None or hasattr(processor, "save_pretrained")):
        raise ValueError(
            f"processor={shown(processor)} cannot be saved: give what "
            f"AutoProcessor.from_pretrained returns, or None."
        )
    if not (report is None or isinstance(report, CalibrationReport)):
        raise ValueError(
            f"report={shown(report)} is no CalibrationReport: give model.hf_quantizer.report, or "
            f"None."
        )
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            "save_quantized saves no PEFT adapter: save it with its own save_pretrained, and "
            "unload() it before the model is saved."
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
            write_json(partial / REPORT_NAME, report.to_dict())
        write_card(partial, name=target.name)
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory to write into; `target` gets its content when the block ends without an error.

    A new target is written beside its place and renamed, in one step. An existing one stays the
    same directory, for whoever stands in it or mounted it: a folder inside is written, and its
    content moved up by renames. The old config.json goes first and the new one comes last. So a
    machine that stops in between leaves no model that loads and is neither; both are whole, in
    `.qvlm-old-...` and in `.qvlm-partial-...` with what was moved up. The old one is deleted when
    everything new is on the disk.

    Raises:
        OSError: writing failed, for example on a full disk; `target` is as it was. If only the move
            failed, the message names the folder where everything is.
    """
    earlier = (written_entries(target) or []) if target.is_dir() else None
    parent = target.parent if earlier is None else target
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    partial = parent / f"{PARTIAL}{uuid4().hex[:8]}"
    complete = False
    try:
        partial.mkdir(parents=True)
        yield partial
        list_files(partial)
        for file in partial.rglob("*"):
            _write_through(file)
        _follow_umask(partial)
        complete = True
        if earlier is None:
            partial.rename(target)
        else:
            _move_into(target, partial, earlier)
        complete = False
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as an error of its own
        reason = " ".join(str(error).split())
        if complete:
            raise OSError(
                f"{target}: is as it was, the last step failed ({reason}); the new result is whole "
                f"in {partial}."
            ) from error
        raise OSError(
            f"{target}: could not be saved ({reason}); nothing was changed there."
        ) from error
    finally:
        if not complete:
            shutil.rmtree(partial, ignore_errors=True)
            _remove_empty(made)


def check_output(output: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Checks that a directory can be written and holds nothing that would be lost.

    The check makes the directory and a file of a long name in it, and removes them again. Returns
    its real path.

    Raises:
        ValueError: it is a file or cannot be written; it holds something and `overwrite` is False;
            or it holds more than an earlier result of ours.
    """
    if not os.fspath(output):
        raise ValueError(
            "output is empty, which names no directory: give its name, or '.' for this one."
        )
    try:
        target = Path(os.path.expanduser(output)).resolve()
        if target.exists() and not target.is_dir():
            raise ValueError(f"{output}: is a file, must be a directory: choose another name.")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise ValueError(
                    f"{output}: exists and is not empty: choose another directory, or overwrite it "
                    f"(--overwrite)."
                )
            check_replaceable(target, output)
        _try_writing(target)
    except OSError as error:
        long = error.errno == errno.ENAMETOOLONG
        remedy = "a shorter name" if long else "a directory that you may write to"
        raise ValueError(
            f"{output}: cannot be written ({error.strerror}): choose {remedy}."
        ) from error
    return target


def _try_writing(target: Path) -> None:
    """Makes, and removes, what a save would make: a directory, a folder in it, a file there.

    Raises:
        OSError: it cannot be made.
    """
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    folders = [
        parent / f"{PARTIAL}{uuid4().hex[:8]}"
        for parent in {target, target.parent if made else target}
    ]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / INDEX_NAME).touch()
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _forget_configuration(processor: Any) -> None:
    """Takes a quantization configuration out of a tokenizer, whose JSON could not hold it.

    `transformers.pipeline` hands it `model_kwargs` too, and it keeps what it does not know.
    """
    getattr(getattr(processor, "tokenizer", None), "init_kwargs", {}).pop(
        "quantization_config", None
    )


def _correct_index(folder: Path, parameters: int) -> None:
    """Corrects the parameter count of a shard index: Transformers counts packed words."""
    index = folder / INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_parameters"] = parameters
        write_json(index, content)


def _sort_metadata(file: Path) -> None:
    """Orders a header's metadata by key: safetensors writes it in random order."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(content) == size:  # always, unless safetensors starts to write spaces
            opened.seek(8)
            opened.write(content)


def _follow_umask(folder: Path) -> None:
    """Gives every file the permissions of a new one: those of safetensors are private."""
    # os.umask could only be asked by changing it, for every thread
    new = folder / f".new-{uuid4().hex[:8]}"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for file in folder.rglob("*"):
        # some file systems have one mode for all, and no chmod
        if file.is_file() and file.stat().st_mode != mode:
            file.chmod(mode)


def _write_through(path: Path) -> None:
    """Waits until a file is on the disk, or a directory, which some file systems cannot."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _move_into(target: Path, partial: Path, earlier: Sequence[Path]) -> None:
    """Moves what is in `partial` into `target`, its parent, in place of the earlier result there.

    Raises:
        OSError: it could not; everything is back where it was.
    """
    old = target / f"{OLD}{uuid4().hex[:8]}"
    if earlier:
        old.mkdir()
    moves = [(path, old / path.name) for path in sorted(earlier, key=_config_last, reverse=True)]
    moves += [(path, target / path.name) for path in sorted(partial.iterdir(), key=_config_last)]
    try:
        for path, place in moves:
            if os.path.lexists(place):  # it came while we wrote
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            path.rename(place)
    except BaseException:  # an interruption too
        for path, place in reversed(moves):
            if not os.path.lexists(path) and os.path.lexists(place):
                with suppress(OSError):  # each by itself: one that fails keeps no other away
                    place.rename(path)
        _remove_empty([old])
        raise
    _write_through(target)
    shutil.rmtree(old, ignore_errors=True)


def _config_last(path: Path) -> bool:
    return path.name == "config.json"
