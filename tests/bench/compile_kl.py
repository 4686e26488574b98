r"""KL of a compiled saved model to the eager one: inductor's defaults beside `ROUND_AS_EAGER`.

    python tests/bench/compile_kl.py DIR... --questions 128 \
        --json tests/bench/results/compile_kl.json
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.samples import collate, load_samples
from qvlm_hf.demo import dataset_path
from qvlm_hf.hf.runtime.compiling import ROUND_AS_EAGER

BATCH = 16
WAYS = {"inductor": {}, "as generate compiles it": dict(ROUND_AS_EAGER)}


class Compiled(nn.Module):
    """The model, with a forward that names `logits_to_keep`, which `answer_logits` looks for."""

    def __init__(self, model: nn.Module, options: dict[str, bool]) -> None:
        super().__init__()
        self.model, self.dtype = model, model.dtype
        self.run = torch.compile(model, options=options)

    def forward(self, *, logits_to_keep: int = 0, **inputs: torch.Tensor):
        return self.run(logits_to_keep=logits_to_keep, **inputs)


def measure(directory: str, questions: int) -> list[dict]:
    """One row per way: KL(eager || compiled) of a question, and questions with the same bits."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.bfloat16)
    samples = load_samples(dataset_path("test"), num_samples=questions, seed=1)
    batches = [
        collate(samples[start : start + BATCH], processor) for start in range(0, questions, BATCH)
    ]
    eager = [row for batch in batches for row in answer_logits(model, batch)]
    rows = []
    for way, options in WAYS.items():
        torch._dynamo.reset()
        compiled = [
            row for batch in batches for row in answer_logits(Compiled(model, options), batch)
        ]
        pairs = list(zip(eager, compiled, strict=True))
        kl = [answer_kl(a, b) for a, b in pairs]
        row = {
            "scheme": model.config.quantization_config.scheme,
            "way": way,
            "kl": mean(kl),
            "highest": max(kl),
            "equal": sum(torch.equal(a, b) for a, b in pairs),
            "other_answers": sum(not torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in pairs),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directories", nargs="+", metavar="DIR", help="saved quantized models of the demo's family"
    )
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        row for directory in options.directories for row in measure(directory, options.questions)
    ]
    if options.json:
        versions = {name: version(name) for name in ("qvlm_hf", "torch", "transformers")}
        result = {"dtype": "bfloat16", "questions": options.questions, "versions": versions}
        options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
