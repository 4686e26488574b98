"""Weight bits of the sites that keep to a budget: an average, or the size of the saved weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from qvlm_hf.calibration.options import size_in_bytes
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.scheme import QuantScheme, is_static
from qvlm_hf.models.find_parts import find_parts
from qvlm_hf.models.graph import Segment

__all__ = ["WIDTHS", "allocate_bits", "fit_bits", "room_in", "saved_bytes"]

WIDTHS = (2, 3, 4, 5, 6, 8)  # weight bits that a budget chooses from
_ENTRY, _FRAME = 80, 64  # bytes of a file's header: a tensor's besides its name, and no tensor's


def saved_bytes(
    model: nn.Module, segments: Sequence[Segment], settings: CalibrationSettings
) -> tuple[dict[str, dict[int, int]], int]:
    """What the saved weights of a model take; it may be on the meta device, or not rotated yet.

    Sites that the search may give a static range are counted with one per channel. So are ranges
    per position: of these there are fewer.

    Returns:
        Site -> weight bits -> bytes; and the bytes of all the rest, with the files' headers.
    """
    tied = getattr(model, "all_tied_weights_keys", {})  # not the same yet where nothing is loaded
    state = model.state_dict(keep_vars=True)
    saved = {name: tensor for name, tensor in state.items() if name not in tied}
    names = {id(tensor): name for name, tensor in saved.items()}
    rest = _FRAME + sum(_float_bytes(name, saved[name]) for name in names.values())
    costs: dict[str, dict[int, int]] = {}
    for segment in segments:
        granularities = settings.granularities(segment.component)
        static = any(map(is_static, granularities))
        for site in segment.sites:
            named = [(names[id(linear.weight)], linear) for linear in site.linears]
            rest -= sum(_float_bytes(name, linear.weight) for name, linear in named)
            for bits in WIDTHS:
                precision = replace(settings.precision, weight_bits=bits)
                granularity = "channel" if static else granularities[0]
                scheme = settings.module_scheme(granularity, site.hadamard, precision)
                costs.setdefault(site.name, {})[bits] = sum(
                    _packed_bytes(name, linear, scheme) for name, linear in named
                )
    return costs, rest + _head_bytes(model, settings, names)


def _head_bytes(model: nn.Module, settings: CalibrationSettings, names: Mapping[int, str]) -> int:
    """What an output head takes besides its tensor in the model: quantized, or after a rotation."""
    parts = find_parts(model)
    head, scheme = parts.head, settings.head_scheme()
    if not isinstance(head, nn.Linear):
        return 0
    name = names.get(id(head.weight), "lm_head.weight")
    tied = id(head.weight) not in names or head.weight is parts.embeddings.weight
    own = _float_bytes(name, head.weight)
    if scheme is not None:
        return _packed_bytes(name, head, scheme) - (0 if tied else own)
    return own if tied and settings.rotation is not None else 0


def _float_bytes(name: str, tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() + len(name) + _ENTRY


def _packed_bytes(name: str, linear: nn.Linear, scheme: QuantScheme) -> int:
    """Of a module but its bias; `name` is that of its weight."""
    tensors = 2 + (not scheme.symmetric) + 2 * is_static(scheme.granularity)
    header = tensors * (len(name) + len("_zero_point") + _ENTRY)
    return scheme.module_bytes(linear.out_features, linear.in_features) + header


def room_in(size: str, costs: Mapping[str, Mapping[int, int]], rest: int) -> int:
    """Bytes of the budget that are left where every site has the fewest bits.

    `costs`: site -> bits -> bytes; `rest`: bytes of what has no choice.

    Raises:
        ValueError: the fewest bits do not fit.
    """
    least = rest + sum(cost[WIDTHS[0]] for cost in costs.values())
    room = size_in_bytes(size) - least
    if room < 0:
        digits, unit = (7, "GB") if least >= 1e9 else (4, "MB")
        enough = math.ceil(least / 10**digits) / 100
        raise ValueError(
            f"precision_budget={size!r} is below {enough:.2f}{unit}, which the model takes with "
            f"weights of {WIDTHS[0]} bits: raise it."
        )
    return room


def fit_bits(
    curves: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, int]], room: float
) -> dict[str, int]:
    """Weight bits of every site that take at most `room` more than the fewest bits.

    Starts with the fewest bits everywhere and takes, as long as one fits, the raise that lowers the
    divergence most per cost. A site without a curve (of a dead layer) stays at the fewest bits.

    Args:
        curves: site -> bits -> divergence; every site has the same widths.
        costs: site -> bits -> bytes, or whatever `room` counts.
        room: of costs.

    Returns:
        Site -> bits. No further raise of any site fits.
    """
    bits = {name: min(cost) for name, cost in costs.items()}
    while True:
        raises = [
            ((curve[bits[name]] - curve[wider]) / cost, -cost, name, wider)
            for name, curve in curves.items()
            for wider in curve
            if wider > bits[name] and (cost := costs[name][wider] - costs[name][bits[name]]) <= room
        ]
        if not raises:
            return bits
        _, cost, name, wider = max(raises)
        bits[name], room = wider, room + cost


def allocate_bits(
    curves: Mapping[str, Mapping[int, float]], parameters: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Weight bits of every site so that the average over all weights stays within the budget.

    Args:
        curves: site -> bits -> divergence; every site has the same widths.
        parameters: site -> number of weights.
        budget: average bits of a weight.

    Returns:
        As `fit_bits`.

    Raises:
        ValueError: the budget is below the fewest bits.
    """
    widths = sorted(next(iter(curves.values())))
    room = budget * sum(parameters.values()) - widths[0] * sum(parameters.values())
    if room < 0:
        raise ValueError(
            f"precision_budget={budget} is below {widths[0]} bits, the fewest a weight can have: "
            f"raise it."
        )
    costs = {name: {b: b * count for b in widths} for name, count in parameters.items()}
    return fit_bits(curves, costs, room)
