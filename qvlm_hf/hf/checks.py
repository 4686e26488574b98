"""What a quantized checkpoint must satisfy: before a weight is read (files and headers) and after (values).

Transformers alone loads a packed tensor of the wrong dtype, a missing scale or a NaN in silence,
and opens a file outside the directory if the shard index says so. Every finding here is a one-line
ValueError: what, which file or tensor, how to mend it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.linear import QVLMLinear

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = [
    "PackedLayout",
    "TensorHeader",
    "check_complete",
    "check_files",
    "check_loaded",
    "check_modules",
    "check_values",
    "read_headers",
    "tensor_headers",
]

_AGAIN = "download or quantize it again"
_FLOATS = ("F32", "F16", "BF16")
_PARTS = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias")
_MAX_POSITIONS = 2**20  # a vision encoder sees 577 positions; a million is no picture


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor as the safetensors header describes it: the file's name, the key in it, dtype and shape."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}: {self.key}"


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """What the skeleton of one quantized module needs besides the float module it replaces."""

    scheme: QuantScheme
    positions: int | None
    has_input_scale: bool


def check_files(files: Sequence[str] | None, root: str) -> None:
    """Checks where the weights come from.

    Args:
        files: as Transformers resolved them.
        root: the directory (or Hub id) that was asked for.

    Raises:
        ValueError: no file, another format than safetensors, or a shard outside the checkpoint's
            own directory.
    """
    if not files:
        raise ValueError(
            "a quantized model is loaded from safetensors files: pass a directory or a Hub id, not "
            "a state_dict."
        )
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"{file}: quantized weights must be safetensors, and no pickle is ever opened: "
                f"{_AGAIN} as .safetensors."
            )
    folders = {os.path.dirname(os.path.abspath(file)) for file in files}
    inside = os.path.abspath(root) if os.path.isdir(root) else next(iter(folders))
    if len(folders) > 1 or os.path.commonpath([inside, *folders]) != inside:
        raise ValueError(
            f"{root}: the shard index names files in other directories ({sorted(folders)[0]}): do "
            f"not trust this checkpoint, {_AGAIN}."
        )


def read_headers(model: PreTrainedModel, files: Sequence[str]) -> dict[str, TensorHeader]:
    """Reads the headers, no weights, under the names that the tensors have in `model`.

    Args:
        model: before any module is replaced; its own conversion rules rename the keys.
        files: safetensors files.

    Raises:
        ValueError: a file cannot be read, or two files hold the same tensor.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def in_model(key: str) -> str:
        # A module's tensors are renamed as its `weight`, the one that the float model has too.
        base, _, part = key.rpartition(".")
        known = f"{base}.weight" if part in _PARTS else key
        renamed = rename_source_key(known, renamings, converters, model.base_model_prefix, state)[0]
        if renamed not in state and known in state:
            renamed = known
        return f"{renamed.removesuffix('weight')}{part}" if part in _PARTS else renamed

    headers: dict[str, TensorHeader] = {}
    for file in files:
        for key, dtype, shape in tensor_headers(file):
            header = TensorHeader(file=os.path.basename(file), key=key, dtype=dtype, shape=shape)
            if (name := in_model(key)) in headers:
                raise ValueError(
                    f"{header.where}: the tensor is also in {headers[name].where}: the directory "
                    f"mixes two models, {_AGAIN}."
                )
            headers[name] = header
    return headers


def check_modules(
    model: PreTrainedModel, modules: Mapping[str, QuantScheme], headers: Mapping[str, TensorHeader]
) -> dict[str, PackedLayout]:
    """Compares config.json's modules, the model's linear modules and the tensors in the files.

    Args:
        model: before any module is replaced.
        modules: canonical name -> scheme, from config.json.
        headers: from `read_headers`.

    Returns:
        Module name in `model` -> what its skeleton needs.

    Raises:
        ValueError: a module is in one of the three and not in another, or a tensor is missing, one
            too many, or has another dtype or shape than the format says.
    """
    if not modules:
        raise ValueError(
            "config.json: quantization_config lists no modules: the checkpoint is damaged, "
            + _AGAIN
            + "."
        )
    linears = {
        canonical_name(name): name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    }
    tied = {
        canonical_name(key.removesuffix(".weight"))
        for pair in model.all_tied_weights_keys.items()
        for key in pair
    }
    prefix = f"{model.base_model_prefix}."
    bare = not hasattr(
        model, model.base_model_prefix
    )  # LlavaModel itself: no "model." in front, no head
    packed = {key.removesuffix(".weight_scale") for key in headers if key.endswith(".weight_scale")}
    layouts = {}
    for name, scheme in modules.items():
        if bare and not name.startswith(prefix):
            continue
        local = linears.get(name.removeprefix(prefix) if bare else name)
        if local is None or name in tied:
            raise ValueError(
                f"config.json: quantization_config lists {name!r}, which the model does not have "
                f"as a linear module of its own: {_AGAIN}."
            )
        linear: Any = model.get_submodule(local)
        layouts[local] = _check_module(local, linear, scheme, headers)
        packed.discard(local)
    if bare:
        packed &= set(linears.values())
    if packed:
        name = min(packed)
        raise ValueError(
            f"{headers[name + '.weight_scale'].where}: belongs to a quantized module that "
            f"config.json does not list: {_AGAIN}."
        )
    return layouts


def check_complete(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> None:
    """Checks that the files hold every tensor of the model, whose quantized modules are in place.

    Raises:
        ValueError: naming the first that is missing.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        key
        for key in model.state_dict()
        if key not in headers
        and model.all_tied_weights_keys.get(key) not in headers
        and not any(pattern.search(key) for pattern in ignored)
    ]
    if missing:
        raise ValueError(
            f"{model.config.name_or_path}: {len(missing)} tensors are missing, among them "
            f"{missing[0]}: {_AGAIN}."
        )


def check_loaded(model: nn.Module) -> None:
    """Checks the values of every quantized module and every other parameter; offloaded ones are fetched one by one.

    Raises:
        ValueError: a tensor of a quantized module did not come from the files, a scale is not
            finite and positive, a zero point is outside its grid, or a parameter holds NaN or
            infinity, which integer kernels would turn into numbers.
    """
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, QVLMLinear):
            for part, parameter in parameters.items():
                # a missing tensor is memory that nobody wrote; Transformers only reports it
                if parameter.device.type != "meta" and not getattr(
                    parameter, "_is_hf_initialized", False
                ):
                    raise ValueError(f"{name}.{part}: is not in the checkpoint: {_AGAIN}.")
        if parameters:
            with align_module_device(module):
                held = {part: getattr(module, part) for part in parameters}
                check_values(name, held, module.scheme if isinstance(module, QVLMLinear) else None)


def check_values(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme | None) -> None:
    """Checks the tensors of one module.

    Args:
        name: of the module, for the message.
        tensors: by their names in the module.
        scheme: of a quantized module; None for any other.

    Raises:
        ValueError: a scale is not finite and positive, a zero point is outside its grid, or any
            other tensor holds NaN or infinity.
    """
    for part, tensor in tensors.items():
        if scheme is not None and part == "weight":
            continue  # packed integers: any will do
        low, high = _bounds(tensor)
        if scheme is not None and part in ("weight_scale", "input_scale"):
            if not 0 < low <= high < float("inf"):
                raise ValueError(
                    f"{name}.{part}: holds a value that is not finite and above 0: {_AGAIN}."
                )
        elif scheme is not None and part in ("weight_zero_point", "input_zero_point"):
            top = (
                2 ** (scheme.weight_bits if part == "weight_zero_point" else scheme.activation_bits)
                - 1
            )
            if not 0 <= low <= high <= top:
                raise ValueError(f"{name}.{part}: holds a value outside 0 ... {top}: {_AGAIN}.")
        elif not float("-inf") < low <= high < float("inf"):
            wider = (
                "load it in a wider dtype than float16, or "
                if tensor.dtype == torch.float16
                else ""
            )
            raise ValueError(f"{name}.{part}: holds NaN or infinity: {wider}{_AGAIN}.")


def _bounds(values: Tensor) -> tuple[float, float]:
    """Smallest and largest value, NaN if one is; 1 where there are none.

    One pass: masks took a third of loading a 7B model.
    """
    if not values.numel() or values.is_meta:
        return 1.0, 1.0
    low, high = torch.aminmax(values.detach())
    return float(low), float(high)


def tensor_headers(file: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor of one file; safetensors itself checks that sizes add up to the file's."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = ((key, opened.get_slice(key)) for key in opened.keys())  # noqa: SIM118 - not a dict
            return [(key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is no readable safetensors file ({error}): {_AGAIN}.") from error


def _check_module(
    name: str, linear: nn.Linear, scheme: QuantScheme, headers: Mapping[str, TensorHeader]
) -> PackedLayout:
    found = {part: headers[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in headers}
    positions = _positions(found.get("input_scale")) if scheme.granularity == "token" else None
    has_input_scale = scheme.granularity in ("channel", "token") or (
        scheme.granularity == "none" and "input_scale" in found
    )
    wanted = _wanted(linear, scheme, positions, has_input_scale)
    for part in _PARTS:
        if part in wanted and part not in found:
            raise ValueError(f"{name}.{part}: is missing from the checkpoint: {_AGAIN}.")
        if part in found and part not in wanted:
            raise ValueError(
                f"{found[part].where}: has no place in a module with its scheme "
                f"({scheme.granularity}): {_AGAIN}."
            )
    for part, (dtypes, shape) in wanted.items():
        header = found[part]
        if header.dtype not in dtypes or header.shape != shape:
            raise ValueError(
                f"{header.where}: is {header.dtype} {list(header.shape)}, must be "
                f"{' or '.join(dtypes)} {list(shape)}: {_AGAIN}."
            )
    if scheme.hadamard and linear.in_features % scheme.hadamard:
        raise ValueError(
            f"{name}: a Hadamard block of {scheme.hadamard} does not divide its "
            f"{linear.in_features} inputs: {_AGAIN}."
        )
    return PackedLayout(scheme=scheme, positions=positions, has_input_scale=has_input_scale)


def _wanted(
    linear: nn.Linear, scheme: QuantScheme, positions: int | None, has_input_scale: bool
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Part -> dtypes and shape (docs/format.md, "Tensors of one quantized linear module")."""
    inputs, outputs = linear.in_features, linear.out_features
    per_group = (outputs, scheme.groups(inputs))
    statics = (inputs,) if positions is None else (positions,)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight": (("I32",), (outputs, scheme.words(inputs))),
        "weight_scale": (("BF16",), per_group),
    }
    if not scheme.symmetric:
        wanted["weight_zero_point"] = (("U8",), per_group)
    if has_input_scale:
        wanted["input_scale"] = (("F32",), statics)
    if scheme.granularity in ("channel", "token"):
        wanted["input_zero_point"] = (("I32",), statics)
    if linear.bias is not None:
        wanted["bias"] = (_FLOATS, (outputs,))
    return wanted


def _positions(header: TensorHeader | None) -> int:
    """Positions of a "token" module; 1 where they cannot be read, which the comparison then reports."""
    if header is None or len(header.shape) != 1:
        return 1
    if not 1 <= header.shape[0] <= _MAX_POSITIONS:
        raise ValueError(
            f"{header.where}: {header.shape[0]} positions must be 1 to {_MAX_POSITIONS}: {_AGAIN}."
        )
    return header.shape[0]
