r"""The paper's claims on any model: its figure 2 with table 5, and its figure 3.

`pairs`: every two consecutive layers are a block. Discretization error difference (DED) is the
error of its output after the greedy search (eq. 2) less that after the joint one (eq. 3). Does the
entropy D(k, k+1) of a sample tell its DED (figure 2), and does it so better than the error of plain
L_p ranges (table 5)?

`depth`: divergence of answers, and the search's work, by `max_block_depth` (figure 3). Blocks are
searched jointly or, as a control, greedily inside. A threshold of 0 makes every block as deep as it
may be; null is the default, the mean D of the segment.

    PYTHONPATH=tests python tests/bench/paper_figures.py pairs MODEL --data DIR --seeds 0 1 2 \
        --json tests/bench/results/pairs_demo.json
    PYTHONPATH=tests python tests/bench/paper_figures.py depth MODEL --data DIR --seeds 0 1 2 \
        --json tests/bench/results/depth_demo.json

Rows of an earlier run with the same `--json` are kept and not measured again.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from bench.recipes import Harness
from bench.results_file import machine, rows_of
from torch import Tensor
from unseen_models.text import compare_text

from qvlm_hf import QVLMConfig
from qvlm_hf.calibration.layers import (
    LayerInput,
    capture_inputs,
    live_layers,
    run_layer,
    valid_tokens,
    working_precision,
)
from qvlm_hf.calibration.measure.entropy import DependencyHistogram, value_bounds
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import batches, by_picture, hold_out, load_samples
from qvlm_hf.calibration.search import segments
from qvlm_hf.calibration.search.joint_search import BlockSearch, Choice, SearchResult, search_block
from qvlm_hf.calibration.search.ranges import held_out_half, initialize_sites
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import Segment
from qvlm_hf.quantize import transformed

Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("pairs", "depth"))
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--schemes", nargs="+", default=["W4A4", "W4A8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32, help="calibrated on")
    parser.add_argument("--others", type=int, default=32, help="pairs: samples not searched on")
    parser.add_argument("--every", type=int, default=1, help="pairs: of how many layers the first")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--thresholds", type=json.loads, nargs="+", default=[None], help="h0")
    parser.add_argument("--inside", nargs="+", default=["joint"], help="depth: or greedy")
    parser.add_argument("--ranges", nargs="+", default=["default", "paper"], help="pairs: of sites")
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON, fields of all")
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--passages", type=int, default=0, help="0: text that the model wrote")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


class Depths(Harness):
    """Whole calibrations by depth of the blocks."""

    def cases(self, options: argparse.Namespace) -> list[Row]:
        return [
            {"inside": inside, "threshold": threshold, "depth": depth}
            for inside in options.inside
            for threshold in options.thresholds
            for depth in options.depths
        ]

    def rows(
        self,
        options: argparse.Namespace,
        *,
        scheme: str,
        seed: int,
        inside: str,
        threshold: float | None,
        depth: int,
    ) -> Iterator[Row]:
        start = time.process_time()
        config = QVLMConfig(
            scheme=scheme,
            dataset=self.folder / "calibration.jsonl",
            processor=self.processor,
            num_samples=options.samples,
            seed=seed,
            max_block_depth=depth,
            entropy_threshold=threshold,
            **({"recipe": "fixed"} | self.fields),
        )
        search = search_block if inside == "joint" else greedily
        with mock.patch.object(segments, "search_block", search):
            model = self.load(quantization_config=config)
        seconds, report = time.process_time() - start, model.hf_quantizer.report
        blocks = [block for segment in report.segments for block in segment.blocks]
        answers, text = map(compare_text, self.reference, self.look(model))
        yield {
            "blocks": [len(block.layers) for block in blocks],
            "greedy": [block.greedy for block in blocks],
            "joint": [block.joint for block in blocks],
            "layer_runs": sum(block.evaluations for block in blocks),
            "seconds": round(seconds, 1),
            "search_seconds": round(report.seconds["search"], 1),
            "answers": answers["kl"],
            "text": text["kl"],
        }


class Pairs(Harness):
    """Blocks of two layers: entropies and errors of single samples."""

    def cases(self, options: argparse.Namespace) -> list[Row]:
        return [{"ranges": ranges} for ranges in options.ranges]

    def rows(
        self, options: argparse.Namespace, scheme: str, seed: int, ranges: str
    ) -> Iterator[Row]:
        samples = load_samples(self.folder / "calibration.jsonl", seed=seed)
        few, rest = hold_out(samples, options.samples, seed)
        alone = list(batches([*few, *rest[: options.others]], self.processor, 1))
        searched = {sample.origin for sample in few}
        config = {"default": QVLMConfig, "paper": QVLMConfig.paper}[ranges](
            scheme=scheme,
            dataset="x",
            processor=self.processor,
            seed=seed,
            **({"recipe": "fixed"} | self.fields),
        )
        model = self.load()
        settings = config.settings().for_model(rotatable=not why_not_rotatable(model))
        calibration = Calibration(
            model=model,
            settings=settings,
            segments=resolve_segments(model, settings),
            # one batch to take ranges from and one to search on, which nothing screens
            data=list(batches(by_picture(few), self.processor, -(-len(few) // 2))),
        )
        with transformed(calibration):
            whole = calibration.segments
            calibration.inputs |= capture_inputs(model, calibration.data, whole)
            inputs = capture_inputs(model, alone, whole)
            for segment in whole:
                entries = inputs[segment.name]
                which = [int(entry.origins[0] in searched) for entry in entries]
                for row in self.pairs(calibration, segment, entries, options.every):
                    yield {"component": segment.component, "searched": which} | row

    def pairs(
        self, calibration: Calibration, segment: Segment, alone: Sequence[LayerInput], every: int
    ) -> Iterator[Row]:
        """Per pair of layers, fed with full precision, what every sample of `alone` shows."""
        inputs, live = calibration.inputs[segment.name], live_layers(segment)
        hidden, single = ([entry.hidden for entry in entries] for entries in (inputs, alone))
        for place, layers in enumerate(pairwise(live)):
            modules = [layer.module for layer in layers]
            with working_precision(layers, inputs):
                targets = outputs(modules, inputs, hidden)
                of_single = outputs(modules, alone, single)
                if place % every == 0:
                    sites = initialize_sites(calibration, segment.component, layers, inputs, hidden)
                    start: Choice = tuple(tuple(site.choice for site in row) for row in sites)
                    halves = map(held_out_half, (inputs, hidden))
                    block = BlockSearch(modules, sites, *halves, [*map(held_out_half, targets)])
                    with installed(site for row in sites for site in row):
                        choices = (start, greedy(block), search_block(block).choice)
                        errors = [
                            [
                                BlockSearch(
                                    modules, sites, [entry], [h], [[t[i]] for t in of_single]
                                ).evaluate(choice, [h], 0)
                                for choice in choices
                            ]
                            for i, (entry, h) in enumerate(zip(alone, single, strict=True))
                        ]
                    yield {
                        "pair": place,
                        "same": choices[1] == choices[2],
                        "entropy": rounded(entropies(calibration, segment, targets, of_single)),
                        "start": rounded(start for start, _, _ in errors),
                        "greedy": rounded(error for _, error, _ in errors),
                        "ded": rounded(error - joint for _, error, joint in errors),
                    }
            hidden, single = targets[0], of_single[0]


def entropies(
    calibration: Calibration,
    segment: Segment,
    both: Sequence[Sequence[Tensor]],
    alone: Sequence[Sequence[Tensor]],
) -> Iterator[float]:
    """D(k, k+1) of every sample (eq. 4), on the grids that all calibration samples give."""
    position = calibration.per_position(segment)
    entries = calibration.inputs[segment.name]
    bounds = [
        value_bounds(
            [
                h if position else valid_tokens(h, entry.valid)
                for h, entry in zip(hidden, entries, strict=True)
            ],
            position,
        )
        for hidden in both
    ]
    for first, second in zip(*alone, strict=True):
        histogram = DependencyHistogram(
            *bounds, levels=calibration.settings.entropy_levels, elements=first.numel()
        )
        histogram.update(first, second)
        yield float(histogram.entropy())


def rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def outputs(
    modules: Sequence[torch.nn.Module], inputs: Sequence[LayerInput], hidden: list[Tensor]
) -> list[list[Tensor]]:
    """What leaves every one of consecutive layers in full precision."""
    found = []
    for module in modules:
        hidden = run_layer(module, inputs, hidden)
        found.append(hidden)
    return found


def greedy(block: BlockSearch) -> Choice:
    """Every layer by its own output (eq. 2)."""
    hidden, choice = list(block.hidden), []
    for layer in range(len(block.layers)):
        choice.append(search_block(block.sub_block(layer, hidden)).choice[0])
        hidden = block.run(layer, choice[-1], hidden)
    return tuple(choice)


def greedily(block: BlockSearch) -> SearchResult:
    """What `search_block` finds, with the choice of eq. 2 in its place."""
    found = search_block(block)
    return replace(found, choice=greedy(block), joint=found.greedy)


def write(path: Path, facts: Row, rows: Sequence[Row]) -> None:
    """A line per row: lists of a hundred numbers would be a hundred lines."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(facts)[:-1]},\n"rows": [\n{lines}\n]}}\n')


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    chosen = {
        name: value
        for name, value in vars(options).items()
        if name not in ("json", "model", "data", "seeds", "schemes")
    }
    rows = rows_of(options.json)
    harness = (Pairs if options.part == "pairs" else Depths)(options)
    for seed, scheme in product(options.seeds, options.schemes):
        for case in harness.cases(options):
            asked = {"scheme": scheme, "seed": seed} | case
            if any(all(row[name] == value for name, value in asked.items()) for row in rows):
                continue
            for row in harness.rows(options, **asked):
                rows.append(asked | row)
                print(rows[-1], flush=True)
            write(options.json, {**chosen, **machine()}, rows)


if __name__ == "__main__":
    main()
