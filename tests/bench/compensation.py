r"""Which compensation of weights (GPTQ) overfits: answers and plain text, from few samples.

Only the weights of the language model are rounded, all inputs are in full precision, and every
Hessian is that of the full-precision model. What differs is the Hessian:

    nearest     none: rounded to nearest
    as it is    of the samples
    diagonal    of the samples, off-diagonals times a factor: 0 would be rounding to nearest
    halves      that factor found from the samples: what one half's correlations say of the other's
    text        of the samples and of as much text that the model wrote

    PYTHONPATH=tests python tests/bench/compensation.py MODEL --data DIR --bits 4 --samples 16
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from unseen_models.text import compare_text, passages, text_logits

from qvlm_hf.calibration.layers import run_model
from qvlm_hf.calibration.measure.answers import answer_logits
from qvlm_hf.calibration.recipes import written_text
from qvlm_hf.calibration.samples import Batch, batches, load_samples
from qvlm_hf.calibration.search.gptq import gptq_round
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.grids import quantize_weight
from qvlm_hf.models.graph import Site, resolve

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


def supported(first: Tensor, second: Tensor) -> float:
    """The factor on the correlations of both halves together that the halves agree on."""
    halves = [correlations(half) for half in (first, second)]
    common = float((halves[0] * halves[1]).sum())
    own = sum(float(half.square().sum()) for half in halves) / 2
    factor = min(1.0, max(0.0, common / own))
    return 2 * factor / (1 + factor)  # both together have half the noise of one


def correlations(hessian: Tensor) -> Tensor:
    scale = torch.diagonal(hessian).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    return (hessian * scale * scale[:, None]).fill_diagonal_(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--passages", type=int, default=6)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    folder = Path(options.data or options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)

    def read(name: str, count: int) -> list[Batch]:
        path = folder / f"{name}.jsonl"
        found = load_samples(path, num_samples=count, seed=options.seed)
        return list(batches(found, processor, 8))

    test, prose = read("test", options.questions), passages(options.passages)

    def look() -> list[list[tuple[Tensor, Tensor]]]:
        answers = []
        for batch in test:
            for row, logits in enumerate(answer_logits(model, batch)):
                answers.append((logits.float(), batch.labels[row][batch.labels[row] != -100]))
        return [answers, text_logits(model, processor.tokenizer, prose)]

    data = read("calibration", options.samples)
    settings = CalibrationSettings(weight_bits=options.bits, activation_bits=16)
    language = next(s for s in resolve(model) if s.component == "language")
    sites = [site for layer in language.layers for site in layer.sites]
    weights = {
        site.name: [linear.weight.detach().clone() for linear in site.linears] for site in sites
    }
    full = look()
    first, second = hessians(model, sites, data[::2]), hessians(model, sites, data[1::2])
    written = hessians(model, sites, written_text(model, options.seed))

    def both(site: str) -> Tensor:
        return first[site] + second[site]

    factors = {site.name: supported(first[site.name], second[site.name]) for site in sites}
    print(
        f"factors of halves: {min(factors.values()):.3f} to {max(factors.values()):.3f}", flush=True
    )
    variants: dict[str, Callable[[str], Tensor | None]] = {
        "nearest": lambda _: None,
        "as it is": both,
        "diagonal .9": lambda site: shrunk(both(site), 0.9),
        "diagonal .5": lambda site: shrunk(both(site), 0.5),
        "halves": lambda site: shrunk(both(site), factors[site]),
        "text": lambda site: both(site) + written[site],
        "text, halves": lambda site: shrunk(
            both(site) + written[site], supported(both(site), written[site])
        ),
    }
    rows = []
    for name, hessian in variants.items():
        if options.only and name not in options.only:
            continue
        for site in sites:
            scheme = settings.module_scheme("none")
            for linear, weight in zip(site.linears, weights[site.name], strict=True):
                start = quantize_weight(weight, scheme)
                h = hessian(site.name)
                rounded = start if h is None else gptq_round(weight, h, start, options.bits)
                linear.weight.data = rounded.dequantize()
        answers, text = (compare_text(f, n) for f, n in zip(full, look(), strict=True))
        rows.append({"variant": name, "answer_kl": answers["kl"], "text": text})
        print(rows[-1], flush=True)
    if options.json:
        chosen = {
            name: value
            for name, value in vars(options).items()
            if name not in ("json", "model", "data")
        }
        Path(options.json).write_text(json.dumps({**chosen, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
