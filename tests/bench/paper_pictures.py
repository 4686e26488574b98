"""Draws docs/paper_*.png, and prints their figures, from the rows of paper_figures.py.

PYTHONPATH=tests python tests/bench/paper_pictures.py
"""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS = Path(__file__).parent / "results"
MODELS = {"demo": "demo", "siglip": "SigLIP + Qwen2", "smollm": "SmolLM2"}
COLOURS = {"default": "#1f6f8b", "paper": "#b3412f", "W4A4": "#1f6f8b", "W4A8": "#b3412f"}
PARTS = {"vision": "^", "language": "o"}
STYLES = {("joint", None): "-", ("joint", 0): ":", ("greedy", None): "--"}
Row = dict[str, Any]


def rows_of(part: str) -> dict[str, list[Row]]:
    """Name of a model -> its rows, where it was measured."""
    paths = {name: RESULTS / f"{part}_{model}.json" for model, name in MODELS.items()}
    return {name: json.loads(p.read_text())["rows"] for name, p in paths.items() if p.exists()}


def canvas(columns: int, lines: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(max(3.4 * columns, 4.4), height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False)


def save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / name, metadata={"Software": None})


def gains(row: Row) -> np.ndarray:
    """DED of every sample, as a share of the greedy error."""
    return np.array(row["ded"]) / np.array(row["greedy"])


def determination(x: Any, y: Any) -> float:
    """R^2 of a straight line; NaN where either does not vary."""
    return float(np.corrcoef(x, y)[0, 1] ** 2) if np.std(x) and np.std(y) else math.nan


def whole(row: Row, proxy: str, chosen: bool) -> tuple[float, float]:
    """Means over samples that were searched on, or over the others: proxy and DED."""
    which = np.array(row["searched"]) == chosen
    return float(np.mean(np.array(row[proxy])[which])), float(np.mean(gains(row)[which]))


def pairs() -> None:
    """Figure 2 (entropy) and table 5 (error of the start): single samples, and means of pairs."""
    models = rows_of("pairs")
    figure, axes = canvas(len(models), 2, 5.6)
    for column, (name, rows) in enumerate(models.items()):
        labels = {"entropy": "D(k, k+1), nats", "start": "error of the L_p start, %"}
        for line, (proxy, label) in enumerate(labels.items()):
            percent = 100 if proxy == "start" else 1
            panel = axes[line, column]
            for row in rows:
                style = {"color": COLOURS[row["ranges"]], "marker": PARTS[row["component"]]}
                x = percent * np.array(row[proxy])
                panel.scatter(x, 100 * gains(row), s=3, alpha=0.25, lw=0, **style)
                middle = np.mean(x), 100 * np.mean(gains(row))
                panel.scatter(*middle, s=26, edgecolor="white", lw=0.5, zorder=3, **style)
            panel.set_yscale("symlog", linthresh=5)
            panel.set_yticks([-20, -10, -5, 0, 5, 10, 20], ["-20", "-10", "", "0", "", "10", "20"])
            panel.axhline(0, color="#999999", lw=0.7)
            panel.set_xlabel(label)
            panel.set_title(name if not line else "", fontsize=10)
        for ranges in COLOURS:
            describe(name, ranges, [row for row in rows if row["ranges"] == ranges])
    for panel in axes[:, 0]:
        panel.set_ylabel("DED, % of greedy error")
    for ranges, part in product(("default", "paper"), PARTS):
        style = {"color": COLOURS[ranges], "marker": PARTS[part], "lw": 0}
        axes[0, 0].plot([], [], label=f"{ranges} ranges, {part}", markersize=4, **style)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 if len(models) == 1 else 4,
        frameon=False,
        fontsize=8,
    )
    save(figure, "paper_dependency.png")


def describe(name: str, ranges: str, rows: Sequence[Row]) -> None:
    """Prints a line of the table: how often joint differs, what it gains, and R^2."""
    if not rows:
        return
    moved = [row for row in rows if not row["same"]]
    cells = [name, ranges, f"{len(moved)} of {len(rows)}"]
    cells += [
        f"{100 * fmean(whole(row, 'start', chosen)[1] for row in rows):.2f} %"
        for chosen in (True, False)
    ]
    for proxy in ("entropy", "start"):
        single = [determination(row[proxy], gains(row)) for row in moved]
        cells.append(f"{np.median(single):.2f} ({min(single):.2f}, {max(single):.2f})")
    for proxy in ("entropy", "start"):
        seeds = sorted({row["seed"] for row in rows})
        found = [
            np.array([whole(row, proxy, True) for row in rows if row["seed"] == seed])
            for seed in seeds
        ]
        signed = [float(np.corrcoef(*one.T)[0, 1]) for one in found]
        cells.append(", ".join(f"{value:+.2f}" for value in signed))
    print("|", " | ".join(cells), "|")


def depth() -> None:
    """Figure 3: divergence of answers beside that of depth 1, and layer runs of the search."""
    models = rows_of("depth")
    figure, axes = canvas(len(models), 2, 5.2)
    for column, (name, rows) in enumerate(models.items()):
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            own = [row for row in rows if row["scheme"] == scheme]
            first = {row["seed"]: row for row in own if row["depth"] == 1}
            for (inside, threshold), style in STYLES.items():
                some = [
                    r
                    for r in own
                    if (r["inside"], r["threshold"]) == (inside, threshold) or r["depth"] == 1
                ]
                depths = sorted({row["depth"] for row in some})
                if len(depths) > 1:
                    legend = f"{scheme}, {inside}" + (", h0 = 0" if threshold == 0 else "")
                    curves(axes[:, column], some, first, depths, style, legend)
                for many in depths if len(depths) > 1 else ():
                    describe_depth(name, [r for r in some if r["depth"] == many], first)
        axes[0, column].set_title(name, fontsize=10)
        axes[0, column].set_yscale("log")
        axes[0, column].yaxis.set_major_formatter("{x:.2g}")
        axes[0, column].yaxis.set_minor_formatter("{x:.2g}")
        axes[0, column].axhline(1, color="#999999", lw=0.7)
        axes[1, column].set_xlabel("max_block_depth")
        for panel in axes[:, column]:
            panel.set_xticks(range(1, 6))
    axes[0, 0].set_ylabel("answer KL / that of depth 1")
    axes[1, 0].set_ylabel("layer runs / those of depth 1")
    axes[0, -1].legend(frameon=False, fontsize=8)
    save(figure, "paper_depth.png")


def curves(
    panels: Any,
    rows: Sequence[Row],
    first: dict[int, Row],
    depths: Sequence[int],
    style: str,
    label: str,
) -> None:
    colour = COLOURS[rows[0]["scheme"]]
    for panel, what in zip(panels, ("answers", "layer_runs"), strict=True):
        ratios = [
            [r[what] / first[r["seed"]][what] for r in rows if r["depth"] == d] for d in depths
        ]
        panel.plot(
            depths,
            [math.exp(fmean(map(math.log, r))) for r in ratios],
            style,
            color=colour,
            label=label,
        )
        for d, found in zip(depths, ratios, strict=True):
            panel.scatter([d] * len(found), found, s=10, color=colour, alpha=0.6, lw=0)


def describe_depth(name: str, rows: Sequence[Row], first: dict[int, Row]) -> None:
    """Prints a line of the table; the ratio with a 95 % interval over seeds (t, few of them)."""
    row = rows[0]
    kls = [row["answers"] for row in rows]
    logs = [math.log(row["answers"] / first[row["seed"]]["answers"]) for row in rows]
    cells = [name, row["scheme"], row["inside"], *(str(row[k]) for k in ("depth", "threshold"))]
    cells.append(str(len(rows)))
    cells.append(f"{fmean(kls):.5f} ({min(kls):.5f}, {max(kls):.5f})")
    ratio = f"{math.exp(fmean(logs)):.2f}"
    if row["depth"] > 1 and len(rows) > 1:
        reach = t.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        ratio += f" [{math.exp(fmean(logs) - reach):.2f}, {math.exp(fmean(logs) + reach):.2f}]"
    cells += [ratio, f"{fmean(row['text'] for row in rows):.4f}"]
    gain = [
        1 - j / g
        for row in rows
        for g, j in zip(row["greedy"], row["joint"], strict=True)
        if len(row["blocks"]) != sum(row["blocks"])
    ]
    cells += [f"{fmean(row['layer_runs'] for row in rows):.0f}"]
    cells += [f"{fmean(row['seconds'] for row in rows):.0f}"]
    cells += [f"{100 * max(gain, default=0):.1f} %", str(row["blocks"])]
    print("|", " | ".join(cells), "|")


def main() -> None:
    pairs()
    depth()


if __name__ == "__main__":
    main()
