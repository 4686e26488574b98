r"""What few samples tell about recipes: the trials of `recipe="auto"`, judged by many questions.

Every recipe is tried as `auto` tries it, and with error compensation. Its divergences from full
precision (nats a token) are told for the samples that judge it, and for test questions. What should
be chosen by is the mean over questions, with compensation, and over all seeds. An arithmetic and a
geometric mean of the judges compete, from trials with compensation and without: how do they go with
what should be chosen by, and how do two seeds agree?

    PYTHONPATH=tests python tests/bench/judges.py MODEL --data DIR --scheme W4A4 --seeds 3 \
        --json tests/bench/results/judges_demo.json

Rows of an earlier run with the same `--json` are kept and not measured again.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from results_file import options_of_accuracy, rows_of, write
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvlm_hf import QVLMConfig
from qvlm_hf.calibration.measure.self_check import AnswerComparison
from qvlm_hf.calibration.measure.written_text import written_text
from qvlm_hf.calibration.samples import batches, by_picture, hold_out, load_samples
from qvlm_hf.quantize import CHECK_SAMPLES
from qvlm_hf.recipes import plain_rounding, trial_settings, try_settings, typical

PARTS = ("judges", "text of judges", "questions", "text")
RANGES = {None: "searched", "dynamic_token": "per token", "dynamic_group": "per token and group"}
RECIPES: dict[str, dict[str, Any] | None] = {
    "plain rounding": None,
    **{
        f"{'rotation' if rotation else 'no rotation'}, ranges {ranges}": {
            "rotation": rotation,
            "activation_granularity": granularity,
        }
        for rotation, (granularity, ranges) in product((None, "hadamard"), RANGES.items())
    },
}
CALIBRATED = [name for name, recipe in RECIPES.items() if recipe is not None]
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = options_of_accuracy(__doc__)
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument(
        "--samples", type=int, default=80, help="calibrated on 16, judged by others"
    )
    return parser.parse_args()


class Harness:
    """A model with its questions and texts, and the samples of one seed after another."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.data or options.model)
        self.processor = AutoProcessor.from_pretrained(options.model)
        self.model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
        questions = load_samples(self.folder / "test.jsonl", num_samples=options.questions)
        self.judged = [
            self.compare(questions),
            AnswerComparison(self.model, written_text(self.model, 48, seed=1000), held_out=True),
        ]

    def compare(self, samples: Any) -> AnswerComparison:
        data = list(batches(samples, self.processor, 8))
        return AnswerComparison(self.model, data, held_out=True)

    def rows(self, seed: int, names: Sequence[tuple[str, bool]]) -> Any:
        samples = load_samples(
            self.folder / "calibration.jsonl", num_samples=self.options.samples, seed=seed
        )
        chosen, held_out = hold_out(samples, len(samples) - CHECK_SAMPLES, seed)
        few, rest = hold_out(chosen, 16, seed)
        data = list(batches(by_picture(few), self.processor, 8))
        text = AnswerComparison(
            self.model, written_text(self.model, 32, seed=seed + 1), held_out=True
        )
        comparisons = [self.compare([*held_out, *rest]), text, *self.judged]
        config = QVLMConfig(
            scheme=self.options.scheme,
            dataset="x",
            processor=self.processor,
            seed=seed,
            recipe="auto",
        )
        settings = config.settings()
        for name, compensated in names:
            recipe, start = RECIPES[name], time.process_time()
            tried = plain_rounding(settings) if recipe is None else trial_settings(settings, recipe)
            if compensated:
                tried = replace(tried, weight_rounding="gptq")
            found = try_settings(self.model, tried, () if recipe is None else data, comparisons)
            row = {"scheme": self.options.scheme, "seed": seed, "recipe": name}
            row["compensated"] = compensated
            row["seconds"] = round(time.process_time() - start, 1)
            yield row | {
                part: {"mean": sum(kls) / len(kls), "typical": typical(kls)}
                for part, kls in zip(PARTS, found, strict=True)
            }


def summary(rows: Sequence[Row]) -> str:
    """A table of means over seeds, and how well each kind of trial and mean ranks the recipes."""

    def value(key: tuple[str, bool, int], part: str, kind: str) -> float:
        (row,) = (row for row in rows if (row["recipe"], row["compensated"], row["seed"]) == key)
        return float(row[part][kind])

    done = {(row["recipe"], row["compensated"], row["seed"]) for row in rows}
    names = [n for n in CALIBRATED if any((n, False, row["seed"]) in done for row in rows)]
    seeds = {
        compensated: [
            seed
            for seed in sorted({row["seed"] for row in rows})
            if all((name, compensated, seed) in done for name in names)
        ]
        for compensated in (True, False)
    }

    def mean(name: str, part: str) -> float:
        return fmean(value((name, True, seed), part, "mean") for seed in seeds[True])

    lines = ["| recipe, compensated | questions | text |", "|---|---|---|"]
    lines += [
        f"| {name} | {mean(name, 'questions'):.5f} | {mean(name, 'text'):.5f} |" for name in names
    ]
    truth = [mean(name, "questions") for name in names]
    for compensated, kind in product((True, False), ("mean", "typical")):
        found = [
            [math.log(value((name, compensated, seed), "judges", kind)) for name in names]
            for seed in seeds[compensated]
        ]
        with_truth = fmean(np.corrcoef(one, np.log(truth))[0, 1] for one in found)
        of_seeds = [np.corrcoef(*two)[0, 1] for two in combinations(found, 2)] or [math.nan]
        taken = [int(np.argmin(one)) for one in found]
        lines.append(
            f"{'compensated' if compensated else 'nearest'}, {kind} of the judges: correlation with "
            f"the questions {with_truth:.2f}, between seeds {fmean(of_seeds):.2f}, takes "
            f"{[names[i] for i in taken]}: {fmean(truth[i] for i in taken):.5f} of at best "
            f"{min(truth):.5f}"
        )
    return "\n".join(lines)


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    rows = rows_of(options.json)
    known = {(r["scheme"], r["seed"], r["recipe"], r["compensated"]) for r in rows}
    wanted = [("plain rounding", False), *product(CALIBRATED, (True, False))]
    harness: Harness | None = None
    for seed in range(options.seeds):
        if missing := [each for each in wanted if (options.scheme, seed, *each) not in known]:
            harness = harness or Harness(options)
            for row in harness.rows(seed, missing):
                rows.append(row)
                print(row, flush=True)
                write(options.json, rows=rows)
    print(summary([row for row in rows if row["scheme"] == options.scheme]))


if __name__ == "__main__":
    main()
