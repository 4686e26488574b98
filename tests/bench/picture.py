"""Draws docs/measured.svg from the tables of docs/results.md and docs/benchmarks.md."""

import re
from pathlib import Path

__all__ = ["picture"]

DOCS = Path(__file__).parent.parent.parent / "docs"
ROW, LABEL, BAR, TOP = 24, 232, 170, 62
OURS, OTHERS = "#1f6f8b", "#b8c0c8"


def cells(page: str, section: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table row of a section, without emphasis."""
    text = (DOCS / page).read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].replace("*", "").strip(): [cell.strip() for cell in row[1:]] for row in rows}


def number(cell: str) -> float:
    return float(re.search(r"[\d.]+", cell)[0])


def panel(left: int, title: str, unit: str, bars: list[tuple[str, float, bool]]) -> list[str]:
    """A bar chart as SVG elements: a name, a value and whether it is ours per bar."""
    most = max(value for _, value, _ in bars)
    bars = [(f"qvlm_hf {name}" if ours else name, value, ours) for name, value, ours in bars]
    lines = [
        f'<text x="{left}" y="22" font-weight="bold">{title}</text>',
        f'<text x="{left}" y="42" fill="#57606a">{unit}</text>',
    ]
    for index, (name, value, ours) in enumerate(bars):
        y = TOP + ROW * index
        width = BAR * value / most
        lines += [
            f'<text x="{left + LABEL - 8}" y="{y + 13}" text-anchor="end">{name}</text>',
            f'<rect x="{left + LABEL}" y="{y}" width="{width:.1f}" height="17" '
            f'fill="{OURS if ours else OTHERS}"/>',
            f'<text x="{left + LABEL + width + 6:.1f}" y="{y + 13}">{value:g}</text>',
        ]
    return lines


def picture() -> str:
    """The text of docs/measured.svg."""
    accuracy = cells("results.md", "Against full precision")
    speed = cells("benchmarks.md", "Models on a processor with bfloat16 units")
    shown = ("full precision", "W4A4", "W4A4, plain rounding")
    quality = [(name, number(accuracy[name][0]), name == "W4A4") for name in shown]
    tokens = [
        (name, number(row[3]), bool(re.match(r"W\d", name)))
        for name, row in speed.items()
        if name and re.match(r"[\d.]+$", row[3])
    ]
    height = TOP + ROW * max(len(quality), len(tokens)) + 6
    elements = [
        *panel(0, "Accuracy", "percent of 2400 questions, demo model, W4A4", quality),
        *panel(460, "Speed of a decoded token", "times bfloat16, LLaVA of 1.1 B, CPU", tokens),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {height}" '
            'font-family="sans-serif" font-size="13" fill="#24292f">',
            f'<rect width="920" height="{height}" fill="#ffffff"/>',
            *elements,
            "</svg>\n",
        ]
    )
