"""`qvlm evaluate DIR --dataset F [--text F] [--against MODEL]`."""

import argparse
from pathlib import Path

from tqdm import tqdm

from qvlm_hf.calibration.samples import load_samples, longest_sample, without_too_long
from qvlm_hf.cli.loading import check_fits, load_model, load_with_processor, read_config
from qvlm_hf.cli.results import (
    check_result_file,
    evaluation_entry,
    shown_command,
    write_result_file,
)
from qvlm_hf.evaluation import (
    check_answers,
    check_text,
    evaluate,
    evaluate_text,
    format_comparison,
    format_text,
    read_text,
)
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.measurements import check_recordable, record_measurement
from qvlm_hf.hub.saved import REPORT_NAME

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("model", metavar="DIR", help="directory or Hub id of a model, quantized or not")
    questions = "questions with answers: .jsonl, .json, ScienceQA folder or Hub id"
    add("--dataset", required=True, metavar="F", help=questions)
    text = "UTF-8 text without pictures: perplexity of the language alone"
    add("--text", metavar="FILE", help=text)
    against = "model to compare with, on the same questions"
    add("--against", metavar="MODEL", help=against)
    add("--num-samples", type=int, metavar="N", help="questions to ask (default: all)")
    batch = "questions per forward pass (default: 16)"
    add("--batch-size", type=int, default=16, metavar="N", help=batch)
    add("--seed", type=int, default=0, help="of the choice of questions (default: 0)")
    add("--json", metavar="F", help="write the result there as JSON")
    record = "keep the result in DIR: in its report and model card"
    add("--record", action="store_true", help=record)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.json:
        check_result_file(options.json)
    folder = check_recordable(options.model) if options.record else None
    # a wrong name should not wait for the model
    other = None if options.against is None else read_config(options.against)
    if options.text is not None:
        check_text(options.text)
    samples = load_samples(options.dataset, num_samples=options.num_samples, seed=options.seed)
    check_answers(samples)  # one that has none should not wait for the model
    model, processor = load_with_processor(options.model)
    samples = without_too_long(samples, processor, longest_sample(model))
    windows = None if options.text is None else read_text(options.text, processor.tokenizer, model)
    if options.against is not None:
        check_fits(options.against, processor)
    reference = None if options.against is None else load_model(options.against)
    with tqdm(total=len(samples), desc="qvlm evaluate", unit="question", disable=None) as bar:
        result = evaluate(
            model,
            samples,
            processor,
            batch_size=options.batch_size,
            reference=reference,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    is_quantized = getattr(other, "quantization_config", None) is not None
    names = _names(options.model, options.against if is_quantized else None)
    lines, found, text = format_comparison(result, **names), result.to_dict(), None
    if windows is not None:
        shown = tqdm(windows, desc="qvlm evaluate", unit="window of text", disable=None)
        text = evaluate_text(model, shown, reference=reference)
        lines += format_text(text, **names)
        found["text"] = text.to_dict()
    print("\n".join(lines))
    if options.json:
        write_result_file(options.json, found)
    if folder is not None:
        asked = {name: getattr(options, name) for name in ("dataset", "batch_size", "seed")}
        command = shown_command(
            "evaluate",
            folder,
            dataset=options.dataset,
            text=options.text,
            against=options.against,
            num_samples=options.num_samples,
            batch_size=options.batch_size,
            seed=options.seed,
            record=True,
        )
        entry = evaluation_entry(
            result,
            reference=options.against,
            reference_quantized=is_quantized,
            command=command,
            text=None if text is None else (options.text, text),
            **asked,
        )
        record_measurement(folder, evaluation=entry)
        print(f"recorded in {REPORT_NAME} and {CARD_NAME}")
    return 0


def _names(model: str, quantized: str | None) -> dict[str, str]:
    """What the models are called: by their own names; `quantized` is another, if it is that."""
    if quantized is None:
        return {"name": Path(model).name}
    names = {"name": Path(model).name, "reference": Path(quantized).name}
    return names if len({*names.values()}) == 2 else {"name": model, "reference": quantized}
