"""Lines of text that tell what a calibration found: entropies as bars, blocks with their errors."""

from collections.abc import Iterator

from qvlm_hf.calibration.report import CalibrationReport, SegmentReport
from qvlm_hf.cli.wording import in_options

__all__ = ["block_lines", "entropy_chart", "lift_lines", "story", "vision_lines"]

_WIDTH = 40  # characters of the longest bar


def story(report: CalibrationReport) -> Iterator[str]:
    """All of it, warnings last."""
    yield from entropy_chart(report)
    yield from block_lines(report)
    yield from lift_lines(report)
    yield from vision_lines(report)
    yield from ("warning: " + in_options(warning, "quantize") for warning in report.warnings)


def entropy_chart(report: CalibrationReport) -> Iterator[str]:
    """One bar per pair of consecutive layers: D(k, k+1) in nats (eq.

    4); a rule marks where a block ends.
    """
    longest = max((d for segment in report.segments for d in segment.entropies), default=0.0)
    for segment in report.segments:
        if not segment.entropies:
            continue
        yield f"entropy D(k, k+1) between layers, {segment.component}, threshold {segment.threshold:.3f} nats"
        ends = _block_ends(segment)
        for pair, dependency in enumerate(segment.entropies):
            bar = "#" * max(1, round(_WIDTH * dependency / longest)) if longest > 0 else ""
            yield f"  {pair:>2} -> {pair + 1:<2} {bar:<{_WIDTH}} {dependency:.3f}{'  | block ends' if pair in ends else ''}"


def block_lines(report: CalibrationReport) -> Iterator[str]:
    """One line per block: its layers and the relative squared error of its output at the start, after greedy and after joint search."""
    if any(segment.blocks for segment in report.segments):
        yield f"{'blocks':<24}{'start':>12}{'greedy':>12}{'joint':>12}{'joint/greedy':>14}"
    for segment in report.segments:
        for block in segment.blocks:
            first, last = (
                segment.layers.index(block.layers[0]),
                segment.layers.index(block.layers[-1]),
            )
            name = (
                f"{segment.component} {first}"
                if first == last
                else f"{segment.component} {first}-{last}"
            )
            ratio = block.joint / block.greedy if block.greedy else 1.0
            yield f"  {name:<22}{block.initial:>12.6f}{block.greedy:>12.6f}{block.joint:>12.6f}{ratio:>14.3f}"


def lift_lines(report: CalibrationReport) -> Iterator[str]:
    """One line per site that the guard gave more bits."""
    for lift in report.lifts:
        yield (
            f"guard: {lift.site} at W{lift.weight_bits}A{lift.activation_bits}: "
            f"alone it moved the answers by {lift.before:.4f} nats, now by {lift.after:.4f}"
        )


def vision_lines(report: CalibrationReport) -> Iterator[str]:
    """What the visual encoder optimisation did: its error on held-out samples, and how fine the blocks became."""
    if (vision := report.vision) is None:
        return
    yield (
        f"visual encoder optimisation, {vision.epochs} epochs: error on held-out samples "
        f"{vision.error_before:.4f} -> "
        f"{vision.error_after:.4f}, {'kept' if vision.kept else 'not kept'}"
    )
    if vision.depth_before is not None and vision.depth_after is not None:
        yield f"  mean depth of the vision encoder's blocks {vision.depth_before:.2f} -> {vision.depth_after:.2f} layers"


def _block_ends(segment: SegmentReport) -> set[int]:
    """Indices of the layers after which a block ends."""
    return {segment.layers.index(block.layers[-1]) for block in segment.blocks}
