"""`qvlm demo`: the embedded LLaVA, quantized before your eyes."""

import argparse
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.calibration.samples import Sample, load_samples
from qvlm_hf.cli.ask import answer
from qvlm_hf.cli.loading import add_scheme_arguments, load_model, load_processor, make_config
from qvlm_hf.cli.results import evaluation_entry
from qvlm_hf.cli.story import story
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.evaluation import Evaluation, evaluate
from qvlm_hf.hf.saving import check_output, save_quantized
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.measurements import record_measurement
from qvlm_hf.hub.saved import SavedModel

__all__ = ["add_arguments", "run"]

_BATCH = 16  # questions per forward pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_scheme_arguments(parser)
    add = parser.add_argument
    compare = "also measure plain rounding (--method rtn) on the same questions"
    add("--compare", action="store_true", help=compare)
    output = "where to save the result (default: qvlm-demo)"
    add("--output", default="qvlm-demo", metavar="DIR", help=output)
    questions = "test questions to ask, or all (default: 1000)"
    add("--questions", default="1000", metavar="N", help=questions)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.questions != "all" and not (options.questions.isdigit() and int(options.questions)):
        raise ValueError(f"--questions {options.questions} must be a number of at least 1, or all.")
    check_output(options.output, overwrite=options.overwrite)
    count = None if options.questions == "all" else int(options.questions)
    processor = load_processor(str(model_dir()))
    full = load_model(str(model_dir()), dtype=torch.float32)
    test = load_samples(dataset_path("test"), num_samples=count, seed=0)
    _title("The model")
    parameters = sum(parameter.numel() for parameter in full.parameters())
    print(
        f"{type(full).__name__}, {parameters:,} parameters, trained for this purpose on drawn "
        "pictures with handwritten digits;\n"
        "its norms and MLPs carry the outlier channels that large language models have "
        "(see its README.md)."
    )
    print(f"{len(test)} test questions, for example: {_question(test[0])!r} -> {test[0].answer!r}")

    _title(f"Quantizing to {options.scheme} ({options.method})")
    quantized = _quantize(options, options.method, processor)
    report = quantized.hf_quantizer.report
    for line in story(report):
        print(line)
    path = save_quantized(
        quantized, processor, options.output, report=report, overwrite=options.overwrite
    )

    _title("Bytes of the saved tensors, against float32")
    print(SavedModel(path).sizes(torch.float32))

    _title("Answers")
    reloaded = load_model(str(path))
    base = evaluate(full, test, processor, batch_size=_BATCH, keep_logits=True)

    def measure(model: Any) -> Evaluation:
        return evaluate(model, test, processor, batch_size=_BATCH, reference=base)

    results = {options.method: measure(reloaded)}
    if options.compare and options.method != "rtn":
        results["rtn"] = measure(_quantize(options, "rtn", processor))
    for line in _table(
        base, {f"{options.scheme} {name}": found for name, found in results.items()}
    ):
        print(line)
    entry = evaluation_entry(
        results[options.method],
        dataset=str(dataset_path("test")),
        seed=0,
        batch_size=_BATCH,
        reference=str(model_dir()),
        command=_command(options),
    )
    record_measurement(path, evaluation=entry)
    print(f"\n{_question(test[0])}")
    print(f"  full precision: {answer(full, processor, test[0])}")
    print(f"  quantized:      {answer(reloaded, processor, test[0])}")

    _title("Yours to repeat")
    load = f"AutoModelForImageTextToText.from_pretrained({options.output!r})"
    print(f"files    {shlex.quote(options.output)}")
    print(f"card     {shlex.quote(str(Path(options.output, CARD_NAME)))}")
    print(f"command  {_command(options)}")
    print(f"python   import qvlm_hf; {load}")
    return 0


def _quantize(options: argparse.Namespace, method: str, processor: Any) -> Any:
    options = argparse.Namespace(**(vars(options) | {"method": method}))
    data = {"dataset": str(dataset_path("calibration")), "processor": processor}
    return load_model(str(model_dir()), make_config(options, **data), torch.float32)


def _command(options: argparse.Namespace) -> str:
    names = ["scheme", "method", *(["group_size"] if options.group_size != 128 else [])]
    words = [
        f"--{n.replace('_', '-')} {getattr(options, n)}" for n in (*names, "questions", "seed")
    ]
    return " ".join(["qvlm demo", *words])


def _table(base: Evaluation, rows: Mapping[str, Evaluation]) -> Iterator[str]:
    counts = f"{'right: both':>12}{'only full':>11}{'only this':>11}"
    yield f"{'':<16}{'accuracy':>10}  {'95 % interval':<16}{counts}{'McNemar p':>11}{'KL':>9}"
    yield f"{'full precision':<16}{_accuracy(base)}"
    for name, result in rows.items():
        if (found := result.comparison) is not None:
            same = found.counts
            counts = f"{same.both_right:>12}{same.only_first:>11}{same.only_second:>11}"
            tests = f"{found.p_value:>11.3g}{found.kl:>9.4f}"
            yield f"{name:<16}{_accuracy(result)}{counts}{tests}"


def _accuracy(result: Evaluation) -> str:
    share = result.accuracy
    interval = f"[{100 * share.interval.low:.1f}, {100 * share.interval.high:.1f}]"
    return f"{100 * share.value:>8.1f} %  {interval:<16}"


def _question(sample: Sample) -> str:
    parts = [p for m in sample.messages if m["role"] == "user" for p in m["content"]]
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
