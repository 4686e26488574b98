"""The tables of a model card, as Markdown that is also readable as text: columns are padded to one width."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qvlm_hf.calibration.report import CalibrationReport, PrecisionRaise, SegmentReport
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hub.contents import Contents

__all__ = [
    "accuracy_table",
    "block_table",
    "code",
    "counted",
    "full_precision_names",
    "kind_table",
    "lift_table",
    "markdown_table",
    "module_table",
    "percent",
    "precision_table",
    "provenance_table",
    "shown_bytes",
    "shown_versions",
    "size_table",
    "speed_table",
]

_PARTS = {
    "vision": "vision encoder",
    "projector": "projector",
    "language": "language model",
    "embeddings": "token embeddings",
    "head": "output head",
    "other": "other",
}
_RANGES = {
    "channel": "static, per channel",
    "token": "static, per position",
    "dynamic_token": "at run time, per token",
    "none": "none",
}


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> str:
    """A padded Markdown table.

    Args:
        header: names of the columns.
        rows: one cell per column; "|" and line breaks in them are made harmless.
        right: indices of columns that are aligned to the right.
    """
    cells = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (header, *rows)
    ]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width - 1) + ":" if column in right else "-" * width
        for column, width in enumerate(widths)
    )
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def percent(share: float, digits: int = 1) -> str:
    """A share as people read it."""
    return f"{100 * share:.{digits}f} %"


def counted(count: int, noun: str) -> str:
    """A number and its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shown_bytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def precision_table(contents: Contents) -> str:
    """What is quantized to what: one row per part and precision, and one for what is left of a part, with the share of all parameters."""
    total = sum(part.parameters for part in contents.components)
    rows = []
    for part in contents.components:
        own = [module for module in contents.modules if module.component == part.name]
        weights: Counter[tuple[int, int, str]] = Counter()
        counts: Counter[tuple[int, int, str]] = Counter()
        for module in own:
            if module.scheme is not None:
                key = (
                    module.scheme.weight_bits,
                    module.scheme.activation_bits,
                    module.scheme.granularity,
                )
                weights[key] += module.weights
                counts[key] += 1
        for (weight_bits, activation_bits, granularity), count in sorted(counts.items()):
            share = weights[weight_bits, activation_bits, granularity] / total
            bits = _activations(activation_bits, contents.dtype)
            rows.append(
                (
                    _PARTS[part.name],
                    counted(count, "linear module"),
                    f"{weight_bits} bit",
                    bits,
                    _RANGES[granularity],
                    percent(share),
                )
            )
        if rest := part.parameters - weights.total():
            left = sum(module.scheme is None for module in own)
            what = (
                "everything else"
                if counts and not left
                else counted(left, "linear module")
                if left
                else "everything"
            )
            rows.append(
                (
                    _PARTS[part.name],
                    what,
                    contents.dtype,
                    contents.dtype,
                    "none",
                    percent(rest / total),
                )
            )
    return markdown_table(
        ("Part", "What", "Weights", "Activations", "Activation ranges", "Share of parameters"),
        rows,
        right=(5,),
    )


def module_table(contents: Contents) -> str:
    """Every quantized module."""
    rows = [
        (f"`{m.name}`", *_scheme_cells(m.scheme, contents.dtype))
        for m in contents.modules
        if m.scheme is not None
    ]
    return markdown_table(
        ("Module", "Weights", "Activations", "Activation ranges", "Input transform"), rows
    )


def full_precision_names(contents: Contents) -> list[str]:
    """Linear modules in full precision, layers of one kind together: "model.layers.*.fc1 (24)"."""
    names = Counter(
        ".".join("*" if part.isdigit() else part for part in module.name.split("."))
        for module in contents.modules
        if module.scheme is None
    )
    return [f"`{name}`" + (f" ({count})" if "*" in name else "") for name, count in names.items()]


def lift_table(lifts: Sequence[PrecisionRaise]) -> str:
    """What the guard raised."""
    rows = [
        (
            f"`{lift.site}`",
            f"W{lift.weight_bits}A{lift.activation_bits}",
            f"{lift.before:.4f}",
            f"{lift.after:.4f}",
        )
        for lift in lifts
    ]
    return markdown_table(
        ("First module of the site", "Raised to", "Answers moved by (nats)", "After"),
        rows,
        right=(2, 3),
    )


def block_table(segments: Sequence[SegmentReport]) -> str:
    """Blocks and the relative squared error of their output."""
    rows = []
    for segment in segments:
        for number, block in enumerate(segment.blocks):
            first, last = (
                segment.layers.index(block.layers[0]),
                segment.layers.index(block.layers[-1]),
            )
            layers = str(first) if first == last else f"{first}-{last}"
            rows.append(
                (
                    _PARTS[segment.component],
                    str(number),
                    layers,
                    f"{block.initial:.6f}",
                    f"{block.greedy:.6f}",
                    f"{block.joint:.6f}",
                )
            )
    return markdown_table(
        ("Part", "Block", "Layers", "Error at the start", "Layer by layer", "Jointly"),
        rows,
        right=(1, 3, 4, 5),
    )


def provenance_table(report: CalibrationReport) -> str:
    """Where weights and calibration data came from, and what computed with them."""
    found = report.provenance
    rows = [
        (label, f"`{code(found[key])}`")
        for label, key in (
            ("Full-precision model", "base_model"), ("Its revision", "base_model_revision"), ("Full-precision model", "base_directory"),
            ("Calibration data", "dataset"),
        )
        if key in found
    ]  # fmt: skip
    rows += [
        (label, f"{found[key]:,}")
        for label, key in (
            ("Samples", "samples"),
            ("Pictures", "images"),
            ("Tokens", "tokens"),
            ("Seed", "seed"),
            ("CPU threads", "threads"),
        )
        if key in found
    ]
    rows += [("SHA-256 of the samples", f"`{found['sha256']}`")] if "sha256" in found else []
    rows += [("Versions", shown_versions(found["versions"]))] if "versions" in found else []
    return markdown_table(("Provenance", ""), rows)


def shown_versions(versions: Mapping[str, str]) -> str:
    """Packages and their versions in one line."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def size_table(contents: Contents) -> str:
    """Bytes of every part in bfloat16 and as stored."""
    parameters = sum(part.parameters for part in contents.components)
    rows = [
        (_PARTS[part.name], part.parameters, part.bfloat16_bytes, part.stored_bytes)
        for part in contents.components
    ]
    rows.append(("**total**", parameters, contents.bfloat16_bytes, contents.stored_bytes))
    cells = [
        (name, f"{count:,}", shown_bytes(full), shown_bytes(packed), f"{full / packed:.2f}")
        for name, count, full, packed in rows
    ]
    return markdown_table(
        ("Part", "Parameters", "bfloat16", "This model", "Times smaller"), cells, right=(1, 2, 3, 4)
    )


def accuracy_table(evaluation: Mapping[str, Any], reference: str) -> str:
    """This model and, if it was measured, full precision."""
    found = evaluation["comparison"]
    rows = [] if found is None else [(reference, *_share_cells(found["reference_accuracy"]))]
    rows.append(("**this model**", *_share_cells(evaluation["accuracy"])))
    return markdown_table(
        ("Model", "Accuracy", "95 % interval", "Right answers"), rows, right=(1, 2, 3)
    )


def kind_table(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """This model on each kind of question."""
    rows = [(kind, *_share_cells(share)) for kind, share in kinds.items()]
    return markdown_table(
        ("Kind of question", "Accuracy", "95 % interval", "Right answers"), rows, right=(1, 2, 3)
    )


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `qvlm bench` measured; ways that failed are left out."""
    header = (
        "Way",
        "Batch",
        "Speedup of the first token",
        "Speedup of further tokens",
        "Tokens per second",
        "Weights",
        "Peak memory",
    )
    return markdown_table(
        header,
        [_speed_cells(row) for row in rows if row["error"] is None],
        right=(1, 2, 3, 4, 5, 6),
    )


def _speed_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    way = row["way"] if row["kernel"] is None else f"{row['way']} ({row['kernel']})"
    times = (
        _ratio(row["first_token"]),
        _ratio(row["decode"]["time"]),
        f"{row['tokens_per_second']:.1f}",
    )
    peak = "not measured" if row["peak_bytes"] is None else shown_bytes(row["peak_bytes"])
    return (way, str(row["batch"]), *times, shown_bytes(row["weight_bytes"]), peak)


def _ratio(figure: Mapping[str, float]) -> str:
    return f"{figure['speedup']:.2f} (spread {percent(figure['spread'], 0)})"


def _share_cells(share: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = share["interval"]
    return (
        percent(share["value"]),
        f"{100 * low:.1f} to {percent(high)}",
        f"{share['correct']} of {share['total']}",
    )


def _scheme_cells(scheme: QuantScheme, dtype: str) -> tuple[str, str, str, str]:
    transform = "none" if scheme.hadamard is None else f"Hadamard, blocks of {scheme.hadamard}"
    return (
        f"{scheme.weight_bits} bit",
        _activations(scheme.activation_bits, dtype),
        _RANGES[scheme.granularity],
        transform,
    )


def _activations(bits: int, dtype: str) -> str:
    return dtype if bits == 16 else f"{bits} bit"


def code(text: object) -> str:
    """Text for a code span: nothing in it can end the span."""
    return " ".join(str(text).replace("`", "'").split())
