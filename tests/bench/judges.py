r"""What few samples tell about recipes: the trials of `recipe="auto"`, judged by many questions.

Every recipe is tried as `auto` tries it. Its divergences from full precision (nats a token) are
told for the samples that judge it, and for test questions, which are what it should be chosen by.
An arithmetic and a geometric mean over samples compete: how do they go with the mean of the
questions over all seeds, and how do two seeds' judges agree?

    PYTHONPATH=tests python tests/bench/judges.py MODEL --data DIR --scheme W4A4 --seeds 3 \
        --json tests/bench/results/judges_demo.json

Rows of an earlier run with the same `--json` are kept and not measured again.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvlm_hf import QVLMConfig
from qvlm_hf.bench.machine import device_name
from qvlm_hf.calibration.measure.self_check import AnswerComparison
from qvlm_hf.calibration.samples import batches, by_picture, hold_out, load_samples
from qvlm_hf.calibration.written_text import written_text
from qvlm_hf.quantize import CHECK_SAMPLES
from qvlm_hf.recipes import plain_rounding, trial, try_settings, typical

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
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--samples", type=int, default=80, help="calibrated on 16, judged by others"
    )
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--json", type=Path)
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

    def rows(self, seed: int, names: Sequence[str]) -> Any:
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
        for name in names:
            recipe, start = RECIPES[name], time.process_time()
            tried = plain_rounding(settings) if recipe is None else trial(settings, recipe)
            found = try_settings(self.model, tried, () if recipe is None else data, comparisons)
            row = {"scheme": self.options.scheme, "seed": seed, "recipe": name}
            row["seconds"] = round(time.process_time() - start, 1)
            yield row | {
                part: {"mean": sum(kls) / len(kls), "typical": typical(kls)}
                for part, kls in zip(PARTS, found, strict=True)
            }


def summary(rows: Sequence[Row]) -> str:
    """A table of means over seeds, and how well each kind of mean ranks the calibrated recipes."""
    seeds = sorted({row["seed"] for row in rows})
    names = [name for name in RECIPES if sum(row["recipe"] == name for row in rows) == len(seeds)]

    def value(name: str, seed: int, part: str, kind: str) -> float:
        (row,) = (row for row in rows if (row["recipe"], row["seed"]) == (name, seed))
        return float(row[part][kind])

    def mean(name: str, part: str, kind: str) -> float:
        return sum(value(name, seed, part, kind) for seed in seeds) / len(seeds)

    lines = ["| recipe | questions | text | judges, typical | seconds |", "|---|---|---|---|---|"]
    for name in names:
        kls = [mean(name, *which) for which in (("questions", "mean"), ("text", "mean"))]
        seconds = [row["seconds"] for row in rows if row["recipe"] == name]
        judged = " ".join(f"{value(name, seed, 'judges', 'typical'):.5f}" for seed in seeds)
        lines.append(
            f"| {name} | {kls[0]:.5f} | {kls[1]:.5f} | {judged} | {sum(seconds) / len(seeds):.1f} |"
        )
    tried = [name for name in names if RECIPES[name] is not None]
    truth = [mean(name, "questions", "mean") for name in tried]
    for kind in ("mean", "typical"):
        found = [[math.log(value(name, s, "judges", kind)) for name in tried] for s in seeds]
        with_truth = [np.corrcoef(one, np.log(truth))[0, 1] for one in found]
        of_seeds = [np.corrcoef(*two)[0, 1] for two in combinations(found, 2)] or [math.nan]
        taken = [int(np.argmin(one)) for one in found]
        lines.append(
            f"{kind} of the judges: correlation with the questions {np.mean(with_truth):.2f}, "
            f"between seeds {np.mean(of_seeds):.2f}, takes {sorted({tried[i] for i in taken})}: "
            f"{np.mean([truth[i] for i in taken]):.5f} of at best {min(truth):.5f}"
        )
    return "\n".join(lines)


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    known = {(row["scheme"], row["seed"], row["recipe"]) for row in rows}
    harness: Harness | None = None
    for seed in range(options.seeds):
        if names := [name for name in RECIPES if (options.scheme, seed, name) not in known]:
            harness = harness or Harness(options)
            for row in harness.rows(seed, names):
                rows.append(row)
                print(row, flush=True)
                if options.json:
                    versions = {
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    }
                    machine = {"device": device_name(torch.device("cpu"))}
                    result = {**machine, "versions": versions, "rows": rows}
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(summary([row for row in rows if row["scheme"] == options.scheme]))


if __name__ == "__main__":
    main()
