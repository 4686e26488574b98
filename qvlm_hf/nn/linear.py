"""`QVLMLinear`: packed parameters under the names of docs/format.md, and a forward pass that is one operator.

It is an nn.Linear so that LoRA, offloading and tensor-parallel code treat it as one, and it keeps
its integers in `weight` with a shape that no float weight can have, so that a program without this
package fails to load it instead of running garbage.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qvlm_hf.format.activation_grid import QParams
from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.format.weight_grid import QuantizedWeight
from qvlm_hf.nn.packed_weight import freeze, guarded, plain, read_by_adapters, stand_in
from qvlm_hf.ops.call import packed_call
from qvlm_hf.ops.linear import kernel_name, linear
from qvlm_hf.ops.reference import dequantize

__all__ = ["Group", "QVLMLinear", "packed_tensors"]

_FIXED_DTYPE = (
    "weight_scale",
    "input_scale",
)  # float parameters that `.to(dtype)` must leave alone: they are part of the format


def packed_tensors(
    quantized: QuantizedWeight, scheme: QuantScheme, input_qparams: QParams | None
) -> dict[str, Tensor]:
    """The tensors of one module as they lie on disk, without `bias` (docs/format.md, "Files in a saved directory").

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
        # copies: the modules of a site share their QParams, and safetensors refuses to save shared
        # memory
        tensors["input_scale"] = input_qparams.scale.to(torch.float32, copy=True)
        tensors["input_zero_point"] = input_qparams.zero_point.to(torch.int32, copy=True)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


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

    `reference` (False): whether the reference computes the module and no kernel; `set_backend` sets
    it, files do not hold it. `shared` (None): the modules that it is computed together with, and
    its place among them.
    """

    reference = False
    shared: tuple[Group, int] | None = None

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

        Args:
            in_features: inputs.
            out_features: outputs.
            scheme: bits, groups, granularity.
            bias: whether there is one.
            dtype: of `bias`.
            positions: calibrated positions; required by "token", else unused.
            has_input_scale: for granularity "none" only: whether the input is divided by a stored
                scale. Default: no.
            device: of the parameters.

        Raises:
            ValueError: "token" without `positions`.
        """
        nn.Module.__init__(self)  # nn.Linear's would allocate a float weight
        if scheme.granularity == "token" and positions is None:
            raise ValueError(
                "granularity 'token' needs the number of positions it was calibrated for."
            )
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        groups = scheme.groups(in_features)
        lengths = {
            "channel": in_features,
            "token": positions,
            "none": in_features if has_input_scale else None,
        }
        statics = lengths.get(scheme.granularity)

        def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(*shape, dtype=dtype, device=device), requires_grad=False
            )

        self.register_parameter(
            "weight", empty(out_features, scheme.words(in_features), dtype=torch.int32)
        )
        self.weight_scale = empty(out_features, groups, dtype=torch.bfloat16)
        self.weight_zero_point = (
            None if scheme.symmetric else empty(out_features, groups, dtype=torch.uint8)
        )
        self.input_scale = None if statics is None else empty(statics, dtype=torch.float32)
        self.input_zero_point = (
            None
            if statics is None or scheme.granularity == "none"
            else empty(statics, dtype=torch.int32)
        )
        self.register_parameter("bias", empty(out_features, dtype=dtype) if bias else None)
        self._mark_initialized()

    @classmethod
    def from_packed(
        cls, linear: nn.Linear, scheme: QuantScheme, tensors: dict[str, Tensor]
    ) -> "QVLMLinear":
        """The quantized form of `linear`: its bias is kept, everything else comes from `tensors` (see `packed_tensors`)."""
        input_scale = tensors.get("input_scale")
        module = cls(
            linear.in_features, linear.out_features, scheme, bias=linear.bias is not None, dtype=linear.weight.dtype, device="meta",
            positions=None if input_scale is None else input_scale.shape[0], has_input_scale=input_scale is not None,
        )  # fmt: skip
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
        """[..., in_features] -> [..., out_features] in the dtype of `x`; errors as in `ops.linear.linear`."""
        if (
            self.shared is not None
            and (y := self.shared[0].output(self.shared[1], self, x)) is not None
        ):
            return y
        return linear(x, self.tensors, self.in_features, self.scheme, reference=self.reference)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The packed integers, int32 [out, words], in a form that refuses float arithmetic (packed_weight.py).

        PEFT's code reads the form of the float weight instead, float32 [out, in], which refuses as
        well.
        """
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")
        # exact type: compilers and exporters put in tensors of their own; a float one waits to be rounded while it is loaded
        if (
            type(weight) is not nn.Parameter
            or weight.dtype != torch.int32
            or torch.compiler.is_compiling()
        ):
            return weight
        if read_by_adapters(1):
            return stand_in(weight, self.out_features, self.in_features)
        return guarded(weight)

    def register_parameter(self, name: str, param: Any) -> None:
        """As nn.Module's; the weight becomes an ordinary parameter that says why it cannot be trained."""
        super().register_parameter(name, plain(param))
        self._freeze()

    def _freeze(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            freeze(weight)

    @property
    def tensors(self) -> dict[str, Any]:
        """The parameters by name; those that the scheme does not have are not there.

        Attributes of a module cost ten times a dict's.
        """
        return self._parameters

    @property
    def kernel(self) -> str:
        """What computes this module where its weight is now: a kernel's name, or "reference", with the reason unless it was asked for."""
        if self.reference:
            return "reference"
        return kernel_name(self.tensors["weight"].device, self.in_features, self.scheme)

    def dequantize(self) -> Tensor:
        """The float weight that this module multiplies by, float32 [out_features, in_features] (without the input's rounding)."""
        return dequantize(*packed_call(self.tensors, self.in_features, self.scheme))

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary nn.Linear with the dequantized weight, in `dtype`."""
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
        # Transformers initialises what does not carry this mark; normal_() on integers raises.
        for parameter in self.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self._is_hf_initialized = True

    def train(self, mode: bool = True) -> "QVLMLinear":
        """As nn.Module.train; besides, `weight_scale` gets its dtype back."""
        self._narrow_scale()
        super().train(mode)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._narrow_scale()
        super()._save_to_state_dict(*args, **kwargs)

    def _narrow_scale(self) -> None:
        # PEFT's prepare_model_for_kbit_training makes float32 of every bfloat16 parameter: no
        # kernel takes that, and no file may hold it
        if self.weight_scale.dtype != torch.bfloat16:
            self.weight_scale.data = self.weight_scale.data.to(torch.bfloat16)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._freeze()
        if self.shared is not None:
            self.shared[0].rejoin(self.shared[1], self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if (
            self.shared is not None
        ):  # other activation grids may come than those that were found equal
            self.shared[0].dissolve()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "QVLMLinear":
        kept = {
            name: parameter.data
            for name in _FIXED_DTYPE
            if (parameter := getattr(self, name)) is not None
        }
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self
