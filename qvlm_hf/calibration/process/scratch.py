"""Scratch files: what grows with layers or samples, mapped from a disk instead of held in memory.

`keep(tensor)` returns a tensor of the same values, dtype and strides. Inside `scratch(folder)` its
memory is a mapped file: the kernel writes it back and drops it when memory runs short, and reads it
again when it is asked for. So calibration has one code path, and the same bits with files and
without (docs/decisions/0026).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_scratch_dir", "keep", "scratch"]

# Smaller tensors stay in memory: the kernel allows 65,530 mappings of a process by default.
_SMALL = 2**16
_IN_MEMORY = ("tmpfs", "ramfs")  # file systems that would win nothing

_folder: ContextVar[Path | None] = ContextVar("scratch folder", default=None)


@contextmanager
def scratch(folder: Path | None) -> Iterator[None]:
    """Inside, `keep` uses files in `folder`, from `check_scratch_dir`; None: memory, as outside."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def keep(tensor: Tensor) -> Tensor:
    """A tensor to hold for long: of the same values, in a scratch file where there is a folder.

    The file has no name any more when this returns; its space is free again when the last tensor on
    it is gone, however the process ends. Small tensors, those on other devices, and those with
    holes in memory are returned as they are.

    Returns:
        A tensor without gradient, of equal dtype, shape and strides.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    folder, size = _folder.get(), tensor.numel() * tensor.element_size()
    if folder is None or size < _SMALL or tensor.device.type != "cpu" or not _dense(tensor):
        return tensor
    if tensor.untyped_storage().filename is not None:  # mapped already
        return tensor
    in_order = tensor.detach().as_strided((tensor.numel(),), (1,))
    try:
        with NamedTemporaryFile(prefix="qvlm-scratch-", dir=folder) as file:
            # written and then mapped: a full disk is an error here, in a mapping it kills
            file.write(in_order.view(torch.uint8).numpy().data)
            file.flush()
            storage: Any = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size)
    except OSError as error:
        raise OSError(
            f"{folder}: cannot be written ({error.strerror}): make room there, or choose another "
            f"directory for scratch files."
        ) from error
    except RuntimeError:  # no further mapping is allowed: this one stays in memory
        return tensor
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tuple(tensor.shape), tensor.stride())


def _dense(tensor: Tensor) -> bool:
    """Whether every byte between first and last element is an element's, once."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def check_scratch_dir(folder: str | os.PathLike[str]) -> Path:
    """Makes a directory for scratch files, or takes one that exists, whatever it holds.

    Returns its real path.

    Raises:
        ValueError: it cannot be written, or lies in memory itself.
    """
    path = Path(os.path.expanduser(folder)).resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}): choose a directory for scratch files "
            f"that you may write to."
        ) from error
    if (kind := _file_system(path)) in _IN_MEMORY:
        raise ValueError(
            f"{path}: lies in memory ({kind}): choose a directory for scratch files on a disk."
        )
    if os.name != "posix":
        raise ValueError("scratch files need Linux or macOS: leave scratch_dir out.")
    return path


def _file_system(path: Path) -> str | None:
    """The kind of file system that a directory lies on, as Linux names it; None if unknown."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    kinds = {Path(mount[1]): mount[2] for mount in mounts}
    return next((kinds[parent] for parent in (path, *path.parents) if parent in kinds), None)
