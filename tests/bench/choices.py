r"""What `recipe="auto"` would take with other constants: judges, texts, samples and standard errors.

Every recipe that a comparison can come to is tried once per seed and number of samples. Then the
comparison is replayed with each constant halved and doubled. A choice counts by what the recipe's
trials lose on test questions and on other texts that the model writes, as a mean over all seeds, in
units of the lowest of all recipes.

    PYTHONPATH=tests python tests/bench/choices.py MODEL --data DIR --scheme W4A4 --seeds 3 \
        --json tests/bench/results/choices_demo.json

Rows of an earlier run with the same `--json` are kept and not measured again.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from judges import Harness

from qvlm_hf import recipes
from qvlm_hf.bench.machine import device_name
from qvlm_hf.calibration.measure.self_check import AnswerComparison
from qvlm_hf.calibration.progress import Steps
from qvlm_hf.calibration.report import RecipeTrial
from qvlm_hf.calibration.samples import batches, by_picture, hold_out, load_samples
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.written_text import written_text
from qvlm_hf.recipes import clearly_above, compare_recipes, plain_rounding, trial, typical

SAMPLES, JUDGES, TEXTS = (16, 32, 8), 128, 32
DEFAULT = {"samples": 16, "judges": 64, "texts": 16, "answers": 1.0, "text": 2.0}
PLAIN = "plain rounding"
CHANGED = {
    "as it is": {},
    **{f"{n} samples": {"samples": n} for n in (8, 32)},
    **{f"{n} judges": {"judges": n} for n in (16, 32, 128)},
    **{f"{n} texts": {"texts": n} for n in (4, 8, 32)},
    **{f"answers: {n} errors": {"answers": n} for n in (0, 0.5, 2)},
    **{f"text: {n} errors": {"text": n} for n in (1, 4, 1e9)},
}
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def recipes_of(settings: CalibrationSettings) -> list[dict[str, Any]]:
    first = recipes._first_recipes(settings, rotatable=True, groups=True)
    return [recipe | {"equalization": on} for recipe in first for on in (True, False)]


def measure(
    harness: Harness, settings: CalibrationSettings, seed: int, missing: Any
) -> Iterator[Row]:
    """Divergences of judges, texts and questions of each missing (recipe, samples) of a seed."""
    everything = load_samples(harness.folder / "calibration.jsonl")
    most, rest = hold_out(everything, max(SAMPLES), seed)
    asked = load_samples(harness.folder / "test.jsonl", num_samples=harness.options.questions)
    others = load_samples(harness.folder / "test.jsonl", num_samples=3 * JUDGES)
    known = {sample.origin for sample in asked}
    rest = [*rest, *(sample for sample in others if sample.origin not in known)][:JUDGES]
    text = AnswerComparison(
        harness.model, written_text(harness.model, TEXTS, seed=seed + 1), held_out=True
    )
    comparisons = [harness.compare(rest), text, *harness.judged]
    for name, samples in missing:
        tried, data = plain_rounding(settings), []
        if name != PLAIN:
            few = most if samples == len(most) else hold_out(most, samples, seed)[0]
            tried = trial(settings, json.loads(name))
            data = list(batches(by_picture(few), harness.processor, 8))
        found = recipes.try_settings(harness.model, tried, data, comparisons)
        row = {"scheme": harness.options.scheme, "seed": seed, "recipe": name, "samples": samples}
        row |= dict(zip(("judges", "texts", "questions", "text"), found, strict=True))
        print(seed, name, samples, *(f"{fmean(values):.5f}" for values in found), flush=True)
        yield row


def choice(
    rows: Mapping[tuple[str, int], Row], settings: CalibrationSettings, given: Mapping[str, Any]
) -> str:
    """The name of the recipe that a comparison of one seed's rows takes."""
    judged: dict[int, list[float]] = {}

    def texts(row: Row) -> list[float]:
        # two batches, of the even and of the odd texts: as many of each
        half = len(row["texts"]) // 2
        return row["texts"][: given["texts"] // 2] + row["texts"][half : half + given["texts"] // 2]

    def look(recipe: Mapping[str, Any]) -> RecipeTrial:
        whole = {"equalization": True, **recipe}
        row = rows[json.dumps(whole), given["samples"]]
        plain = texts(rows[PLAIN, 0])
        found = RecipeTrial(
            fields=whole,
            answer_kl=typical(row["judges"][: given["judges"]]),
            text_kl=typical(texts(row)),
            keeps_text=not clearly_above(texts(row), plain, errors=given["text"]),
        )
        judged[id(found)] = row["judges"][: given["judges"]]
        kept.append(found)  # so that no other trial gets its id
        return found

    def better(one: RecipeTrial, other: RecipeTrial) -> bool:
        return clearly_above(judged[id(other)], judged[id(one)], errors=given["answers"])

    def steps(name: str, total: int) -> Steps:
        return Steps(name, (), total)

    kept: list[RecipeTrial] = []
    trials = compare_recipes(settings, look, better, steps, rotatable=True, groups=True)
    return json.dumps(trials[0].fields)


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    bits, inputs = (int(part) for part in options.scheme[1:].split("A"))
    settings = CalibrationSettings(weight_bits=bits, activation_bits=inputs, recipe="auto")
    every = recipes_of(settings)
    wanted = [(json.dumps(recipe), samples) for samples in options.samples for recipe in every]
    wanted.insert(0, (PLAIN, 0))
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    known = {(row["seed"], row["recipe"], row["samples"]) for row in rows}
    harness = None
    for seed in range(options.seeds):
        missing = [pair for pair in wanted if (seed, *pair) not in known]
        harness = harness or Harness(options) if missing else None
        for row in measure(harness, replace(settings, seed=seed), seed, missing) if missing else ():
            rows.append(row)
            if options.json:
                chosen = {"device": device_name(torch.device("cpu")), "rows": rows}
                options.json.write_text(json.dumps(chosen) + "\n")
    print(table(rows, settings))


def table(rows: Sequence[Row], settings: CalibrationSettings) -> str:
    """What each change takes, in units of the best recipe's divergence."""
    seeds = sorted({row["seed"] for row in rows})
    lost: dict[str, list[float]] = {}
    for name in dict.fromkeys(row["recipe"] for row in rows if row["samples"] == 16):
        some = [row for row in rows if (row["recipe"], row["samples"]) == (name, 16)]
        lost[name] = [fmean(fmean(row[part]) for row in some) for part in ("questions", "text")]
    least = [min(column) for column in zip(*lost.values(), strict=True)]
    lines = ["| constants | answers | text | taken |", "|---|---|---|---|"]
    for name, change in CHANGED.items():
        taken = []
        for seed in seeds:
            own = {(row["recipe"], row["samples"]): row for row in rows if row["seed"] == seed}
            with suppress(KeyError):  # not tried yet
                taken.append(choice(own, settings, {**DEFAULT, **change}))
        if len(taken) < len(seeds):
            continue
        means = [fmean(lost[one][part] for one in taken) / least[part] for part in (0, 1)]
        names = ", ".join(str(list(lost).index(one)) for one in taken)
        lines.append(f"| {name} | {means[0]:.2f} | {means[1]:.2f} | {names} |")
    numbered = [f"{i}: {name} {values}" for i, (name, values) in enumerate(lost.items())]
    return "\n".join([*lines, *numbered])


if __name__ == "__main__":
    main()
