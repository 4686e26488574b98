"""Models of which a part lies on disk, to be quantized: their weights are mapped from the files.

A mapped weight is in memory only while it is used, as an offloaded one is. But it needs no hook,
and a module can be replaced. On a GPU weights have to be copied, so that this is for the CPU alone.
"""

from itertools import chain
from typing import Any

import torch

__all__ = ["map_weights", "mapped_device_map"]

_ON_CPU = {"cpu", "disk"}


def mapped_device_map(device_map: Any) -> Any:
    """Puts on the CPU, where files are mapped, what a device map spreads over CPU and disk.

    Raises:
        ValueError: it names the disk and another device than the CPU.
    """
    if isinstance(device_map, str) and not torch.accelerator.is_available():
        return {"": "cpu"}
    devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
    if "disk" not in devices:
        return device_map
    if devices <= _ON_CPU:
        return {"": "cpu"}
    raise ValueError(
        "device_map offloads to disk, where weights of a GPU cannot be quantized: quantize with "
        "device_map='cpu', save, and load the result with it."
    )


def map_weights(model: Any) -> None:
    """Gives a model its offloaded weights, mapped from their files, and takes the hooks off.

    Does nothing to a model that has none, or that runs on another device than the CPU.
    """
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    found = [(module, module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")]
    hooks = [
        (module, one)
        for module, hook in found
        for one in getattr(hook, "hooks", (hook,))
        if isinstance(one, AlignDevicesHook)
    ]
    runs_on = {str(hook.execution_device) for _, hook in hooks} - {"None"}
    offloaded = any(hook.weights_map is not None for _, hook in hooks)
    if not offloaded or runs_on - {"cpu"}:
        return
    for module, hook in hooks:
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if hook.weights_map is not None and tensor is not None and tensor.is_meta:
                value = hook.weights_map[name]
                set_module_tensor_to_device(module, name, "cpu", value=value, dtype=value.dtype)
    remove_hook_from_module(model, recurse=True)
    vars(model).pop("hf_device_map", None)  # saving would look for offloaded weights
    if hasattr(model, "tie_weights"):
        model.tie_weights()
