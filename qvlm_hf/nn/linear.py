"""`QVLMLinear`: packed parameters named as in docs/format.md, a forward pass of one operator.

It is an nn.Linear, so that LoRA, offloading and tensor-parallel code treat it as one. Its integers
lie in `weight` with a shape that no float weight can have: a program without this package fails to
load it, instead of running garbage.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qvlm_hf.format.grids import QParams, QuantizedWeight, quantize_weight
from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.packed_weight import (
    FloatForm,
    alias_of,
    check_replacement,
    freeze,
    plain,
    read_by_adapters,
    refuse_removal,
)
from qvlm_hf.ops.call import packed_call
from qvlm_hf.ops.cpu import round_weight
from qvlm_hf.ops.linear import kernel_name, linear
from qvlm_hf.ops.reference import dequantize

__all__ = ["Group", "QVLMLinear", "packed_tensors", "rounded_tensors"]

# float parameters that `.to(dtype)` must leave alone: their dtype is part of the format
_FIXED_DTYPE = ("weight_scale", "input_scale")


def packed_tensors(
    quantized: QuantizedWeight, scheme: QuantScheme, input_qparams: QParams | None
) -> dict[str, Tensor]:
    """Packs one module into the tensors of docs/format.md, without `bias`.

    Args:
        quantized: integers of the (folded) weight.
        scheme: of the module.
        input_qparams: [in] for "channel", [positions] for "token", None otherwise.
    """
    tensors = {
        "weight": pack(quantized.values, scheme.weight_bits),
        "weight_scale": quantized.scale,
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = quantized.zero_point
    if input_qparams is not None:
        # copies: a site's modules share QParams, and safetensors saves no shared memory
        tensors["input_scale"] = input_qparams.scale.to(torch.float32, copy=True)
        tensors["input_zero_point"] = input_qparams.zero_point.to(torch.int32, copy=True)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def rounded_tensors(weight: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    """Rounds a weight to nearest and packs it: the tensors of a module without data or bias.

    Args:
        weight: [out, in], on any device.
        scheme: of the module.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    packed = round_weight(weight, scheme)
    if packed is None:
        return packed_tensors(quantize_weight(weight, scheme), scheme, None)
    return {name: tensor for name, tensor in packed._asdict().items() if tensor is not None}


class Group(Protocol):
    """What a module asks of those that it is computed together with (siblings.py)."""

    def output(self, place: int, module: "QVLMLinear", x: Tensor) -> Tensor | None:
        """What the module at `place` returns for x, or None if it has to compute by itself."""

    def rejoin(self, place: int, module: "QVLMLinear") -> None:
        """Takes in the copy of the module at `place`."""

    def dissolve(self) -> None:
        """From now on every module computes by itself."""


class QVLMLinear(nn.Linear):
    """A quantized linear module, [..., in_features] -> [..., out_features].

    Parameters (never trainable but `bias`): `weight` int32 [out, words], `weight_scale` bfloat16
    [out, groups], `weight_zero_point` uint8 [out, groups] or None, `input_scale` float32 and
    `input_zero_point` int32 [in] or [positions] or None, `bias` [out] or None.

    `reference`: whether plain PyTorch computes the module; `set_backend` sets it, files do not hold
    it. `shared`: the group that it is computed together with, and its place there, or None.
    """

    reference = False
    shared: tuple[Group, int] | None = None
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_zero_point: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        positions: int | None = None,
        has_input_scale: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes an empty module, to be filled by loading or by `from_packed`.

        `dtype` is that of `bias`, `positions` are those that "token" was calibrated for, and
        `has_input_scale` tells whether "none" divides the input by a stored scale.

        Raises:
            ValueError: "token" without `positions`.
        """
        nn.Module.__init__(self)  # nn.Linear's allocates a float weight
        if scheme.granularity == "token" and positions is None:
            raise ValueError(
                "granularity 'token' needs the number of positions it was calibrated for."
            )
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        groups = (out_features, scheme.groups(in_features))
        scaled = in_features if has_input_scale else None
        statics = {"channel": in_features, "token": positions, "none": scaled}.get(
            scheme.granularity
        )
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]] | None] = {
            "weight": (torch.int32, (out_features, scheme.words(in_features))),
            "weight_scale": (torch.bfloat16, groups),
            "weight_zero_point": None if scheme.symmetric else (torch.uint8, groups),
            "input_scale": (torch.float32, (statics,)) if statics else None,
            "input_zero_point": (
                (torch.int32, (statics,)) if statics and scheme.granularity != "none" else None
            ),
            "bias": (dtype, (out_features,)) if bias else None,
        }
        for name, layout in shapes.items():
            empty = layout and torch.empty(layout[1], dtype=layout[0], device=device)
            parameter = None if empty is None else nn.Parameter(empty, requires_grad=False)
            self.register_parameter(name, parameter)
        self._mark_initialized()

    @classmethod
    def from_packed(
        cls, linear: nn.Linear, scheme: QuantScheme, tensors: dict[str, Tensor]
    ) -> "QVLMLinear":
        """Makes the quantized form of `linear`, with its bias and the `packed_tensors`."""
        input_scale = tensors.get("input_scale")
        module = cls(
            linear.in_features,
            linear.out_features,
            scheme,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            positions=None if input_scale is None else input_scale.shape[0],
            has_input_scale=input_scale is not None,
            device="meta",
        )
        for name, tensor in tensors.items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        if linear.bias is not None:
            module.register_parameter(
                "bias", nn.Parameter(linear.bias.detach(), requires_grad=False)
            )
        module._mark_initialized()
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of `x`, as `ops.linear.linear`."""
        if self.shared is not None:
            y = self.shared[0].output(self.shared[1], self, x)
            if y is not None:
                return y
        return linear(x, self.tensors, self.in_features, self.scheme, reference=self.reference)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The packed integers, int32 [out, words]; arithmetic is refused (packed_weight.py).

        PEFT's code reads the form of the float weight instead, float32 [out, in].
        """
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")
        # exact type: compilers and exporters put in tensors of their own
        # a float one waits to be rounded while it is loaded
        if (
            type(weight) is not nn.Parameter
            or weight.dtype != torch.int32
            or torch.compiler.is_compiling()
        ):
            return weight
        if read_by_adapters(1):
            return FloatForm.of(weight, self.out_features, self.in_features)
        return alias_of(weight)

    def register_parameter(self, name: str, param: Any) -> None:
        """As nn.Module's; the weight becomes ordinary, and says why it cannot be trained."""
        ordinary = plain(param)
        check_replacement(name, self._parameters.get("weight"), param)
        super().register_parameter(name, ordinary)
        self._freeze()

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            refuse_removal()
        super().__delattr__(name)

    def _freeze(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            freeze(weight)

    @property
    def tensors(self) -> dict[str, Any]:
        """The parameters by name: attributes of a module cost ten times a dict's."""
        return self._parameters

    @property
    def kernel(self) -> str:
        """A kernel's name, or "reference" with the reason unless it was asked for."""
        if self.reference:
            return "reference"
        return kernel_name(self.tensors["weight"].device, self.in_features, self.scheme)

    def dequantize(self) -> Tensor:
        """Returns the float weight that this module multiplies by, float32 [out, in]."""
        return dequantize(*packed_call(self.tensors, self.in_features, self.scheme))

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Returns an ordinary nn.Linear with the dequantized weight, in `dtype`."""
        plain = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        plain.weight = nn.Parameter(self.dequantize().to(dtype), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and scheme, for print(model)."""
        s = self.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"W{s.weight_bits}A{s.activation_bits}, group_size={s.group_size}, "
            f"granularity={s.granularity}"
        )

    def _mark_initialized(self) -> None:
        # Transformers initialises all without this mark; normal_() on integers raises.
        for parameter in self.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self._is_hf_initialized = True

    def train(self, mode: bool = True) -> "QVLMLinear":
        """As nn.Module's; besides, `weight_scale` gets its dtype back."""
        self._narrow_scale()
        super().train(mode)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._narrow_scale()
        super()._save_to_state_dict(*args, **kwargs)

    def _narrow_scale(self) -> None:
        # prepare_model_for_kbit_training of PEFT makes it float32, which no kernel or file takes
        if self.weight_scale.dtype != torch.bfloat16:
            self.weight_scale.data = self.weight_scale.data.to(torch.bfloat16)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._freeze()
        if self.shared is not None:
            self.shared[0].rejoin(self.shared[1], self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.shared is not None:  # the activation grids that come may differ
            self.shared[0].dissolve()
        error_msgs = args[-1]
        wrong = [
            f"{prefix}{name} holds {given.dtype}, not {own.dtype}: load what a quantized model's "
            f"state_dict() gave, unchanged, or call model.dequantize() first."
            for name, own in self.tensors.items()
            if own is not None
            and not own.is_floating_point()
            # a tensor of other integers or of floats would be cut to fit
            and isinstance(given := state_dict.get(f"{prefix}{name}"), Tensor)
            and given.dtype != own.dtype
        ]
        error_msgs += wrong
        if not wrong:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> "QVLMLinear":
        before = {name: self.tensors[name] for name in _FIXED_DTYPE}
        data = {name: tensor.data for name, tensor in before.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, old in data.items():
            parameter = self.tensors[name]
            if parameter.dtype != old.dtype:
                parameter.data = old.to(parameter.device)
        return self
