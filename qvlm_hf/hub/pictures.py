"""The picture of a model card: how much each layer depends on the one before it, and the blocks that follow from it."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvlm_hf.calibration.report import SegmentReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["entropy_picture"]

_PARTS = {"vision": "Vision encoder", "projector": "Projector", "language": "Language model"}
_BANDS = ("#dfe8f3", "#f3ead9")  # of neighbouring blocks
_LINE, _THRESHOLD, _TEXT = "#1f4e8c", "#b3412f", "#333333"
_TICKS = 16  # labels of layers at most


def entropy_picture(segments: Sequence[SegmentReport]) -> bytes | None:
    """Draws one panel per segment that has pairs of layers.

    Args:
        segments: of a calibration report.

    Returns:
        A PNG, the same bytes for the same report and version of matplotlib; None where there is nothing to draw.
    """
    drawn = [segment for segment in segments if segment.entropies]
    if not drawn:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: only cards need it, and it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.9 * len(drawn) + 0.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, segment in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        _draw(axes, segment)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw(axes: "Axes", segment: SegmentReport) -> None:
    count = len(segment.entropies) + 1  # layers that nothing depends on have no entropy
    for number, block in enumerate(segment.blocks):
        first, last = segment.layers.index(block.layers[0]), segment.layers.index(block.layers[-1])
        axes.axvspan(first - 0.5, last + 0.5, color=_BANDS[number % 2], zorder=0, linewidth=0)
    pairs = [index + 0.5 for index in range(count - 1)]
    axes.plot(pairs, segment.entropies, color=_LINE, marker="o", markersize=4.5, linewidth=1.4, zorder=3)
    axes.axhline(segment.threshold, color=_THRESHOLD, linestyle="--", linewidth=1.1, zorder=2)
    axes.annotate(
        f"threshold {segment.threshold:.3f}", (1.0, segment.threshold), xycoords=("axes fraction", "data"), xytext=(-4, 3),
        textcoords="offset points", ha="right", va="bottom", color=_THRESHOLD, fontsize=8.5,
    )  # fmt: skip
    step = -(-count // _TICKS)
    axes.set_xticks(range(0, count, step))
    axes.set_xlim(-0.5, count - 0.5)
    axes.margins(y=0.18)
    axes.set_title(f"{_PARTS[segment.component]}: {len(segment.blocks)} blocks of {count} layers", loc="left", fontsize=10.5, color=_TEXT)
    axes.set_xlabel("layer k (a point lies between the two layers that it compares)", fontsize=9, color=_TEXT)
    axes.set_ylabel("D(k, k+1) in nats", fontsize=9, color=_TEXT)
    axes.tick_params(labelsize=8.5, colors=_TEXT)
    axes.grid(axis="y", color="white", linewidth=0.8, zorder=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
