"""The files of `qvlm ablate`: rows as JSON and CSV, means as Markdown, answer divergence as PNG."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["check_ablation", "read_ablation", "write_ablation"]

_NAMES = ("ablation.json", "ablation.csv", "ablation.md", "ablation.png")
_FIGURES = {  # key -> heading and format of the mean
    "accuracy": ("accuracy", "{:.4f}"),
    "answer_kl": ("answer KL, nats", "{:.5f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "text_kl": ("text KL, nats", "{:.4f}"),
    "cpu_seconds": ("processor s", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
}
_COLUMNS = ("scheme", "line", "seed", "low", "high", "full_accuracy", "full_perplexity", "error")

Row = dict[str, Any]


def check_ablation(folder: Path, setting: Mapping[str, Any]) -> None:
    """Checks that results of `setting` can go to a folder, before hours of measuring.

    Raises:
        ValueError: it holds files of these names that no ablation of this setting wrote.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
    found = folder / _NAMES[0]
    if not found.exists():
        if strangers := [name for name in _NAMES if (folder / name).exists()]:
            raise ValueError(f"{folder}: {strangers[0]} is not of an ablation: name another.")
        return
    earlier = _read(found)["setting"]
    if differing := sorted(name for name in setting if earlier.get(name) != setting[name]):
        raise ValueError(
            f"{folder}: holds an ablation with another {', '.join(differing)}: name another "
            f"directory, or remove that one."
        )


def read_ablation(folder: Path) -> list[Row]:
    """The rows of an earlier run that have figures; cells that failed are tried again."""
    found = folder / _NAMES[0]
    return [row for row in _read(found)["rows"] if "error" not in row] if found.exists() else []


def write_ablation(folder: Path, setting: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes all files, each beside its place and then moved there."""
    contents = {
        "ablation.json": json.dumps({"setting": setting, "rows": rows}, indent=1).encode(),
        "ablation.csv": _csv(rows).encode(),
        "ablation.md": _markdown(setting, rows).encode(),
        "ablation.png": _picture(rows),
    }
    for name, content in contents.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {"setting": dict(content["setting"]), "rows": list(content["rows"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not of an ablation: name another directory.") from error


def _csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    columns = (*_COLUMNS[:3], *_FIGURES, *_COLUMNS[3:])
    writer = csv.DictWriter(stream, columns, extrasaction="raise")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _markdown(setting: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Per scheme a table: a line per recipe, the mean of its seeds, and their deviation."""
    shown = [key for key in _FIGURES if any(key in row for row in rows)]
    facts = {name: value for name, value in setting.items() if name != "versions"}
    pairs = (*facts.items(), *setting["versions"].items())
    text = ["# Ablation", "", ", ".join(f"{name} {value}" for name, value in pairs), ""]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        headings = " | ".join(_FIGURES[key][0] for key in shown)
        text += [f"## {scheme}", "", f"| line | seeds | {headings} |"]
        text.append("|---" * (len(shown) + 2) + "|")
        own = [row for row in rows if row["scheme"] == scheme]
        for line in dict.fromkeys(row["line"] for row in own):
            found = [row for row in own if row["line"] == line and "error" not in row]
            errors = [row["error"] for row in own if row["line"] == line and "error" in row]
            cells = [_mean(key, [row[key] for row in found]) for key in shown]
            note = f" ({errors[0]})" if errors else ""
            text.append(f"| {line}{note} | {len(found)} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def _mean(key: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    shown = _FIGURES[key][1].format
    spread = f" ± {shown(stdev(values))}" if len(values) > 1 else ""
    return f"{shown(mean(values))}{spread}"


def _picture(rows: Sequence[Row]) -> bytes:
    """Answer divergence by line, one curve per scheme, a point per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(row["line"] for row in rows))
    figure = Figure(figsize=(1.1 * len(lines) + 2.5, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        own = [row for row in rows if row["scheme"] == scheme and row.get("answer_kl")]
        places = [lines.index(row["line"]) for row in own]
        points = axes.scatter(places, [row["answer_kl"] for row in own], s=14)
        drawn = [line for line in lines if any(row["line"] == line for row in own)]
        means = [mean(row["answer_kl"] for row in own if row["line"] == line) for line in drawn]
        colour = points.get_facecolor()
        axes.plot([lines.index(line) for line in drawn], means, label=scheme, color=colour[0])
    axes.set_yscale("log")
    axes.set_ylabel("answer KL to full precision, nats")
    axes.set_xticks(range(len(lines)), lines, rotation=30, ha="right")
    axes.grid(axis="y", alpha=0.3)
    if rows:
        axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
