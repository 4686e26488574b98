"""`qvlm_hf::linear` and `linears`: a table of kernels, one definition, fake and gradient.

`linear` is a whole quantized module: transform and quantize the input, multiply integers, scale,
add the bias (docs/format.md, "Values"). `linears` is several of them that read the same input,
without a gradient: decoding spends much of a short call on that input.

PyTorch picks the kernel by the device of its tensors, modules never ask for one. To add a kernel,
write a file like cpu.py and add a row to `KERNELS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import cpu, fast_path, gpu, reference
from qvlm_hf.ops.call import (
    SCHEMA_OF_MANY,
    SCHEMA_OF_ONE,
    CallScheme,
    Loaded,
    Packed,
    has_format,
    numbers_of,
    parse_many,
    parse_one,
)
from qvlm_hf.ops.library import define, define_gradient, is_traced

__all__ = ["KERNELS", "Kernel", "kernel_name", "linear", "linears"]


@dataclass(frozen=True)
class Kernel:
    """A row of `KERNELS`.

    Attributes:
        misfit: why it does not take modules of such a scheme, or None.
        load: compiles and checks it for a device, at the first call.
        prepare: done before anything is computed on such a device.
    """

    misfit: Callable[[CallScheme], str | None]
    load: Callable[[torch.device], Loaded]
    prepare: Callable[[], object] = lambda: None


# By the type of a device, whose name in capitals is PyTorch's dispatch key.
KERNELS = {
    "cpu": Kernel(cpu.misfit, cpu.load, fast_path.load),
    "cuda": Kernel(gpu.misfit, gpu.load),
}


def kernel_name(device: torch.device, in_features: int, scheme: QuantScheme) -> str:
    """What computes a module: "cpu avx512-vnni" or the like, or "reference" with the reason."""
    kernel = KERNELS.get(device.type)
    if kernel is None:
        return f"reference (no kernels for {device.type})"
    misfit = kernel.misfit(CallScheme(None, None, *numbers_of(in_features, scheme)))
    return f"reference ({misfit})" if misfit else kernel.load(device)[0]


def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor | None],
    in_features: int,
    scheme: QuantScheme,
    *,
    reference: bool = False,
) -> Tensor:
    """y = bias + r * sum_g weight_scale[:, g] * sum_{k in g} a_k (w_k - weight_zero_point[:, g]).

    The integers a_k and the factor r depend on the granularity.

    Args:
        x: [..., K], floating point.
        tensors: of the module, by their names on disk: the fields of `Packed` and the grid of
            `CallScheme`. What the scheme does not have is None or missing.
        in_features: K.
        scheme: bits, group size, granularity and input transform.
        reference: whether the reference computes it and no kernel.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        ValueError: K differs, or a "token" input has another number of positions than calibrated.
    """
    get = tensors.get
    weight, scale = tensors["weight"], tensors["weight_scale"]
    zero_point, bias = get("weight_zero_point"), get("bias")
    grid, numbers = (get("input_scale"), get("input_zero_point")), numbers_of(in_features, scheme)
    if not reference:
        zero_points = [] if zero_point is None else [zero_point]
        biases = [] if bias is None else [bias]
        if quick := _quick(x, [weight], [scale], zero_points, *grid, biases, *numbers):
            return quick[0]
    # .default: without it PyTorch looks for the overload at every call
    operator = _OPS.linear_reference.default if reference else _OPS.linear.default
    return _dispatch(operator, x, weight, scale, zero_point, *grid, bias, *numbers)


def linears(
    x: Tensor, weights: Sequence[Mapping[str, Tensor | None]], in_features: int, scheme: QuantScheme
) -> list[Tensor]:
    """What `linear` gives for each of several modules (q, k, v; gate, up), bit for bit.

    The input is transformed and quantized once. For inference: there is no gradient.

    Args:
        x: [..., K], floating point.
        weights: tensors of each module, as in `linear`; all have the same grid.
        in_features: K.
        scheme: shared.

    Returns:
        [..., N] of each module, N its own, in the dtype of `x`.

    Raises:
        ValueError: as `linear`, or modules have different tensors, or a gradient is wanted.
    """
    columns = zip(*([one.get(name) for name in Packed._fields] for one in weights), strict=True)
    weight, scale, zero_point, bias = ([t for t in own if t is not None] for own in columns)
    grid = weights[0].get("input_scale"), weights[0].get("input_zero_point")
    arguments = (weight, scale, zero_point, *grid, bias, *numbers_of(in_features, scheme))
    return _quick(x, *arguments) or _dispatch(_OPS.linears.default, x, *arguments)


def _quick(x: Tensor, *arguments: Any) -> list[Tensor] | None:
    """The outputs straight from the CPU kernels, where they take the call."""
    # `is not True`: torch.fx traces with stand-ins that are neither
    if x.is_cpu is not True or torch.compiler.is_compiling():
        return None
    return fast_path.linears(x, *arguments)


def _dispatch(operator: Any, x: Tensor, *arguments: Any) -> Any:
    """Calls an operator; with autograd off, without its Python wrapper (11 of 33 us on a CPU)."""
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
    if torch.is_grad_enabled() or is_traced():
        return operator(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(x, *arguments)


def _compute(
    kernel: Kernel | None, x: Tensor, weights: list[Packed], scheme: CallScheme
) -> list[Tensor]:
    """By the kernel if it takes the call; the reference says what is wrong with others."""
    compute = None
    if kernel is not None:
        kernel.prepare()
        if has_format(x, weights, scheme) and kernel.misfit(scheme) is None:
            compute = kernel.load(x.device)[1]
    return (compute or reference.linears)(x, weights, scheme)


def _compute_many(kernel: Kernel | None, *arguments: Any) -> list[Tensor]:
    return _compute(kernel, arguments[0], *parse_many(arguments))


def _compute_one(kernel: Kernel | None, *arguments: Any) -> Tensor:
    return _compute(kernel, arguments[0], *parse_one(arguments))[0]


def _fake_one(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    if x.device != weight.device:  # no tracing, but a real call with a weight that was never loaded
        raise ValueError(
            f"the input is on {x.device} and the weight of a quantized module on {weight.device}: "
            f"load it, or move one."
        )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_many(x: Tensor, weight: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [_fake_one(x, one) for one in weight]


def _input_gradient(*arguments: Any) -> Tensor:
    (packed,), scheme = parse_one(arguments)
    return reference.input_gradient(arguments[0], packed, scheme)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001 - torch's own signature
    _, *tensors, bias = inputs[:7]
    ctx.save_for_backward(*tensors)
    ctx.numbers = inputs[7:]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through: the input's rounding counts as the identity, so dx = dy W (dequantized)."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _OPS.linear_input_grad(grad, *ctx.saved_tensors, None, *ctx.numbers)
    if ctx.has_bias and ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, *[None] * 5, grad_bias, *[None] * len(ctx.numbers)


_OPS = torch.ops.qvlm_hf
_ANY_DEVICE = "CompositeExplicitAutograd"


def _on_every_device(compute: Callable[..., Any]) -> Mapping[str, Callable[..., Any]]:
    kernels = {name.upper(): partial(compute, kernel) for name, kernel in KERNELS.items()}
    return {_ANY_DEVICE: partial(compute, None)} | kernels


define("linear", SCHEMA_OF_ONE, fake=_fake_one, kernels=_on_every_device(_compute_one))
define(  # the same, by the reference whatever kernels there are
    "linear_reference",
    SCHEMA_OF_ONE,
    fake=_fake_one,
    kernels={_ANY_DEVICE: partial(_compute_one, None)},
)
for _name in ("linear", "linear_reference"):
    define_gradient(_name, _backward, _save_for_backward)
define(
    "linears",
    SCHEMA_OF_MANY,
    fake=_fake_many,
    kernels=_on_every_device(_compute_many),
    instead="call qvlm_hf::linear for each module where one is wanted, or use torch.no_grad()",
)
define(  # `x` is the gradient of the output
    "linear_input_grad",
    SCHEMA_OF_ONE,
    fake=lambda *arguments: arguments[0].new_empty((*arguments[0].shape[:-1], arguments[7])),
    kernels={_ANY_DEVICE: _input_gradient},
)
