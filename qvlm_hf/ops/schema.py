"""One definition, one fake (shape-only) implementation and one gradient per operator.

`qvlm_hf::linear` is a whole quantized linear module: transform and quantize the input, multiply
integers, scale, add the bias (docs/format.md, "Values"). `qvlm_hf::linears` is several of them that
read the same input, without a gradient: decoding spends much of a short call on that input.
Implementations register for a dispatch key; PyTorch picks one, modules never ask for a device.

Legend: M tokens (all leading dimensions), K in_features, N out_features, G weight groups, W packed
words of a row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import cpu_direct

__all__ = [
    "LIBRARY",
    "Module",
    "check_sizes",
    "linear",
    "linears",
    "transformed",
    "watched",
    "well_formed",
]

Module = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None
]  # weight, weight_scale, weight_zero_point, bias of `linear`

# torch.library.define + impl costs about 3 us a call, custom_op about 14: 200 linears per token
# feel it.
LIBRARY = torch.library.Library("qvlm_hf", "DEF")
_STATICS = (torch.float32, torch.int32)
_LINEAR = (
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? "
    "input_scale, Tensor? input_zero_point,"
    " Tensor? bias, int in_features, int weight_bits, int activation_bits, int group_length, str "
    "granularity, int hadamard) -> Tensor"
)
LIBRARY.define("linear" + _LINEAR)
LIBRARY.define(
    "linear_reference" + _LINEAR
)  # the same, by the reference whatever kernels there are
_LINEARS = (
    "(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor[] weight_zero_point, Tensor? "
    "input_scale, Tensor? input_zero_point,"
    " Tensor[] bias, int in_features, int weight_bits, int activation_bits, int group_length, str "
    "granularity, int hadamard) -> Tensor[]"
)
LIBRARY.define("linears" + _LINEARS)
LIBRARY.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor")  # fused.py
LIBRARY.define(
    "linear_input_grad(Tensor grad, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
    "Tensor? input_scale,"
    " int in_features, int weight_bits, int group_length, str granularity, int hadamard) -> Tensor"
)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    scheme: QuantScheme,
    *,
    reference: bool = False,
) -> Tensor:
    """y = bias + r * sum_g weight_scale[:, g] * sum_{k in g} a_k (w_k - weight_zero_point[:, g]), a_k and r by granularity.

    Args:
        x: [..., K], floating point.
        weight: int32 [N, W], packed unsigned integers (format/packing.py).
        weight_scale: bfloat16 [N, G].
        weight_zero_point: uint8 [N, G]; None is 2^(weight_bits - 1).
        input_scale: float32 [K] for "channel" (and, optionally, "none"), [positions] for "token",
            else None.
        input_zero_point: int32, like `input_scale`; None for "none" and "dynamic_token".
        bias: [N] or None.
        in_features: K.
        scheme: bits, group size, granularity and input transform.
        reference: whether the reference computes it and no kernel.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        ValueError: K differs, or a "token" input has another number of positions than calibrated.
    """
    sizes = _sizes(in_features, scheme)
    if not reference:
        statics = (input_scale, input_zero_point)
        if quick := _quick(
            x, [weight], [weight_scale], _listed(weight_zero_point), *statics, _listed(bias), *sizes
        ):
            return quick[0]
    # .default: without it PyTorch looks for the overload at every call
    operator = (
        torch.ops.qvlm_hf.linear_reference.default
        if reference
        else torch.ops.qvlm_hf.linear.default
    )
    return _called(
        operator,
        x,
        weight,
        weight_scale,
        weight_zero_point,
        input_scale,
        input_zero_point,
        bias,
        *sizes,
    )


def linears(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Sequence[Tensor],
    in_features: int,
    scheme: QuantScheme,
) -> list[Tensor]:
    """The outputs of several modules of one input and one scheme (q, k, v; gate, up): what `linear` gives for each, bit for bit.

    The input is transformed and quantized once. For inference: there is no gradient.

    Args:
        x: [..., K], floating point.
        weight: of each module, as in `linear`.
        weight_scale: of each module.
        weight_zero_point: of each module, or empty for 2^(weight_bits - 1).
        input_scale: shared, as in `linear`.
        input_zero_point: shared, as in `linear`.
        bias: of each module, or empty for none.
        in_features: K.
        scheme: shared.

    Returns:
        [..., N] of each module, N its own, in the dtype of `x`.

    Raises:
        ValueError: as `linear`, or the lists have different lengths, or a gradient is wanted.
    """
    arguments = (
        x,
        weight,
        weight_scale,
        weight_zero_point,
        input_scale,
        input_zero_point,
        bias,
        *_sizes(in_features, scheme),
    )
    return _quick(*arguments) or _called(torch.ops.qvlm_hf.linears.default, *arguments)


def _sizes(in_features: int, scheme: QuantScheme) -> tuple[int, int, int, int, str, int]:
    group_length = scheme.group_length(in_features)
    return (
        in_features,
        scheme.weight_bits,
        scheme.activation_bits,
        group_length,
        scheme.granularity,
        scheme.hadamard or 0,
    )


def _listed(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def transformed() -> bool:
    """Whether torch.jit.trace or a transformation of torch.func (vmap, grad) is at work, which follow single operators."""
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def watched() -> bool:
    """The same, or torch.compile, or a dispatch mode."""
    return (
        torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or transformed()
    )


def _quick(x: Tensor, *arguments: object) -> list[Tensor] | None:
    """The outputs straight from the CPU kernels, where they take the call."""
    # `is not True`: torch.fx traces with stand-ins that are neither; the last argument is a
    # transform, which the kernels do not know
    if x.is_cpu is not True or torch.compiler.is_compiling() or arguments[-1]:
        return None
    return cpu_direct.linears(x, *arguments)


def _called(operator: Any, x: Tensor, *arguments: object) -> Any:
    """The operator's result; where no gradient is recorded without the Python that could record one (11 of 33 us of a call on a CPU)."""
    _refuse_tangent(x)
    if torch.is_grad_enabled() or watched():
        return operator(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(x, *arguments)


def _refuse_tangent(x: Tensor) -> None:
    # PyTorch would take the derivative for zero
    if (
        forward_ad._current_level >= 0
        and not torch.compiler.is_compiling()
        and forward_ad.unpack_dual(x).tangent is not None
    ):
        raise ValueError(
            "quantized linear modules have no forward-mode derivative: use backward() or "
            "torch.autograd.grad."
        )


@torch.library.register_fake("qvlm_hf::linear_reference", lib=LIBRARY)
@torch.library.register_fake("qvlm_hf::linear", lib=LIBRARY)
def _linear_fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    if x.device != weight.device:  # no tracing, but a real call with a weight that was never loaded
        raise ValueError(
            f"the input is on {x.device} and the weight of a quantized module on {weight.device}: "
            f"load it, or move one."
        )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("qvlm_hf::linears", lib=LIBRARY)
def _linears_fake(x: Tensor, weight: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [_linear_fake(x, one) for one in weight]


@torch.library.register_fake("qvlm_hf::linear_input_grad", lib=LIBRARY)
def _linear_input_grad_fake(*args: Any) -> Tensor:
    grad, in_features = args[0], args[5]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001 - torch's own signature
    _, weight, weight_scale, weight_zero_point, input_scale, _, bias = inputs[:7]
    in_features, weight_bits, _, group_length, granularity, hadamard = inputs[7:]
    ctx.save_for_backward(weight, weight_scale, weight_zero_point, input_scale)
    ctx.sizes = (in_features, weight_bits, group_length, granularity, hadamard)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: the input's rounding counts as the identity, so dx = dy W with W dequantized."""
    saved = ctx.saved_tensors
    grad_x = (
        torch.ops.qvlm_hf.linear_input_grad(grad, *saved, *ctx.sizes)
        if ctx.needs_input_grad[0]
        else None
    )
    grad_bias = (
        grad.reshape(-1, grad.shape[-1]).sum(0)
        if ctx.has_bias and ctx.needs_input_grad[6]
        else None
    )
    return grad_x, None, None, None, None, None, grad_bias, None, None, None, None, None, None


for _name in ("linear", "linear_reference"):
    torch.library.register_autograd(
        f"qvlm_hf::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY
    )


def _no_gradient(*_: object, **__: object) -> None:
    raise ValueError(
        "qvlm_hf::linears has no gradient: call qvlm_hf::linear for each module where one is "
        "wanted, or use torch.no_grad()."
    )


# Only reached where a gradient is wanted: the call itself raises, so that no result is silently
# detached.
torch.library.register_autograd(
    "qvlm_hf::linears", _no_gradient, setup_context=_no_gradient, lib=LIBRARY
)


@functools.cache
def check_sizes(
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> None:
    """Refuses numbers that no `QuantScheme` has: who calls an operator directly may pass any, and kernels read memory by them.

    Raises:
        ValueError: one is impossible, or two do not go together.
    """
    QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity,
        hadamard=hadamard or None,
    )
    if in_features < 1:
        raise ValueError(f"in_features={in_features} must be at least 1.")
    if not 1 <= group_length <= in_features:
        raise ValueError(
            f"group_length={group_length} must be from 1 to in_features={in_features}, which is "
            f"one group per row."
        )


def well_formed(
    x: Tensor,
    modules: Sequence[Module],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    in_features: int,
    weight_bits: int,
    group_length: int,
    granularity: str,
) -> bool:
    """Whether all tensors of a call have the dtypes and shapes of docs/format.md: kernels read memory by these, the reference need not."""
    if not (x.is_floating_point() and x.dim() and x.shape[-1] == in_features):
        return False
    words, groups = -(-in_features * weight_bits // 32), -(-in_features // group_length)
    for weight, scale, zero_point, bias in modules:
        rows = weight.shape[0]
        if (
            weight.dtype != torch.int32
            or weight.shape != (rows, words)
            or scale.dtype != torch.bfloat16
            or scale.shape != (rows, groups)
        ):
            return False
        if zero_point is not None and (
            zero_point.dtype != torch.uint8 or zero_point.shape != scale.shape
        ):
            return False
        if bias is not None and bias.shape != (rows,):
            return False
    if granularity == "none":
        return input_scale is None or input_scale.shape == (in_features,)
    if granularity == "dynamic_token":
        return True
    if input_scale is None or input_zero_point is None or (granularity == "token" and x.dim() < 2):
        return False
    length = in_features if granularity == "channel" else x.shape[-2]
    return (
        input_scale.shape == input_zero_point.shape == (length,)
        and (input_scale.dtype, input_zero_point.dtype) == _STATICS
    )
