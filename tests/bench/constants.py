r"""What the constants of calibration are worth: each halved, doubled or switched off.

A constant is measured in the quickest calibration that uses it, beside that calibration as it is.
Divergences are from full precision, in nats a token: answers to test questions, and text that the
model writes. The table tells their ratio to the row as it is, with the same seed's samples.

    PYTHONPATH=tests python tests/bench/constants.py MODEL --data DIR --parts weights \
        --schemes W4A8 W4A4 --seeds 3 --json tests/bench/results/constants_demo.json

Rows of an earlier run with the same `--json` are kept and not measured again; with no `--parts`
they are shown alone, as a table.
"""

import argparse
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any
from unittest import mock

import torch
import transformers
from recipes import Harness
from results_file import options_of_accuracy, rows_of, write
from torch import Tensor
from unseen_models.text import compare_text

import qvlm_hf
from qvlm_hf.calibration.measure.answers import answer_kl
from qvlm_hf.calibration.search import sites
from qvlm_hf.format import grids
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.recipes import typical

QUICK: dict[str, Any] = {
    "num_samples": 32,
    "max_block_depth": 1,
    "guard": False,
    "token_importance": False,
}
Row = dict[str, Any]
Patch = Callable[[], Any]  # makes a context manager


def constant(path: str, value: Any) -> Patch:
    """A module's constant with another value."""
    module, name = path.rsplit(".", 1)
    return lambda: mock.patch.object(importlib.import_module(f"qvlm_hf.{module}"), name, value)


def vector_loss(whole_rows: bool, grouped: Tensor, rounded: Tensor) -> Tensor:
    """VecQ's loss of [O, G, L] weights: direction and length apart; [O, G]."""
    axes = (-2, -1) if whole_rows else (-1,)
    product, own, other = (
        part.sum(axes, keepdim=True)
        for part in (grouped * rounded, grouped.square(), rounded.square())
    )
    tiny = torch.finfo(torch.float32).tiny
    direction = 1 - product / (own * other).clamp(min=tiny).sqrt()
    length = (own.sqrt() - other.sqrt()).square() / own.clamp(min=tiny)
    return (direction + length).squeeze(-1).expand(grouped.shape[:2])


def direction_alone(grouped: Tensor, rounded: Tensor) -> Tensor:
    """1 - cosine of [O, G, L] weights, by group."""
    return 1 - torch.nn.functional.cosine_similarity(grouped, rounded, dim=-1, eps=1e-30)


def by_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """Weight groups' ranges by another loss than L_p."""

    def best_grid(
        grouped: Tensor, scheme: QuantScheme, clip: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        low, high = grids._range(grouped)
        if clip is not None:
            return grids._weight_grid(low * clip, high * clip, scheme)
        best = torch.full_like(low, torch.inf)
        scale, zero = torch.ones_like(low, dtype=torch.bfloat16), torch.zeros_like(low)
        for factor in grids.CLIPS:
            tried_scale, tried_zero = grids._weight_grid(low * factor, high * factor, scheme)
            values = grids._round(grouped, tried_scale, tried_zero, scheme.weight_bits)
            values.sub_(tried_zero.unsqueeze(-1)).mul_(tried_scale.float().unsqueeze(-1))
            found = loss(grouped, values)
            better = found < best
            best = torch.where(better, found, best)
            scale = torch.where(better, tried_scale, scale)
            zero = torch.where(better, tried_zero, zero)
        return scale, zero

    return lambda: mock.patch.object(grids, "_best_grid", best_grid)


@contextmanager
def steered_and_driven() -> Iterator[None]:
    """VecQ's two steps: integers of the best direction, then the scale that fits them best."""
    plain = grids.quantize_weight

    def quantize_weight(
        weight: Tensor, scheme: QuantScheme, clip: Tensor | None = None
    ) -> grids.QuantizedWeight:
        found = plain(weight, scheme, clip)
        if clip is not None:
            return found
        grouped, rounded = (
            grids.grouped_weight(part, scheme) for part in (weight.float(), found.dequantize())
        )
        own = rounded.square().sum(-1)
        factor = torch.where(own > 0, (grouped * rounded).sum(-1) / own, torch.ones_like(own))
        return replace(found, scale=(found.scale.float() * factor).to(torch.bfloat16))

    with by_loss(direction_alone)(), mock.patch.object(sites, "quantize_weight", quantize_weight):
        yield


def clips(step: float, count: int) -> Patch:
    return constant("format.grids.CLIPS", tuple(1 - step * i for i in range(count)))


NORM = "format.grids._NORM"
SEARCH = "calibration.search.joint_search."
GUARD = "calibration.search.sensitivity."
TOKENS = "calibration.measure.importance."
EQUAL = "calibration.transforms.equalization."
VARIANTS: dict[str, dict[str, Patch | Mapping[str, Any]]] = {
    "weights": {
        "no clipping": clips(0, 1),
        "factors down to 0.8": clips(0.04, 6),
        "factors down to 0.2": clips(0.08, 11),
        "factors by 0.02": clips(0.02, 21),
        "L_1.2": constant(NORM, 1.2),
        "L_2": constant(NORM, 2.0),
        "L_4.8": constant(NORM, 4.8),
        "VecQ by group": by_loss(lambda w, q: vector_loss(False, w, q)),
        "VecQ by row": by_loss(lambda w, q: vector_loss(True, w, q)),
        "VecQ in two steps": steered_and_driven,
    },
    "candidates": {
        "one percentile": {"percentiles": (1.0,)},
        "no margins": {"margins": ()},
        "neither": {"percentiles": (1.0,), "margins": ()},
    },
    "equalization": {
        "off": {"equalization": False},
        "alpha 0.18": constant(EQUAL + "_ALPHA", 0.175),
        "alpha 0.5": constant(EQUAL + "_ALPHA", 0.5),
        "alpha 0.7": constant(EQUAL + "_ALPHA", 0.7),
        "limit 2^4": constant(EQUAL + "_MOST", 4.0),
        "limit 2^16": constant(EQUAL + "_MOST", 16.0),
    },
    "compensation": {
        "off": {"weight_rounding": "nearest"},
        "damping 0.0001": constant("calibration.search.gptq._DAMPING", 0.0001),
        "damping 0.005": constant("calibration.search.gptq._DAMPING", 0.005),
        "damping 0.02": constant("calibration.search.gptq._DAMPING", 0.02),
        "damping 0.1": constant("calibration.search.gptq._DAMPING", 0.1),
    },
    "importance": {
        "off": {"token_importance": False},
        "temperature 1": constant(TOKENS + "_TEMPERATURE", 1.0),
        "temperature 1.5": constant(TOKENS + "_TEMPERATURE", 1.5),
        "temperature 6": constant(TOKENS + "_TEMPERATURE", 6.0),
        "1 draw": constant(TOKENS + "DRAWS", 1),
        "4 draws": constant(TOKENS + "DRAWS", 4),
        "no floor": constant(TOKENS + "_FLOOR", 0.0),
        "floor 0.05": constant(TOKENS + "_FLOOR", 0.05),
        "floor 0.2": constant(TOKENS + "_FLOOR", 0.2),
    },
    "guard": {
        "off": {"guard": False},
        "broken at 0.0005": constant(GUARD + "_BROKEN", 5e-4),
        "broken at 0.002": constant(GUARD + "_BROKEN", 2e-3),
        "share 0.05": constant(GUARD + "_MOST_RAISED", 0.05),
        "share 0.2": constant(GUARD + "_MOST_RAISED", 0.2),
        "32 directions": constant(GUARD + "_DIRECTIONS", 32),
        "128 directions": constant(GUARD + "_DIRECTIONS", 128),
    },
    "search": {
        "depth 1": {"max_block_depth": 1},
        "shortlist 1": constant(SEARCH + "_SHORTLIST", 1),
        "shortlist 6": constant(SEARCH + "_SHORTLIST", 6),
        "1 finalist": constant(SEARCH + "_FINALISTS", 1),
        "4 finalists": constant(SEARCH + "_FINALISTS", 4),
        "clear at 0": constant(SEARCH + "_CLEAR", 0.0),
        "clear at 0.005": constant(SEARCH + "_CLEAR", 0.005),
        "clear at 0.02": constant(SEARCH + "_CLEAR", 0.02),
        "nothing is clear": constant(SEARCH + "_CLEAR", 1e9),
        "any gain": constant(SEARCH + "_MIN_GAIN", 0.0),
        "gain 0.0002": constant(SEARCH + "_MIN_GAIN", 2e-4),
        "screened by half": constant("calibration.process.ranks.SCREENED", 2),
        "screened by an eighth": constant("calibration.process.ranks.SCREENED", 8),
    },
}
FIELDS: dict[str, dict[str, Any]] = {
    "weights, nearest": {"weight_rounding": "nearest"},
    "importance": {"token_importance": True},
    "guard": {"guard": True},
    "search": {"max_block_depth": 3, "batch_size": 4},
    "candidates": {"batch_size": 4},
}
PARTS = [*VARIANTS, "weights, nearest"]
AS_IT_IS = "as it is"


def parse() -> argparse.Namespace:
    parser = options_of_accuracy(__doc__)
    parser.add_argument("--parts", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--only", nargs="+", help="variants; else all of the parts")
    parser.add_argument("--schemes", nargs="+", default=["W4A8", "W4A4"])
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON, fields of all")
    parser.add_argument("--passages", type=int, default=0, help="0: text that the model wrote")
    return parser.parse_args()


def measure(harness: Harness, part: str, scheme: str, variant: str, seed: int) -> Row:
    """One calibration: divergences of answers and of text, their geometric means over samples."""
    fields: dict[str, Any] = {**QUICK, **FIELDS.get(part, {}), **harness.fields, "seed": seed}
    fields |= {"dataset": harness.folder / "calibration.jsonl", "processor": harness.processor}
    change = {} if variant == AS_IT_IS else VARIANTS[part.split(",")[0]][variant]
    start = time.process_time()
    with ExitStack() as stack:
        if callable(change):
            stack.enter_context(change())
        else:
            fields |= change
        config = qvlm_hf.QVLMConfig(scheme=scheme, **fields)
        model = harness.load(quantization_config=config)
    row = {"part": part, "scheme": scheme, "variant": variant, "seed": seed}
    row["seconds"] = round(time.process_time() - start, 1)
    for name, full, found in zip(
        ("answers", "text"), harness.reference, harness.look(model), strict=True
    ):
        singly = [answer_kl(one, other) for (one, _), (other, _) in zip(full, found, strict=True)]
        row[name] = {"kl": compare_text(full, found)["kl"], "typical": typical(singly)}
    report = model.hf_quantizer.report
    row["raised"] = [one.site for one in report.lifts]
    row["block errors"] = [
        [block.initial, block.greedy, block.joint]
        for segment in report.segments
        for block in segment.blocks
    ]
    return row


def table(rows: Sequence[Row]) -> str:
    """Divergences as it is; of the others the ratio, the smallest and largest seed in brackets."""
    found = {key(row): row for row in rows}
    lines = [
        "| part | scheme | variant | seeds | KL of answers | its typical sample | KL of text | "
        "its typical sample | seconds |",
        "|" + "---|" * 9,
    ]
    for part, scheme, variant in dict.fromkeys(key(row)[:3] for row in rows):
        seeds = [row["seed"] for row in rows if key(row)[:3] == (part, scheme, variant)]
        some = [found[part, scheme, variant, seed] for seed in seeds]
        cells = []
        for name in ("answers", "text"):
            for kind in ("kl", "typical"):
                values = [row[name][kind] for row in some]
                if variant != AS_IT_IS:
                    plain = [found[part, scheme, AS_IT_IS, seed][name][kind] for seed in seeds]
                    values = [a / b for a, b in zip(values, plain, strict=True)]
                cells.append(shown(values, 5 if variant == AS_IT_IS else 2))
        seconds = fmean(row["seconds"] for row in some)
        head = f"| {part} | {scheme} | {variant} | {len(some)} | "
        lines.append(f"{head}{' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def shown(values: Sequence[float], digits: int) -> str:
    """The mean of divergences, or the geometric mean of ratios, and the range."""
    mean = fmean(values) if digits > 2 else math.exp(fmean(map(math.log, values)))
    spread = f" ({min(values):.{digits}f}, {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["part"], row["scheme"], row["variant"], row["seed"]


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    chosen = {name: vars(options)[name] for name in ("fields", "questions", "passages")}
    rows = rows_of(options.json)
    wanted = [
        {"part": part, "scheme": scheme, "variant": variant, "seed": seed}
        for part in options.parts
        for seed in range(options.seeds)
        for scheme in options.schemes
        for variant in (AS_IT_IS, *(options.only or VARIANTS[part.split(",")[0]]))
    ]
    missing = [row for row in wanted if key(row) not in set(map(key, rows))]
    harness = Harness(options) if missing else None
    for asked in missing:
        assert harness is not None
        row = measure(harness, **asked)
        rows.append(row)
        kls = (f"{row[part][kind]:.5f}" for part in ("answers", "text") for kind in row[part])
        print(*key(row), *kls, f"{row['seconds']:.0f} s", flush=True)
        write(options.json, **chosen, rows=rows)
    print(table(rows))


if __name__ == "__main__":
    main()
