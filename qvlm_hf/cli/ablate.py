"""`qvlm ablate MODEL --dataset F --questions F --output DIR`: what each part of the method gives.

Every cell (scheme, line, seed) runs in a process of its own, so that its peak memory is its own and
a crash costs one cell. After each the tables are written anew; a second run goes on where the first
stopped.
"""

import argparse
import hashlib
import json
import resource
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qvlm_hf.calibration.options import SWITCHED_OFF
from qvlm_hf.calibration.record.provenance import versions
from qvlm_hf.calibration.samples import (
    Sample,
    fingerprint,
    hold_out,
    load_samples,
    longest_sample,
    without_too_long,
)
from qvlm_hf.cli.ablation_tables import check_ablation, read_ablation, write_ablation
from qvlm_hf.cli.loading import (
    check_fits,
    load_model,
    load_processor,
    read_full_precision,
    silence,
)
from qvlm_hf.errors import first_line
from qvlm_hf.evaluation import check_answers, check_text, evaluate, evaluate_text, read_text
from qvlm_hf.format.scheme import parse_scheme
from qvlm_hf.hf.config import PAPER, QVLMConfig
from qvlm_hf.hub.saved import SavedModel

__all__ = ["LINES", "add_arguments", "run"]

_SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A4")
_BARE: dict[str, Any] = {**SWITCHED_OFF, "rotation": None}
_ADDED: dict[str, dict[str, Any]] = {
    "dependency search": {},
    "+ VEO": {"optimize_vision": True},
    "+ GPTQ": {"weight_rounding": "gptq"},
    "+ guard": {"guard": True},
    "+ token importance": {"token_importance": True},
    "+ equalization": {"equalization": True},
    "+ rotation": {"rotation": "hadamard"},
}


def _lines() -> dict[str, dict[str, Any]]:
    """Line -> fields of its `QVLMConfig`; one with a plus adds to the one above it."""
    lines: dict[str, dict[str, Any]] = {"greedy": _BARE | {"max_block_depth": 1}}
    fields = _BARE
    for name, added in _ADDED.items():
        fields = fields | added
        lines[name] = fields
    return {"RTN": {}, "paper": PAPER, **lines, "fixed": {"recipe": "fixed"}, "auto": {}}


LINES = _lines()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or Hub id of the full-precision model")
    add("--dataset", required=True, metavar="F", help="calibration samples")
    judge = "other samples, that judge (default: a quarter of the dataset, not calibrated on)"
    add("--questions", metavar="F", help=judge)
    add("--text", metavar="FILE", help="UTF-8 text without pictures, that judges too")
    add("--output", required=True, metavar="DIR", help="where the tables and the picture go")
    names = "of the table (default: all)"
    add("--schemes", nargs="+", default=list(_SCHEMES), metavar="S", help=f"schemes {names}")
    lines = f"lines {names}: {', '.join(LINES)}"
    add("--lines", nargs="+", default=list(LINES), choices=list(LINES), metavar="L", help=lines)
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    add("--num-samples", type=int, default=64, metavar="N", help="to calibrate on (default: 64)")
    asked = "questions to ask (default: all)"
    add("--num-questions", type=int, metavar="N", help=asked)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    for scheme in options.schemes:
        parse_scheme(scheme)
    QVLMConfig(num_samples=options.num_samples)  # refuses a wrong number
    if options.seeds < 1:
        raise ValueError(f"seeds={options.seeds} is below 1: give the number of seeds.")
    if options.text is not None:
        check_text(options.text)
    config = read_full_precision(options.model)
    processor = load_processor(options.model)
    check_fits(options.model, processor)
    samples, questions = _samples(vars(options))
    check_answers(questions)
    setting = {
        "model": Path(options.model).name,
        "weights": _version(options.model, config),
        "calibration": fingerprint(samples),
        "num_samples": options.num_samples,
        "questions": fingerprint(questions),
        "text": None if options.text is None else _digest([Path(options.text)]),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    folder = Path(options.output)
    check_ablation(folder, setting)
    rows = read_ablation(folder)
    done = {(row["scheme"], row["line"], row["seed"]) for row in rows}
    cells = [
        (scheme, line, seed)
        for scheme in dict.fromkeys(options.schemes)
        for line in dict.fromkeys(options.lines)
        for seed in range(1 if line == "RTN" else options.seeds)
        if (scheme, line, seed) not in done
    ]
    given = {
        name: getattr(options, name)
        for name in ("model", "dataset", "questions", "text", "num_samples", "num_questions")
    }
    for cell in tqdm(cells, desc="qvlm ablate", unit="cell", disable=None):
        names = dict(zip(("scheme", "line", "seed"), cell, strict=True))
        rows.append(names | _in_a_process(given | names, setting["threads"]))
        write_ablation(folder, setting, rows)
        print(json.dumps(rows[-1]), flush=True)
    write_ablation(folder, setting, rows)
    failed = sum("error" in row for row in rows)
    print(f"{len(rows) - failed} cells measured, {failed} failed: {folder / 'ablation.md'}")
    return 1 if failed else 0


def _samples(given: Mapping[str, Any]) -> tuple[list[Sample], list[Sample]]:
    """Those to calibrate on, and those that judge.

    Raises:
        ValueError: one data set is given, and it is too small to judge as well.
    """
    samples, asked = load_samples(given["dataset"]), given["num_questions"]
    if given["questions"] is not None:
        return samples, load_samples(given["questions"], num_samples=asked)
    asked = max(1, len(samples) // 4) if asked is None else asked
    if not 0 < asked < len(samples):
        raise ValueError(
            f"--dataset has {len(samples)} samples, of which {asked} cannot judge: give other ones "
            f"as --questions."
        )
    return hold_out(samples, len(samples) - asked, 0)


def _version(model: str, config: Any) -> str:
    """Which weights a name stands for: the commit on the Hub, or a digest of the directory's."""
    if not Path(model).is_dir():
        return str(config._commit_hash)
    return _digest(SavedModel(model).files)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _in_a_process(cell: dict[str, Any], threads: int) -> dict[str, Any]:
    """The figures of a cell; under "error" why there are none. Ctrl-C ends the process silently."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_on_interrupt) as pool:
        try:
            return pool.submit(_measure, cell, threads).result()
        except KeyboardInterrupt:
            for process in active_children():
                process.terminate()
            raise
        except BrokenProcessPool:
            return {"error": "the process was killed: out of memory?"}
        except Exception as error:
            return {"error": first_line(error)}


def _end_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _measure(cell: dict[str, Any], threads: int) -> dict[str, Any]:
    """Quantizes, then asks the questions of both models; runs in a process of its own."""
    torch.set_num_threads(threads)
    silence()
    processor = load_processor(cell["model"])
    if cell["questions"] is None:
        cell["dataset"], cell["questions"] = _samples(cell)
    config = QVLMConfig(scheme=cell["scheme"], seed=cell["seed"], **_fields(cell, processor))
    start = time.process_time()
    model = load_model(cell["model"], config, "float32")
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    full = load_model(cell["model"], None, "float32")
    questions = load_samples(cell["questions"], num_samples=cell["num_questions"])
    questions = without_too_long(questions, processor, longest_sample(model))
    found = evaluate(model, questions, processor, reference=full)
    figures: dict[str, Any] = {
        "accuracy": found.accuracy.value,
        "low": found.accuracy.interval.low,
        "high": found.accuracy.interval.high,
        "cpu_seconds": round(seconds, 1),
        "peak_mib": round(peak / (1024 if sys.platform == "linux" else 1024**2)),
    }
    if (compared := found.comparison) is not None:
        figures |= {"full_accuracy": compared.reference_accuracy.value, "answer_kl": compared.kl}
    if cell["text"] is not None:
        text = evaluate_text(
            model, read_text(cell["text"], processor.tokenizer, model), reference=full
        )
        figures |= {
            "perplexity": text.perplexity,
            "full_perplexity": text.reference_perplexity,
            "text_kl": text.kl,
        }
    return figures


def _fields(cell: dict[str, Any], processor: Any) -> dict[str, Any]:
    rounded = {"weight_rounding": "nearest", "activation_granularity": "dynamic_token"}
    data = {"dataset": cell["dataset"], "processor": processor, "num_samples": cell["num_samples"]}
    fields = rounded if cell["line"] == "RTN" else data | LINES[cell["line"]]
    if parse_scheme(cell["scheme"])[1] == 16:  # floating point inputs have no ranges
        fields = {k: value for k, value in fields.items() if k != "activation_granularity"}
    return fields
