"""`qvlm demo`: the embedded LLaVA, quantized before your eyes."""

import argparse
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.calibration.samples import Sample, load_samples
from qvlm_hf.cli.ask import answer
from qvlm_hf.cli.inspect import saved_footprint
from qvlm_hf.cli.models import add_scheme_arguments, load_model, load_processor, make_config
from qvlm_hf.cli.record import evaluation_entry
from qvlm_hf.cli.story import story
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.evaluation import Evaluation, evaluate
from qvlm_hf.hf.saving import check_output, save_quantized
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.record import record_measurement

__all__ = ["add_arguments", "run"]

_BATCH = 16  # questions per forward pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_scheme_arguments(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also measure plain rounding (--method rtn) on the same questions",
    )
    parser.add_argument(
        "--output",
        default="qvlm-demo",
        metavar="DIR",
        help="where to save the result (default: qvlm-demo)",
    )
    parser.add_argument(
        "--questions",
        default="1000",
        metavar="N",
        help="test questions to ask, or all (default: 1000)",
    )


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
        f"pictures with handwritten digits;"
    )
    print(
        "its norms and MLPs carry the outlier channels that large language models have (see its "
        "README.md)."
    )
    print(f"{len(test)} test questions, for example: {_question(test[0])!r} -> {test[0].answer!r}")

    _title(f"Quantizing to {options.scheme} ({options.method})")
    quantized = _quantize(options, processor)
    report = quantized.hf_quantizer.report
    for line in story(report):
        print(line)
    path = save_quantized(
        quantized, processor, options.output, report=report, overwrite=options.overwrite
    )

    _title("Bytes of the saved tensors, against float32")
    print(saved_footprint(str(path))[1])

    _title("Answers")
    reloaded = load_model(str(path))
    base = evaluate(full, test, processor, batch_size=_BATCH, keep_logits=True)
    rows = [
        (
            f"{options.scheme} {options.method}",
            evaluate(reloaded, test, processor, batch_size=_BATCH, reference=base),
        )
    ]
    if options.compare and options.method != "rtn":
        plain = argparse.Namespace(**{**vars(options), "method": "rtn"})
        rows.append(
            (
                f"{options.scheme} rtn",
                evaluate(
                    _quantize(plain, processor), test, processor, batch_size=_BATCH, reference=base
                ),
            )
        )
    for line in _table(base, rows):
        print(line)
    entry = evaluation_entry(
        rows[0][1],
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
    print(f"files    {_shown(path)}")
    print(f"card     {_shown(path / CARD_NAME)}")
    print(f"command  {_command(options)}")
    print(
        f"python   import qvlm_hf; AutoModelForImageTextToText.from_pretrained({options.output!r})"
    )
    return 0


def _quantize(options: argparse.Namespace, processor: Any) -> Any:
    config = make_config(
        options, search={"dataset": str(dataset_path("calibration")), "processor": processor}
    )
    return load_model(str(model_dir()), config, torch.float32)


def _command(options: argparse.Namespace) -> str:
    grouping = "" if options.group_size == 128 else f" --group-size {options.group_size}"
    return f"qvlm demo --scheme {options.scheme} --method {options.method}{grouping} --questions {options.questions} --seed {options.seed}"


def _table(base: Evaluation, rows: list[tuple[str, Evaluation]]) -> list[str]:
    counts = f"{'right: both':>12}{'only full':>11}{'only this':>11}"
    lines = [f"{'':<16}{'accuracy':>10}  {'95 % interval':<16}{counts}{'McNemar p':>11}{'KL':>9}"]
    lines.append(f"{'full precision':<16}{_accuracy(base)}")
    for name, result in rows:
        found = result.comparison
        if found is not None:
            same = found.counts
            paired = f"{same.both_right:>12}{same.only_first:>11}{same.only_second:>11}"
            lines.append(
                f"{name:<16}{_accuracy(result)}{paired}{found.p_value:>11.3g}{found.kl:>9.4f}"
            )
    return lines


def _accuracy(result: Evaluation) -> str:
    share = result.accuracy
    interval = f"[{100 * share.interval.low:.1f}, {100 * share.interval.high:.1f}]"
    return f"{100 * share.value:>8.1f} %  {interval:<16}"


def _question(sample: Sample) -> str:
    parts = [
        part
        for message in sample.messages
        if message["role"] == "user"
        for part in message["content"]
    ]
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
