"""The findings of a calibration as lines of text: entropies as bars, blocks with their errors."""

from collections.abc import Iterator

from qvlm_hf.calibration.record.report import CalibrationReport, SegmentReport
from qvlm_hf.cli.wording import in_options

__all__ = ["story"]

_WIDTH = 40  # characters of the longest bar
_RECIPES = "recipes, the one taken first (geometric means)"


def story(report: CalibrationReport) -> Iterator[str]:
    """All of it, warnings last."""
    if "by_structure" in report.provenance:
        yield "read by structure: the family has no row"
    if (coverage := report.provenance.get("coverage")) is not None:
        kept = ", ".join(f"{reason} {share}%" for reason, share in coverage["kept"].items())
        yield f"{coverage['percent']}% of the weights quantized; the rest: {kept}"
    if (rotation := report.provenance.get("rotation")) is not None:
        yield f"rotation: {rotation}"
    yield from _recipes(report)
    longest = max((d for segment in report.segments for d in segment.entropies), default=0.0)
    for segment in report.segments:
        yield from _entropies(segment, longest)
    if any(segment.blocks for segment in report.segments):
        yield f"{'blocks':<24}{'start':>12}{'greedy':>12}{'joint':>12}{'joint/greedy':>14}"
    for segment in report.segments:
        yield from _blocks(segment)
    for lift in report.lifts:
        yield (
            f"guard: {lift.site} at W{lift.weight_bits}A{lift.activation_bits}: "
            f"alone it moved the answers by {lift.before:.4f} nats, now by {lift.after:.4f}"
        )
    if report.routing:
        seen = [tokens for routing in report.routing for tokens in routing.tokens]
        few = sum(len(routing.few_tokens) for routing in report.routing)
        yield f"experts: each of {len(seen)} saw {min(seen)} to {max(seen)} tokens, {few} too few"
    if (vision := report.vision) is not None:
        errors = f"{vision.error_before:.4f} -> {vision.error_after:.4f}"
        verdict = "kept" if vision.kept else "not kept"
        yield (
            f"visual encoder optimisation, {vision.epochs} epochs: "
            f"error on held-out samples {errors}, {verdict}"
        )
        if vision.depth_before is not None and vision.depth_after is not None:
            depths = f"{vision.depth_before:.2f} -> {vision.depth_after:.2f}"
            yield f"  mean depth of the vision encoder's blocks {depths} layers"
    if report.seconds:
        # longest first, in a new report and in one from disk, whose keys are sorted
        longest_first = sorted(report.seconds.items(), key=lambda item: -item[1])
        yield "seconds: " + ", ".join(f"{step} {s:.1f}" for step, s in longest_first)
    yield from ("warning: " + in_options(warning, "quantize") for warning in report.warnings)


def _recipes(report: CalibrationReport) -> Iterator[str]:
    if not report.recipes:
        return
    names = [
        ", ".join(f"{name}={value}" for name, value in sorted(tried.fields.items()))
        for tried in report.recipes
    ]
    width = max(len(_RECIPES), *(len(name) + 2 for name in names))
    yield f"{_RECIPES:<{width}}{'answers':>9}{'text':>9}"
    for name, tried in zip(names, report.recipes, strict=True):
        yield f"{'  ' + name:<{width}}{tried.answer_kl:>9.4f}{tried.text_kl:>9.4f}"


def _entropies(segment: SegmentReport, longest: float) -> Iterator[str]:
    """One bar per pair of consecutive layers: D(k, k+1) in nats, equation 4."""
    if not segment.entropies:
        return
    yield (
        f"entropy D(k, k+1) between layers, {segment.component}, "
        f"threshold {segment.threshold:.3f} nats"
    )
    ends = {segment.layers.index(block.layers[-1]) for block in segment.blocks}
    for pair, entropy in enumerate(segment.entropies):
        bar = "#" * max(1, round(_WIDTH * entropy / longest)) if longest > 0 else ""
        rule = "  | block ends" if pair in ends else ""
        yield f"  {pair:>2} -> {pair + 1:<2} {bar:<{_WIDTH}} {entropy:.3f}{rule}"


def _blocks(segment: SegmentReport) -> Iterator[str]:
    """One line per block: its layers, and its output error after each stage of the search."""
    for block in segment.blocks:
        first, last = (segment.layers.index(block.layers[end]) for end in (0, -1))
        name = f"{segment.component} {first}" + (f"-{last}" if last != first else "")
        errors = "".join(f"{e:>12.6f}" for e in (block.initial, block.greedy, block.joint))
        ratio = block.joint / block.greedy if block.greedy else 1.0
        yield f"  {name:<22}{errors}{ratio:>14.3f}"
