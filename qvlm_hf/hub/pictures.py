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
        A PNG, the same bytes for the same report and version of matplotlib; None where there is
        nothing to draw.
    """
    drawn = [segment for segment in segments if segment.entropies]
    if not drawn:
        return None
    from matplotlib.backends.backend_agg import (
        FigureCanvasAgg,
    )  # not at the top: only cards need it, and it takes half a second
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(9, 3 * len(drawn) + 0.2),
        dpi=120,
        layout=ConstrainedLayoutEngine(h_pad=0.12, hspace=0.04),
    )
    FigureCanvasAgg(figure)
    for axes, segment in zip(
        figure.subplots(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True
    ):
        _draw(axes, segment)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw(axes: "Axes", segment: SegmentReport) -> None:
    last_layer = len(
        segment.entropies
    )  # layers that nothing depends on have no entropy and are not drawn
    inside = [True] * last_layer
    for number, block in enumerate(segment.blocks):
        first, last = segment.layers.index(block.layers[0]), segment.layers.index(block.layers[-1])
        axes.axvspan(
            first - 0.5,
            last + 0.5,
            facecolor=_BANDS[number % 2],
            edgecolor="white",
            linewidth=3,
            zorder=0,
        )
        if last < last_layer:
            inside[last] = False
    axes.plot(
        [k + 0.5 for k in range(last_layer)],
        segment.entropies,
        color=_LINE,
        linewidth=1.3,
        zorder=3,
    )
    for fill, wanted, label in (
        (_LINE, True, "inside a block"),
        ("white", False, "between two blocks"),
    ):
        chosen = [k for k in range(last_layer) if inside[k] == wanted]
        axes.plot(
            [k + 0.5 for k in chosen], [segment.entropies[k] for k in chosen], linestyle="", marker="o", markersize=5, color=_LINE,
            markerfacecolor=fill, zorder=4, label=label,
        )  # fmt: skip
    axes.axhline(
        segment.threshold,
        color=_THRESHOLD,
        linestyle="--",
        linewidth=1.1,
        zorder=2,
        label=f"threshold, {segment.threshold:.3f} nats",
    )
    axes.set_xlim(-0.5, last_layer + 0.5)
    axes.set_xticks(range(0, last_layer + 1, -(-(last_layer + 1) // _TICKS)))
    axes.margins(y=0.15)
    title = f"{_PARTS[segment.component]}: {last_layer + 1} layers in {len(segment.blocks)} blocks"
    axes.set_title(title, loc="left", fontsize=11, color=_TEXT, pad=8)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=_TEXT,
        borderpad=0,
        borderaxespad=0.6,
    )
    axes.set_xlabel(
        "layer k (a point lies between the two layers that it compares; a band is a block)",
        fontsize=9,
        color=_TEXT,
    )
    axes.set_ylabel("D(k, k+1) in nats", fontsize=9, color=_TEXT)
    axes.tick_params(labelsize=8.5, colors=_TEXT, color="#999999")
    axes.grid(axis="y", color="white", linewidth=0.8, zorder=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#999999")
