"""What a quantized checkpoint must satisfy, before a weight is read (headers) and after (values).

Transformers alone loads a packed tensor of the wrong dtype, a missing scale or a NaN in silence. It
opens a file outside the directory if the shard index says so. Every finding here is a ValueError
of one line: what is wrong, which file or tensor, how to mend it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from qvlm_hf.format.files import TensorHeader, tensor_headers
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.key_names import PARTS, names_when_loaded
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.linear import QVLMLinear

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = [
    "check_complete",
    "check_files",
    "check_loaded",
    "check_values",
    "empty_modules",
    "read_headers",
]

_AGAIN = "download or quantize it again"
_BIAS = ("F32", "F16", "BF16")
_DTYPES = {
    torch.int32: "I32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip
_MAX_POSITIONS = 2**20  # a vision encoder sees 577 positions; a million is no picture


def check_files(files: Sequence[str] | None, root: str) -> None:
    """Checks where the weights come from.

    Raises:
        ValueError: there is no file, a format other than safetensors, or a shard outside `root`.
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


def read_headers(model: PreTrainedModel, files: Sequence[str | Path]) -> dict[str, TensorHeader]:
    """Reads the headers, no weights, under the names that the tensors have in `model`.

    The conversion rules of `model`, of which no module is replaced yet, rename the keys.

    Raises:
        ValueError: a file cannot be read, or two files hold the same tensor.
    """
    in_model = names_when_loaded(model)
    headers: dict[str, TensorHeader] = {}
    for header in (header for file in files for header in tensor_headers(file)):
        if (name := in_model(header.key)) in headers:
            raise ValueError(
                f"{header.where}: the tensor is also in {headers[name].where}: the directory mixes "
                f"two models, {_AGAIN}."
            )
        headers[name] = header
    return headers


def empty_modules(
    model: PreTrainedModel, modules: Mapping[str, QuantScheme], headers: Mapping[str, TensorHeader]
) -> dict[str, QVLMLinear]:
    """Makes the quantized modules that config.json lists, to be filled from files that fit them.

    They lie on the meta device, by their names in `model`.

    Raises:
        ValueError: the files are of a full-precision model; config.json, the model's linear modules
            and the files disagree on a module; or a tensor is missing, one too many, or of another
            dtype or shape than its module's.
    """
    packed = {key.removesuffix(".weight_scale") for key in headers if key.endswith(".weight_scale")}
    if not packed:
        raise ValueError(
            "the model's configuration has a quantization_config, but the files hold no packed "
            "weight: to quantize them, give it to from_pretrained(..., quantization_config=)."
        )
    if not modules:
        raise ValueError(
            "config.json: quantization_config lists no modules: the checkpoint is damaged, "
            f"{_AGAIN}."
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
    # LlavaModel itself has no "model." in front, and no head; some whole models have none either.
    bare = not hasattr(model, model.base_model_prefix) and linears.keys().isdisjoint(modules)
    empty = {}
    for name, scheme in modules.items():
        if bare and not name.startswith(prefix):
            continue
        local = linears.get(name.removeprefix(prefix) if bare else name)
        if local is None or name in tied:
            raise ValueError(
                f"config.json: quantization_config lists {name!r}, which the model does not have "
                f"as a linear module of its own: {_AGAIN}."
            )
        empty[local] = _empty_module(local, model.get_submodule(local), scheme, headers)
        packed.discard(local)
    if bare:
        packed &= set(linears.values())
    if packed:
        raise ValueError(
            f"{headers[min(packed) + '.weight_scale'].where}: belongs to a quantized module that "
            f"config.json does not list: {_AGAIN}."
        )
    return empty


def _empty_module(
    name: str, linear: Any, scheme: QuantScheme, headers: Mapping[str, TensorHeader]
) -> QVLMLinear:
    found = {part: headers[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in headers}
    if scheme.hadamard and linear.in_features % scheme.hadamard:
        raise ValueError(
            f"{name}: a Hadamard block of {scheme.hadamard} does not divide its "
            f"{linear.in_features} inputs: {_AGAIN}."
        )
    module = QVLMLinear(
        linear.in_features, linear.out_features, scheme, bias=linear.bias is not None,
        dtype=linear.weight.dtype, device="meta", has_input_scale="input_scale" in found,
        positions=_positions(found.get("input_scale")) if scheme.granularity == "token" else None,
    )  # fmt: skip
    wanted = dict(module.named_parameters())
    for part in PARTS:
        if part in wanted and part not in found:
            raise ValueError(f"{name}.{part}: is missing from the checkpoint: {_AGAIN}.")
        if part in found and part not in wanted:
            raise ValueError(
                f"{found[part].where}: has no place in a module with its scheme "
                f"({scheme.granularity}): {_AGAIN}."
            )
    for part, parameter in wanted.items():
        header, shape = found[part], tuple(parameter.shape)
        dtypes = _BIAS if part == "bias" else (_DTYPES[parameter.dtype],)
        if header.dtype not in dtypes or header.shape != shape:
            raise ValueError(
                f"{header.where}: is {header.dtype} {list(header.shape)}, must be "
                f"{' or '.join(dtypes)} {list(shape)}: {_AGAIN}."
            )
    return module


def _positions(header: TensorHeader | None) -> int:
    """Positions of a "token" module; 1 where they cannot be read, which is reported as a shape."""
    if header is None or len(header.shape) != 1:
        return 1
    if not 1 <= header.shape[0] <= _MAX_POSITIONS:
        raise ValueError(
            f"{header.where}: {header.shape[0]} positions must be 1 to {_MAX_POSITIONS}: {_AGAIN}."
        )
    return header.shape[0]


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
    """Checks the values of every parameter; offloaded ones are fetched one module at a time.

    Raises:
        ValueError: a tensor of a quantized module did not come from the files, or as
            `check_values`.
    """
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        quantized = isinstance(module, QVLMLinear)
        for part, parameter in parameters.items():
            # a missing tensor is memory that nobody wrote; Transformers only reports it
            written = parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
            if quantized and not written:
                raise ValueError(f"{name}.{part}: is not in the checkpoint: {_AGAIN}.")
        if parameters:
            with align_module_device(module):
                held = {part: getattr(module, part) for part in parameters}
                check_values(name, held, module.scheme if isinstance(module, QVLMLinear) else None)


def check_values(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme | None) -> None:
    """Checks the tensors of one module; integer kernels would turn NaN into a number.

    Raises:
        ValueError: a scale is not finite and positive, a zero point is outside its grid, or any
            other tensor holds NaN or infinity.
    """
    for part, tensor in tensors.items():
        kind = "" if scheme is None else part.partition("_")[2]  # "scale" or "zero_point"
        if scheme is not None and part == "weight":
            continue  # packed integers: any will do
        low, high = _bounds(tensor)
        if kind == "scale" and not 0 < low <= high < float("inf"):
            raise ValueError(
                f"{name}.{part}: holds a value that is not finite and above 0: {_AGAIN}."
            )
        if scheme is not None and kind == "zero_point":
            bits = scheme.weight_bits if part.startswith("weight") else scheme.activation_bits
            if not 0 <= low <= high < 2**bits:
                raise ValueError(
                    f"{name}.{part}: holds a value outside 0 ... {2**bits - 1}: {_AGAIN}."
                )
        if not float("-inf") < low <= high < float("inf"):
            narrow = tensor.dtype == torch.float16
            wider = "load it in a wider dtype than float16, or " if narrow else ""
            raise ValueError(f"{name}.{part}: holds NaN or infinity: {wider}{_AGAIN}.")


def _bounds(values: Tensor) -> tuple[float, float]:
    """Smallest and largest value, NaN if one is; 1 where there are none.

    One pass: masks took a third of loading a 7B model.
    """
    if not values.numel() or values.is_meta:
        return 1.0, 1.0
    low, high = torch.aminmax(values.detach())
    return float(low), float(high)
