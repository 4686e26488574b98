"""How much memory a model takes: the bytes that it stores, and the most that it needs while it answers."""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["decoder_bytes", "peak_bytes", "stored_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what the kernel takes as "forget the highest resident size"


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once, with what other packages keep beside or inside them."""
    return sum(_plain_tensors((*model.parameters(), *model.buffers())).values())


def decoder_bytes(model: Any) -> int:
    """Bytes of weights that one decoding step reads: the decoder without its embedding table, and the output head."""
    decoder, head, table = (
        model.get_decoder(),
        model.get_output_embeddings(),
        model.get_input_embeddings(),
    )
    embeddings = {id(parameter) for parameter in table.parameters()}
    kept = [
        tensor
        for tensor in (*decoder.parameters(), *decoder.buffers())
        if id(tensor) not in embeddings
    ]
    return sum(_plain_tensors((*kept, *head.parameters(), *head.buffers())).values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Runs something and returns the most memory that it took at a time beyond what was taken before.

    CUDA: of PyTorch's allocator. CPU: resident memory of this process, whose high-water mark Linux
    can reset. None elsewhere; memory that the C library had kept from before and used again is not
    seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    resettable = _reset_peak()
    resident = _status("VmRSS")
    run()
    highest = _status("VmHWM")
    return (
        max(0, highest - resident)
        if resettable and resident is not None and highest is not None
        else None
    )


def _plain_tensors(tensors: Iterable[Tensor]) -> dict[tuple[int, int], int]:
    """(address, bytes) -> bytes of the tensors that hold the data."""
    found: dict[tuple[int, int], int] = {}
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        inner = _inner(tensor)
        waiting += inner
        if not (inner and hasattr(tensor, "__tensor_flatten__")):
            size = tensor.numel() * tensor.element_size()
            # tensors on the meta device have no address: each counts
            found[tensor.data_ptr() or id(tensor), size] = size
    return found


def _inner(tensor: Any) -> list[Tensor]:
    """Parts of a tensor subclass (torchao), or what stands beside a parameter (bitsandbytes)."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    state = getattr(tensor, "quant_state", None)
    beside = [
        getattr(tensor, "SCB", None),
        getattr(state, "absmax", None),
        getattr(state, "code", None),
    ]
    return [part for part in beside if isinstance(part, Tensor)]


def _reset_peak() -> bool:
    if platform.system() != "Linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what the C library keeps would hide what is taken next
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    sizes = [
        int(line.split()[1]) * 1024
        for line in _STATUS.read_text().splitlines()
        if line.startswith(f"{field}:")
    ]
    return sizes[0] if sizes else None
