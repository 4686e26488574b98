r"""Fixed recipes beside `recipe="auto"` on any model: answers, text without pictures, seconds.

Divergences are from full precision, in nats a token. Text is what the model writes itself
(`--passages 0`) or prose of scikit-learn's descriptions. Seconds are processor time. `--fields`
sets fields of all, such as those that make a comparison quick. Rows of an earlier run with the same
`--json` are kept and not measured again; with no `--variants` they are shown alone, as a table.

    PYTHONPATH=tests python tests/bench/recipes.py MODEL --data DIR --schemes W4A8 W4A4 --seeds 3 \
        --fields '{"num_samples": 16}' --json tests/bench/results/recipes_demo.json
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from unseen_models.text import compare_text, read_texts, text_logits

import qvlm_hf
from qvlm_hf.bench.machine import device_name
from qvlm_hf.calibration.measure.answers import answer_logits
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.calibration.search import gptq

ROTATED: dict[str, Any] = {"rotation": "hadamard"}
DYNAMIC: dict[str, Any] = {"activation_granularity": "dynamic_token"}
GROUPS: dict[str, Any] = {"activation_granularity": "dynamic_group"}
STATIC: dict[str, Any] = {"rotation": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain rounding": {**DYNAMIC, "dataset": None, "rotation": None},
    "plain rounding, groups": {**GROUPS, "dataset": None, "rotation": None},
    "defaults": {},
    "defaults, whole Hessian": {},
    "auto": {"recipe": "auto"},
    "no rotation": STATIC,
    "rotation": ROTATED,
    "dynamic": {**STATIC, **DYNAMIC},
    "rotation, dynamic": {**ROTATED, **DYNAMIC},
    "groups": {**STATIC, **GROUPS},
    "rotation, groups": {**ROTATED, **GROUPS},
    "no rotation, no equalization": {**STATIC, "equalization": False},
    "rotation, no equalization": {**ROTATED, "equalization": False},
    "rotation, dynamic, no equalization": {**ROTATED, **DYNAMIC, "equalization": False},
    "no importance": {"token_importance": False},
    "written text": {"written_text": True},
    "nearest": {"weight_rounding": "nearest"},
    "no guard": {"guard": False},
}
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--schemes", nargs="+", default=["W4A8", "W4A4"])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON, fields of all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--passages", type=int, default=0, help="0: text that the model wrote")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def patched(variant: str) -> AbstractContextManager[Any]:
    """Correlations of inputs count as the samples show them where the variant says so."""
    if "whole Hessian" not in variant:
        return nullcontext()
    return mock.patch.object(gptq, "agreed_hessian", lambda halves: halves.sum(0))


class Harness:
    """The model in full precision, what it says, and how far others are from that."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.fields = options.model, options.fields
        self.folder = Path(options.data or options.model)
        self.processor = AutoProcessor.from_pretrained(options.model)
        full = self.load()
        samples = load_samples(self.folder / "test.jsonl", num_samples=options.questions)
        self.test = list(batches(samples, self.processor, 8))
        self.texts = read_texts(options.passages, self.processor.tokenizer, full)
        self.reference = self.look(full)

    def load(self, **options: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            self.model, dtype=torch.float32, **options
        )

    def look(self, model: Any) -> list[list[tuple[Tensor, Tensor]]]:
        answers = [
            (logits.float(), labels[labels != -100])
            for batch in self.test
            for logits, labels in zip(answer_logits(model, batch), batch.labels, strict=True)
        ]
        return [answers, text_logits(model, self.texts)]

    def measure(self, scheme: str, variant: str, seed: int) -> Row:
        start = time.process_time()
        fields = {"dataset": self.folder / "calibration.jsonl", "processor": self.processor}
        fields |= {"seed": seed, "recipe": "fixed"} | VARIANTS[variant]
        fields |= (
            {k: v for k, v in self.fields.items() if k not in fields} if fields["dataset"] else {}
        )
        config = qvlm_hf.QVLMConfig(scheme=scheme, **fields)
        with patched(variant):
            model = self.load(quantization_config=config)
        row = {"scheme": scheme, "variant": variant, "seed": seed}
        row["seconds"] = round(time.process_time() - start, 1)
        found = [compare_text(*two) for two in zip(self.reference, self.look(model), strict=True)]
        row |= dict(zip(("answers", "text"), found, strict=True))
        return row | {"recipes": model.hf_quantizer.report.to_dict()["recipes"]}


def table(rows: Sequence[Row]) -> str:
    """Means over seeds, the smallest and the largest in brackets, in Markdown."""

    def shown(some: Sequence[Row], part: str) -> str:
        kls = [row[part]["kl"] for row in some]
        spread = f" ({min(kls):.4f}, {max(kls):.4f})" if len(kls) > 1 else ""
        return f"{sum(kls) / len(kls):.4f}{spread}"

    lines = ["| scheme | recipe | seeds | KL of answers | KL of text | seconds |", "|---|" * 6]
    lines[1] = "|" + "---|" * 6
    for scheme, variant in dict.fromkeys((row["scheme"], row["variant"]) for row in rows):
        some = [row for row in rows if (row["scheme"], row["variant"]) == (scheme, variant)]
        seconds = sum(row["seconds"] for row in some) / len(some)
        kls = " | ".join(shown(some, part) for part in ("answers", "text"))
        lines.append(f"| {scheme} | {variant} | {len(some)} | {kls} | {seconds:.0f} |")
    return "\n".join(lines)


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["scheme"], row["variant"], row["seed"]


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    chosen = {name: vars(options)[name] for name in ("fields", "questions", "passages")}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    wanted = [
        {"scheme": scheme, "variant": variant, "seed": seed}
        for seed in range(options.seeds)
        for scheme in options.schemes
        for variant in options.variants
        if not variant.startswith("plain rounding") or not seed
    ]
    missing = [row for row in wanted if key(row) not in set(map(key, rows))]
    harness = Harness(options) if missing else None
    for asked in missing:
        assert harness is not None
        row = harness.measure(**asked)
        rows.append(row)
        answers, text = (f"{row[part]['kl']:.5f}" for part in ("answers", "text"))
        print(*key(row), f"answers {answers} text {text} {row['seconds']:.0f} s", flush=True)
        for tried in row["recipes"]:
            print("   ", tried, flush=True)
        if options.json:
            result = {**chosen, **machine, "versions": versions, "rows": rows}
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
