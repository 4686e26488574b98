"""Rotations that spread outliers over all channels, folded into the weights.

The model computes the same and its inputs quantize better. Three function-preserving changes
(QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406) are made before anything is calibrated:

1. the affine part of every norm moves into the linear modules that read it, so that a norm only
   normalises;
2. the language model's residual stream is multiplied by an orthogonal R: what writes it
   (embeddings, line ends of tiled pictures, projectors, o_proj, down_proj) gets R on its outputs,
   what reads it (q/k/v, gate/up, head) gets R on its inputs, and a root-mean-square norm does not
   notice;
3. attention values are multiplied head by head by a Hadamard matrix, v_proj's outputs and o_proj's
   inputs.

Inputs that no fold reaches go through an online Hadamard transform instead (`input_transform` of
the format): behind a nonlinearity (down_proj), behind a gate (attention that has one), and in
vision encoder and projector. The encoder's layer norms subtract a mean, and its first residual
comes out of an affine norm, so its stream cannot be rotated in place. Transforming the inputs of
its sites gives them the same values.

Legend: O out_features, I in_features, H hidden size of the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.format.hadamard import block_hadamard, largest_block
from qvlm_hf.models.folds import RotationPlan, ValuePath, norm_offset
from qvlm_hf.models.graph import why_empty

__all__ = ["residual_rotation", "rotate", "take_snapshot", "undone_on_error"]


def rotate(model: nn.Module, plan: RotationPlan, *, seed: int) -> None:
    """Folds all three into the weights, in float64 and rounded once.

    Changed parameters get new tensors.

    Raises:
        ValueError: a module of the plan is on the meta device.
    """
    if plan.head.weight is plan.embeddings.weight:
        _untie(model, plan.head)
    for norm, readers in plan.norms:
        _fold_norm(norm, readers)
    turn = residual_rotation(plan.embeddings.weight.shape[1], seed)
    for module in (plan.embeddings, *plan.readers):
        _change(module, "weight", turn)
    for parameter in plan.written:
        parameter.data = _changed(parameter, turn)
    for writer in plan.writers:
        _change_outputs(writer, turn)
    for path in plan.values:
        _rotate_values(path)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the context ends with an error, the model has its old parameters and tying again."""
    restore = take_snapshot(model)
    try:
        yield
    except BaseException:
        restore()
        raise


def take_snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model the parameters and tying that it has now; copies nothing."""
    owners = [(module, dict(module._parameters)) for module in model.modules()]
    tensors = [
        (parameter, parameter.data)
        for _, own in owners
        for parameter in own.values()
        if parameter is not None
    ]
    configs = [(config, config.tie_word_embeddings) for config in _tying_configs(model)]
    tied = dict(getattr(model, "all_tied_weights_keys", {}))

    def restore() -> None:
        for module, own in owners:
            module._parameters.update(own)
        for parameter, data in tensors:
            parameter.data = data
        for config, value in configs:
            config.tie_word_embeddings = value
        if tied:
            model.all_tied_weights_keys = tied  # type: ignore[assignment]

    return restore


def residual_rotation(size: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A seeded orthogonal map: random signs, Hadamard in blocks, an orthogonal mix of the blocks.

    Args:
        size: H; the Hadamard blocks are the largest power of two that divides it.
        seed: of signs and mix.

    Returns:
        A function [..., H] -> [..., H] in the input's dtype (give it float64).
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    block = largest_block(size)
    count = size // block
    mix = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64)).Q

    def turn(x: Tensor) -> Tensor:
        blocks = block_hadamard(x * signs.to(x), block).unflatten(-1, (count, block))
        return (mix.T.to(x) @ blocks).flatten(-2)

    return turn


def _fold_norm(norm: nn.Module, readers: Sequence[nn.Linear]) -> None:
    """W (g n + b) + c = (W g) n + (W b + c): g and b of the norm become 1 and 0."""
    offset = norm_offset(norm)
    gain = norm.weight.detach().double() + offset  # type: ignore[operator]
    shift: Tensor | None = getattr(norm, "bias", None)
    for reader in readers:
        weight = reader.weight.detach().double()
        outputs = weight.shape[1] // gain.numel()  # of the norm, side by side
        if shift is not None:
            moved = weight @ shift.detach().double().repeat(outputs)
            if reader.bias is None:
                if moved.any():
                    raise ValueError(
                        "a norm's bias cannot be folded into a linear module without one: use "
                        "rotation=None for this model."
                    )
            else:
                _change(reader, "bias", moved.add)
        _change(reader, "weight", partial(torch.mul, gain.repeat(outputs)))
    _change(norm, "weight", lambda weight: torch.full_like(weight, 1 - offset))
    if shift is not None:
        _change(norm, "bias", torch.zeros_like)


def _rotate_values(path: ValuePath) -> None:
    block = largest_block(path.head_dim)
    if block == 1:
        return
    others = path.value.out_features - path.channels  # fused with the values

    def mix(x: Tensor) -> Tensor:
        return torch.cat([x[..., :others], block_hadamard(x[..., others:], block)], dim=-1)

    _change_outputs(path.value, mix)
    _change(path.output, "weight", lambda x: block_hadamard(x, block))


def _change_outputs(linear: nn.Linear, turn: Callable[[Tensor], Tensor]) -> None:
    """The outputs of `linear` [..., O] become turn(outputs)."""
    _change(linear, "weight", lambda weight: turn(weight.T).T)
    if linear.bias is not None:
        _change(linear, "bias", turn)


def _change(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Gives a parameter a new tensor: `change` of its value in float64, in its own dtype."""
    parameter = module.get_parameter(name)
    if parameter.is_meta:
        raise ValueError(f"a weight to be rotated {why_empty(module)}, then rotate it.")
    parameter.data = _changed(parameter, change)


def _changed(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> Tensor:
    return keep(change(parameter.detach().double()).to(parameter.dtype).contiguous())


def _untie(model: nn.Module, head: nn.Linear) -> None:
    """Gives the head a weight of its own: norm and rotation change it unlike the embeddings."""
    head.weight = nn.Parameter(
        head.weight.detach().clone(), requires_grad=head.weight.requires_grad
    )
    for config in _tying_configs(model):
        config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _tying_configs(model: nn.Module) -> list:
    config = getattr(model, "config", None)
    parts = [] if config is None else [config, getattr(config, "text_config", None)]
    return [part for part in parts if hasattr(part, "tie_word_embeddings")]
