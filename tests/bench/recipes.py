r"""Fixed recipes beside `recipe="auto"` on any model: answers, text without pictures, seconds.

Divergences are from full precision, in nats a token. Text is what the model writes itself
(`--passages 0`) or prose of scikit-learn's descriptions. Seconds are processor time. `--fields`
sets fields of all, such as those that make a comparison quick.

    PYTHONPATH=tests python tests/bench/recipes.py MODEL --data DIR --scheme W4A4 --seeds 3 \
        --fields '{"num_samples": 16}' --json tests/bench/results/recipes.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from unseen_models.text import compare_text, read_texts, text_logits

import qvlm_hf
from qvlm_hf.calibration.measure.answers import answer_logits
from qvlm_hf.calibration.samples import batches, load_samples

ROTATED: dict[str, Any] = {"rotation": "hadamard"}
DYNAMIC: dict[str, Any] = {"activation_granularity": "dynamic_token"}
GROUPS: dict[str, Any] = {"activation_granularity": "dynamic_group"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain rounding": {**DYNAMIC, "dataset": None, "rotation": None},
    "defaults": {},
    "auto": {"recipe": "auto"},
    "no rotation": {"rotation": None},
    "rotation": ROTATED,
    "dynamic": {"rotation": None, **DYNAMIC},
    "rotation, dynamic": {**ROTATED, **DYNAMIC},
    "groups": {"rotation": None, **GROUPS},
    "rotation, groups": {**ROTATED, **GROUPS},
    "no equalization": {"equalization": False},
    "no importance": {"token_importance": False},
    "written text": {"written_text": True},
    "nearest": {"weight_rounding": "nearest"},
    "no guard": {"guard": False},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON, fields of all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--passages", type=int, default=0, help="0: text that the model wrote")
    parser.add_argument("--json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    load = AutoModelForImageTextToText.from_pretrained
    folder = Path(options.data or options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    full = load(options.model, dtype=torch.float32)
    samples = load_samples(folder / "test.jsonl", num_samples=options.questions)
    test = list(batches(samples, processor, 8))
    texts = read_texts(options.passages, processor.tokenizer, full)

    def look(model: Any) -> list[list[tuple[Tensor, Tensor]]]:
        answers = [
            (logits.float(), labels[labels != -100])
            for batch in test
            for logits, labels in zip(answer_logits(model, batch), batch.labels, strict=True)
        ]
        return [answers, text_logits(model, texts)]

    reference, rows = look(full), []
    for variant in options.variants:
        for seed in range(options.seeds if variant != "plain rounding" else 1):
            start = time.process_time()
            fields = {"dataset": folder / "calibration.jsonl", "processor": processor, "seed": seed}
            fields |= VARIANTS[variant]
            fields |= options.fields if fields["dataset"] else {}
            config = qvlm_hf.QVLMConfig(scheme=options.scheme, **fields)
            model = load(options.model, dtype=torch.float32, quantization_config=config)
            seconds = time.process_time() - start
            found = [compare_text(f, n) for f, n in zip(reference, look(model), strict=True)]
            row = {"variant": variant, "seed": seed, "seconds": round(seconds, 1)}
            row |= dict(zip(("answers", "text"), found, strict=True))
            row["recipes"] = model.hf_quantizer.report.to_dict()["recipes"]
            rows.append(row)
            kls = " ".join(f"{part['kl']:.5f}" for part in found)
            print(
                f"{variant}, seed {seed}: KL of answers and text {kls}, {seconds:.0f} s", flush=True
            )
            for tried in row["recipes"]:
                print("   ", tried, flush=True)
    if options.json:
        chosen = {key: vars(options)[key] for key in ("scheme", "fields", "questions", "passages")}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        result = {**chosen, "versions": versions, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
