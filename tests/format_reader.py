"""Computes a module's output from a saved directory: a second reader of the format, written from
docs/format.md alone.

Needs json, struct and numpy: no qvlm_hf, no Transformers, no torch, no safetensors. It is slow and
literal on purpose. Whatever it finds that the page does not allow (another dtype, a missing or an
extra tensor) is a ValueError.

    y = module_output("my-model", "model.language_model.layers.0.mlp.down_proj", x)
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

__all__ = ["module_output", "module_tensors"]

_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U8": "u1"}
_FIXED = {
    "weight": "I32",
    "weight_scale": "BF16",
    "weight_zero_point": "U8",
    "input_scale": "F32",
    "input_zero_point": "I32",
}
_LAYOUT = (
    "model",
    "vision_model",
)  # components in which the key layouts of Transformers versions differ


def module_output(directory: str | Path, module_name: str, x: np.ndarray) -> np.ndarray:
    """The output of one quantized linear module, before it is rounded to the model's dtype.

    Args:
        directory: holds config.json and model*.safetensors.
        module_name: canonical, a key of `quantization_config.modules`.
        x: [..., in_features] ([..., positions, in_features] for granularity "token"); converted to
            float32.

    Returns:
        float32 [..., out_features].
    """
    directory = Path(directory)
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]["modules"][
        module_name
    ]
    tensors = module_tensors(directory, module_name)
    x = np.asarray(x, dtype=np.float32)
    if entry["input_transform"] is not None:
        x = _hadamard(x, entry["input_transform"]["hadamard"])
    bits, in_features = entry["weight_bits"], x.shape[-1]
    scale = tensors["weight_scale"]
    length = in_features if entry["group_size"] == -1 else min(entry["group_size"], in_features)
    a, r = _quantize_input(x, entry, tensors, length)
    zero_point = (
        np.full(scale.shape, 2 ** (bits - 1))
        if entry["symmetric"]
        else tensors["weight_zero_point"]
    )
    integers = _unpack(tensors["weight"], bits, in_features)
    if scale.shape != zero_point.shape or scale.shape[1] != -(-in_features // length):
        raise ValueError(
            f"{module_name}: {scale.shape} scales and {zero_point.shape} zero points for groups of "
            f"{length}."
        )
    y = np.zeros((*x.shape[:-1], len(integers)), np.float32)
    for g in range(scale.shape[1]):
        part = slice(g * length, (g + 1) * length)
        shifted = integers[:, part] - zero_point[:, g : g + 1].astype(np.float64)
        # float64: sums of integers are exact
        added = scale[:, g] * (a[..., part].astype(np.float64) @ shifted.T).astype(np.float32)
        y += added * r[..., g * length, None] if entry["granularity"] == "dynamic_group" else added
    if entry["granularity"] == "dynamic_group":
        r = np.float32(1)
    return (y * r + tensors.get("bias", np.float32(0))).astype(np.float32)


def module_tensors(directory: str | Path, module_name: str) -> dict[str, np.ndarray]:
    """The tensors of one module by their last name ("weight", "weight_scale", …), as float32, int32
    or uint8 arrays.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(Path(directory).glob("model*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            for key, info in header.items():
                prefix, _, name = key.rpartition(".")
                if key == "__metadata__" or not _same(prefix, module_name):
                    continue
                file.seek(8 + size + info["data_offsets"][0])
                data = file.read(info["data_offsets"][1] - info["data_offsets"][0])
                found.setdefault(prefix, {})[name] = _array(data, key, name, info)
    if len(found) != 1:
        raise ValueError(f"{module_name} must be one module of the files, found {sorted(found)}.")
    return next(iter(found.values()))


def _same(prefix: str, module_name: str) -> bool:
    """Whether a key's prefix is the module's canonical name in another layout; the head may lie
    below the language model.
    """
    key, name = (
        [part for part in text.split(".") if part not in _LAYOUT] for text in (prefix, module_name)
    )
    return key == name or (name == ["lm_head"] and key[-1:] == name)


def _array(data: bytes, key: str, name: str, info: dict) -> np.ndarray:
    dtype = info["dtype"]
    if dtype != _FIXED.get(name, dtype) or dtype not in _DTYPES or name not in (*_FIXED, "bias"):
        raise ValueError(f"{key} has dtype {dtype}: the format does not know it.")
    values = np.frombuffer(data, _DTYPES[dtype]).reshape(info["shape"])
    if dtype == "BF16":
        # a bfloat16 is the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if dtype == "F16" else values


def _quantize_input(
    x: np.ndarray, entry: dict, tensors: dict[str, np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray | float]:
    """(a, r) of the formula, by granularity; r of "dynamic_group" is that of each input."""
    granularity, top = entry["granularity"], 2 ** entry["activation_bits"] - 1
    scale, zero_point = tensors.get("input_scale"), tensors.get("input_zero_point")
    stored = {
        "channel": (True, True),
        "token": (True, True),
        "dynamic_token": (False, False),
        "dynamic_group": (False, False),
        "none": (scale is not None, False),
    }[granularity]
    if (scale is not None, zero_point is not None) != stored or (
        "weight_zero_point" in tensors
    ) == entry["symmetric"]:
        raise ValueError(
            f"a module of granularity {granularity}, symmetric={entry['symmetric']} must not have "
            f"the tensors {sorted(tensors)}."
        )
    if granularity == "none":
        return (x if scale is None else x / scale), 1.0
    r: np.ndarray | float = 1.0
    if granularity == "token":
        if scale.shape != (x.shape[-2],):
            raise ValueError(f"{x.shape[-2]} positions, {scale.shape[0]} were calibrated.")
        scale, zero_point = scale[:, None], zero_point[:, None]
        r = scale
    elif granularity == "dynamic_token":
        low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
        high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
        scale = (high - low) / np.float32(top)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero_point = np.rint(-low / scale)
        r = scale
    elif granularity == "dynamic_group":
        starts = range(0, x.shape[-1], length)
        low, high = (
            np.repeat(
                np.stack([f(x[..., k : k + length], axis=-1, initial=0) for k in starts], -1),
                length,
                axis=-1,
            )[..., : x.shape[-1]]
            for f in (np.min, np.max)
        )
        scale = (high - low) / np.float32(top)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero_point = np.rint(-low / scale)
        r = scale
    return np.clip(np.rint(x / scale) + zero_point, 0, top) - zero_point, r


def _unpack(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """float64 [out, in]: bit i of a row's stream is bit i % 32 of word i // 32, value k has bits k
    * bits and up.
    """
    if words.shape[1] != -(-length * bits // 32):
        raise ValueError(f"{words.shape[1]} words do not hold {length} values of {bits} bits.")
    stream = np.unpackbits(
        np.ascontiguousarray(words).astype("<i4").view(np.uint8), axis=1, bitorder="little"
    )
    if stream[:, length * bits :].any():
        raise ValueError("the rest of the last word must be zero.")
    return stream[:, : length * bits].reshape(len(words), length, bits) @ (2.0 ** np.arange(bits))


def _hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """x times the normalised Hadamard matrix: the sign of (i, j) is the parity of the bits that i
    and j share.
    """
    index = np.arange(block)
    shared = index[:, None] & index[None, :]
    parity = sum((shared >> bit) & 1 for bit in range(block.bit_length())) % 2
    sums = x.reshape(*x.shape[:-1], -1, block).astype(np.float64) @ (1.0 - 2.0 * parity)
    return (sums.astype(np.float32) / np.float32(math.sqrt(block))).reshape(x.shape)
