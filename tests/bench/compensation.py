r"""Which compensation of weights (GPTQ) overfits: answers and plain text, from few samples.

Only the weights of the language model are rounded, all inputs are in full precision, and every
Hessian is that of the full-precision model. What differs is the Hessian:

    nearest     none: rounded to nearest
    as it is    of the samples
    diagonal    of the samples, off-diagonals times a factor: 0 would be rounding to nearest
    halves      that factor found from the samples: what two halves agree on (the product's)
    text        of the samples and of text that the model wrote, one for every four of them

    PYTHONPATH=tests python tests/bench/compensation.py MODEL --data DIR --bits 4 --samples 16
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from unseen_models.text import compare_text, read_texts, text_logits

from qvlm_hf.calibration.layers import run_model
from qvlm_hf.calibration.measure.answers import answer_logits
from qvlm_hf.calibration.measure.written_text import text_rows, written_text
from qvlm_hf.calibration.samples import Batch, batches, load_samples
from qvlm_hf.calibration.search.gptq import agreed_hessian, gptq_round
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.grids import quantize_weight
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import Site, resolve

VARIANTS = ("nearest", "as it is", "diagonal .9", "diagonal .5", "halves", "text", "text, halves")
Hessians = dict[str, Tensor]


def hessians(model: nn.Module, sites: Sequence[Site], data: Sequence[Batch]) -> Hessians:
    """Site -> sum of x x^T over the tokens of the batches."""
    sums: Hessians = {}

    def add(site: Site, x: Tensor, batch: Batch) -> None:
        x = x[batch.inputs["attention_mask"].bool()].float()
        sums.setdefault(site.name, x.new_zeros(x.shape[-1], x.shape[-1])).addmm_(x.T, x)

    for batch in data:
        hooks = [
            site.linears[0].register_forward_pre_hook(
                lambda _, args, site=site, batch=batch: add(site, args[0], batch)
            )
            for site in sites
        ]
        with torch.no_grad():
            run_model(model, batch)
        for hook in hooks:
            hook.remove()
    return sums


def shrunk(hessian: Tensor, factor: float) -> Tensor:
    """Off-diagonals times `factor`."""
    return hessian * factor + torch.diag(torch.diagonal(hessian) * (1 - factor))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--passages", type=int, default=6, help="0: text that the model wrote")
    parser.add_argument("--only", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json")
    return parser.parse_args()


def hessian_of(variant: str, chats: Sequence[Tensor], text: Tensor) -> Tensor | None:
    """The Hessian of a site: `chats` of the even and the odd samples, `text` of written text."""
    both = chats[0] + chats[1]
    found: dict[str, Tensor | None] = {"nearest": None, "as it is": both, "text": both + text}
    if variant.startswith("diagonal"):
        return shrunk(both, float(variant.split()[1]))
    if variant == "halves":
        return agreed_hessian(torch.stack(list(chats)))
    if variant == "text, halves":
        return agreed_hessian(torch.stack([both, text]))
    return found[variant]


def rounded(weight: Tensor, hessian: Tensor | None, scheme: QuantScheme) -> Tensor:
    start = quantize_weight(weight, scheme)
    if hessian is None:
        return start.dequantize()
    return gptq_round(weight, hessian, start, scheme.weight_bits).dequantize()


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(options.data or options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    scheme = CalibrationSettings(weight_bits=options.bits, activation_bits=16).module_scheme("none")
    language = next(s for s in resolve(model) if s.component == "language")
    sites = [site for layer in language.layers for site in layer.sites]
    weights = {site: [linear.weight.detach().clone() for linear in site.linears] for site in sites}

    def read(name: str, count: int, seed: int, part: slice = slice(None)) -> list[Batch]:
        found = load_samples(folder / f"{name}.jsonl", num_samples=count, seed=seed)
        return list(batches(found[part], processor, 8))

    test = read("test", options.questions, 0)
    prose = read_texts(options.passages, processor.tokenizer, model)

    def look() -> list[list[tuple[Tensor, Tensor]]]:
        answers = []
        for batch in test:
            for row, logits in enumerate(answer_logits(model, batch)):
                answers.append((logits.float(), batch.labels[row][batch.labels[row] != -100]))
        return [answers, text_logits(model, prose)]

    full, rows = look(), []
    for seed in range(options.seeds):
        parts = (slice(i, None, 2) for i in (0, 1))
        data = [read("calibration", options.samples, seed, part) for part in parts]
        halves = [hessians(model, sites, half) for half in data]
        written = hessians(model, sites, written_text(model, text_rows(options.samples), seed=seed))
        for variant in options.only:
            for site in sites:
                chats = [half[site.name] for half in halves]
                hessian = hessian_of(variant, chats, written[site.name])
                for linear, weight in zip(site.linears, weights[site], strict=True):
                    linear.weight.data = rounded(weight, hessian, scheme)
            answers, text = (compare_text(f, n) for f, n in zip(full, look(), strict=True))
            rows.append({"variant": variant, "seed": seed, "answers": answers, "text": text})
            print(variant, seed, *(f"{answers['kl']:.5f} {text['kl']:.5f}".split()), flush=True)
        for site in sites:
            for linear, weight in zip(site.linears, weights[site], strict=True):
                linear.weight.data = weight.clone()
    if options.json:
        chosen = {key: vars(options)[key] for key in ("bits", "samples", "questions", "passages")}
        Path(options.json).write_text(json.dumps({**chosen, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
