"""Weight bits of the sites that keep to a budget: an average, or the size of the saved weights."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from qvlm_hf.calibration.options import size_in_bytes
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.models.graph import get_linear, output_head

__all__ = ["WIDTHS", "allocate_bits", "fit_bits", "saved_bytes"]

WIDTHS = (2, 3, 4, 5, 6, 8)  # weight bits that a budget chooses from
_HEADER = 160  # bytes of a file's header that name a tensor


def saved_bytes(calibration: Calibration) -> tuple[dict[str, dict[int, int]], int]:
    """What the saved weights of a model take.

    Every site is counted with a static range per channel, the largest there is.

    Returns:
        Site -> weight bits -> bytes; and the bytes of all the rest, with the files' headers.
    """
    model, settings = calibration.model, calibration.settings
    sites = [s for segment in calibration.segments for layer in segment.layers for s in layer.sites]
    granularity = "none" if settings.activation_bits == 16 else "channel"
    parameters = list(model.parameters())
    rest = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    costs: dict[str, dict[int, int]] = {}
    for site in sites:
        weights = [linear.weight for linear in site.linears]
        rest -= sum(weight.numel() * weight.element_size() for weight in weights)
        for bits in WIDTHS:
            precision = replace(settings.precision, weight_bits=bits)
            scheme = settings.module_scheme(granularity, site.hadamard, precision)
            costs.setdefault(site.name, {})[bits] = sum(
                scheme.module_bytes(linear.out_features, linear.in_features)
                for linear in site.linears
            )
    if head_scheme := settings.head_scheme():
        head = get_linear(model, output_head(model))
        rest += head_scheme.module_bytes(head.out_features, head.in_features)
        if not any(module.weight is head.weight for module in _embeddings(model)):
            rest -= head.weight.numel() * head.weight.element_size()
    return costs, rest + _HEADER * (len(parameters) + 4 * sum(len(s.linears) for s in sites))


def _embeddings(model: nn.Module) -> Iterator[nn.Embedding]:
    return (module for module in model.modules() if isinstance(module, nn.Embedding))


def fit_bits(
    curves: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, Mapping[int, int]],
    rest: int,
    size: str,
) -> dict[str, int]:
    """Weight bits of every site so that the saved weights take at most `size`.

    `costs`: site -> bits -> bytes; `rest`: bytes of what has no choice. No further raise of any
    site fits.

    Raises:
        ValueError: the fewest bits do not fit.
    """
    room = size_in_bytes(size) - rest - sum(cost[WIDTHS[0]] for cost in costs.values())
    if room < 0:
        least = (size_in_bytes(size) - room) / 1e6
        raise ValueError(
            f"precision_budget={size!r} is below {least:.3g}MB, which the model takes with weights "
            f"of {WIDTHS[0]} bits: raise it."
        )
    return _spend(curves, costs, room)


def allocate_bits(
    curves: Mapping[str, Mapping[int, float]], parameters: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Weight bits of every site so that the average over all weights stays within the budget.

    Starts with the fewest bits everywhere and takes, as long as one fits, the raise that lowers the
    divergence most per added bit. A site without a curve (of a dead layer) stays at the fewest
    bits.

    Args:
        curves: site -> bits -> divergence; every site has the same widths.
        parameters: site -> number of weights.
        budget: average bits of a weight.

    Returns:
        Site -> bits. No further raise of any site fits into the budget.

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
    return _spend(curves, costs, room)


def _spend(
    curves: Mapping[str, Mapping[int, float]], costs: Mapping[str, Mapping[int, float]], room: float
) -> dict[str, int]:
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
