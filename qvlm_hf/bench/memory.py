"""Memory of a model: the bytes that it stores, and the most that it needs while it answers."""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["decoder_bytes", "peak_bytes", "status_bytes", "stored_bytes"]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once, with other packages' extra tensors."""
    return _bytes((*model.parameters(), *model.buffers()))


def decoder_bytes(model: Any) -> int:
    """Bytes that one decoding step reads: decoder and output head, without the embedding table."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    table = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    tensors = (t for t in (*decoder.parameters(), *decoder.buffers()) if id(t) not in table)
    return _bytes((*tensors, *head.parameters(), *head.buffers()))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Runs something; returns the most memory that it took at a time, beyond what was taken before.

    CUDA: of PyTorch's allocator. Linux: resident memory of this process; memory that the C library
    had kept from before is not seen. Elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    resettable = _reset_peak()
    resident = status_bytes("VmRSS")
    run()
    highest = status_bytes("VmHWM")
    return max(0, highest - resident) if resettable and resident and highest else None


def status_bytes(field: str) -> int | None:
    """Bytes of a field of this process's status, as "VmRSS"; None where Linux does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return sizes[0] if sizes else None


def _bytes(tensors: Iterable[Tensor]) -> int:
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
    return sum(found.values())


def _inner(tensor: Any) -> list[Tensor]:
    """Parts of a tensor subclass (torchao), or tensors beside a parameter (bitsandbytes)."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    state = getattr(tensor, "quant_state", None)
    beside = (tensor, "SCB"), (state, "absmax"), (state, "code")
    parts = [getattr(owner, name, None) for owner, name in beside]
    return [part for part in parts if isinstance(part, Tensor)]


def _reset_peak() -> bool:
    """Makes Linux forget the process's highest resident size; whether it did."""
    if platform.system() != "Linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory kept by the C library would hide what is taken next
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
