"""The picture of a card: how much each layer depends on the one before it, and the blocks."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qvlm_hf.calibration.record.report import SegmentReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["entropy_picture"]

_PARTS = {"vision": "Vision encoder", "projector": "Projector", "language": "Language model"}
_BANDS = ("#dfe8f3", "#f3ead9")  # of neighbouring blocks
_LINE, _THRESHOLD, _TEXT, _AXES = "#1f4e8c", "#b3412f", "#333333", "#999999"
_TICKS = 16  # labels of layers at most


def entropy_picture(segments: Sequence[SegmentReport]) -> bytes | None:
    """Draws one panel per segment that has pairs of layers.

    Returns:
        A PNG, the same bytes for the same report and version of matplotlib; None where there is
        nothing to draw.
    """
    drawn = [segment for segment in segments if segment.entropies]
    if not drawn:
        return None
    # not at the top: only cards need it, and it takes half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.12, hspace=0.04)
    figure = Figure(figsize=(9, 3 * len(drawn) + 0.2), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    for axes, segment in zip(panels, drawn, strict=True):
        _draw_entropies(axes, segment)
        _style(axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw_entropies(axes: "Axes", segment: SegmentReport) -> None:
    """Blocks as bands, entropies as points between two layers, the threshold as a line."""
    entropies, last_layer = segment.entropies, len(segment.entropies)  # layers behind are dead
    for number, block in enumerate(segment.blocks):
        first, last = (segment.layers.index(block.layers[end]) for end in (0, -1))
        axes.axvspan(first - 0.5, last + 0.5, facecolor=_BANDS[number % 2], zorder=0)
    axes.plot(
        [k + 0.5 for k in range(last_layer)], entropies,
        color=_LINE, linewidth=1.3, marker="o", markersize=5, zorder=3,
    )  # fmt: skip
    label = f"threshold, {segment.threshold:.3f} nats"
    axes.axhline(
        segment.threshold, color=_THRESHOLD, linestyle="--", linewidth=1.1, zorder=2, label=label
    )
    axes.set_xlim(-0.5, last_layer + 0.5)
    axes.set_xticks(range(0, last_layer + 1, -(-(last_layer + 1) // _TICKS)))
    title = f"{_PARTS[segment.component]}: {last_layer + 1} layers in {len(segment.blocks)} blocks"
    axes.set_title(title, loc="left", fontsize=11, color=_TEXT, pad=8)


def _style(axes: "Axes") -> None:
    axes.margins(y=0.15)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8.5,
        labelcolor=_TEXT, borderpad=0, borderaxespad=0.6,
    )  # fmt: skip
    label = "layer k (a point lies between the two layers that it compares; a band is a block)"
    axes.set_xlabel(label, fontsize=9, color=_TEXT)
    axes.set_ylabel("D(k, k+1) in nats", fontsize=9, color=_TEXT)
    axes.tick_params(labelsize=8.5, colors=_TEXT, color=_AXES)
    axes.grid(axis="y", color="white", linewidth=0.8, zorder=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_AXES)
