r"""Our accuracy beside other quantizers' at equal bits: KL of answers, KL of text, agreement.

    PYTHONPATH=tests python tests/bench/peer_accuracy.py MODEL --data DIR --group 64 \
        --json tests/bench/results/peers_demo.json

Every package runs in a virtual environment of its own, which is made from `peer_workers.PINS` and
deleted afterwards (`--environments DIR` keeps them). Questions and calibration samples go to it as
tensors, its logits come back as a file. Divergences are from full precision, in nats a token.

Packages want inputs in whole groups. They get the model with zero channels added to its MLPs, which
computes the same (the column "same" is its divergence); we get the model as it is, and last groups
that are short. A package that fails, or takes longer than `--limit`, has a row that says so. Rows
of an earlier run with the same `--json` are kept and not measured again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from bench.peer_workers import METHODS, PINS, Method, answers, texts
from bench.results_file import options_of_accuracy, rows_of, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from unseen_models.text import passages

from qvlm_hf.calibration.measure.answers import answer_kl
from qvlm_hf.calibration.measure.written_text import written_text
from qvlm_hf.calibration.samples import Sample, batches, load_samples
from qvlm_hf.quantize import CHECK_SAMPLES

WORKER = Path(__file__).with_name("peer_workers.py")
WRITTEN = 48  # texts that the model writes where no passages are asked for
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = options_of_accuracy(__doc__, seeds=1)
    parser.set_defaults(questions=64)
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--fields", type=json.loads, default={}, help="JSON, of our rows")
    parser.add_argument("--packages", nargs="+", default=["qvlm_hf", *PINS])
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A16", "W4A8", "W4A4"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--passages", type=int, default=0, help="0: text that the model wrote")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one model")
    parser.add_argument("--environments", type=Path, help="kept here, and used again")
    return parser.parse_args()


# ---- what the packages get -----------------------------------------------------------------------


def padded(model: Any, group: int) -> Any:
    """The same function with MLPs of whole groups: channels of zeros are added."""
    config = type(model.config).from_dict(model.config.to_dict())
    for part in (config.get_text_config(), config.vision_config):
        part.intermediate_size = -(-part.intermediate_size // group) * group
    wider = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    own = model.state_dict()
    for name, target in wider.state_dict().items():
        target.zero_()[tuple(slice(length) for length in own[name].shape)] = own[name]
    return wider.eval()


def tensors(samples: Sequence[Sample], processor: Any) -> list[dict[str, Tensor]]:
    """Batches of eight as arguments of a model, with labels."""
    found = batches(samples, processor, 8)
    return [{**batch.inputs, "labels": batch.labels} for batch in found]


def chat(sample: Sample) -> list[dict[str, Any]]:
    """A Transformers chat that names its pictures by file."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": str(Path(part["image"]).resolve())}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in sample.messages
    ]


class Harness:
    """The files that a package reads, and what full precision answers."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.data = Path(options.data or options.model)
        self.processor = AutoProcessor.from_pretrained(options.model)
        full = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
        full.eval()
        padded(full, options.group).save_pretrained(folder / "padded")
        self.processor.save_pretrained(folder / "padded")
        tokenizer = self.processor.tokenizer
        if options.passages:
            rows = [torch.tensor(tokenizer(t)["input_ids"]) for t in passages(options.passages)]
        else:
            written = written_text(full, WRITTEN, seed=1000)
            rows = [ids for batch in written for ids in batch.inputs["input_ids"]]
        samples = load_samples(self.data / "test.jsonl", num_samples=options.questions)
        self.parts = {
            "test": tensors(samples, self.processor),
            "text": [{"input_ids": ids[None]} for ids in rows],
        }
        self.reference = {
            "answers": answers(full, self.parts["test"]),
            "text": texts(full, self.parts["text"]),
        }
        self.words = torch.cat([ids[1:] for ids in rows])

    def write(self, seed: int) -> None:
        """What a package reads: job.json and inputs.safetensors."""
        options = self.options
        # ours keeps CHECK_SAMPLES of them for judging; the others get all for calibration
        count = options.samples + CHECK_SAMPLES
        samples = load_samples(self.data / "calibration.jsonl", num_samples=count, seed=seed)
        parts = {**self.parts, "calibration": tensors(samples, self.processor)}
        named = {
            f"{part}/{index}/{key}": tensor.contiguous()
            for part, found in parts.items()
            for index, batch in enumerate(found)
            for key, tensor in batch.items()
        }
        save_file(named, self.folder / "inputs.safetensors")
        job = {
            "model": str(options.model),
            "padded": str(self.folder / "padded"),
            "data": str(self.data / "calibration.jsonl"),
            "group": options.group,
            "samples": options.samples,
            "seed": seed,
            "fields": options.fields,
            "chats": [chat(sample) for sample in samples],
        }
        (self.folder / "job.json").write_text(json.dumps(job))

    def compare(self, path: Path) -> Row:
        """How far the logits in a file are from full precision."""
        logits = load_file(path)
        row: Row = {}
        for part, reference in self.reference.items():
            agreed = (reference.argmax(-1) == logits[part].argmax(-1)).float().mean().item()
            row[part] = {"kl": answer_kl(reference, logits[part]), "agreement": agreed}
        loss = nn.functional.cross_entropy(logits["text"], self.words)
        row["text"]["perplexity"] = loss.exp().item()
        row["same"] = answer_kl(self.reference["text"], logits["full"])
        return row


# ---- how a package runs --------------------------------------------------------------------------


@contextmanager
def environment(package: str, kept: Path | None) -> Iterator[str]:
    """Python of an environment with the package; our own for our own rows.

    Raises:
        RuntimeError: it cannot be installed.
    """
    if package == "qvlm_hf":
        yield sys.executable
        return
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        folder = (kept or Path(temporary)) / package
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
            install = [str(python), "-m", "pip", "install", "-q", *PINS[package]]
            try:
                for line in run(install, 1200):
                    print(line, end="")
            except RuntimeError:
                shutil.rmtree(folder)
                raise
        yield str(python)


def run(command: Sequence[str], limit: int) -> Iterator[str]:
    """The lines that a command prints, as they come.

    Raises:
        RuntimeError: its last words, where it fails or takes longer than `limit` seconds.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        clock = threading.Timer(limit, process.kill)
        clock.start()
        try:
            assert process.stdout is not None
            yield from process.stdout
            if process.wait():
                if not clock.is_alive():
                    raise RuntimeError(f"took over {limit} s")
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()]
                raise RuntimeError((lines or ["no message"])[-1][:300])
        finally:
            clock.cancel()
            process.kill()


def measure(harness: Harness, names: Sequence[str], seed: int, python: str) -> Iterator[Row]:
    """The methods of one package, in one process; what it leaves out has its last words."""
    options = harness.options
    harness.write(seed)
    missing = dict.fromkeys(names)
    last_words = "no result"
    try:
        command = [python, str(WORKER), str(harness.folder), *names]
        for line in run(command, options.limit * len(names)):
            if not line.startswith('{"method": '):
                continue
            told = json.loads(line)
            name = told["method"]
            del missing[name]
            row = {"scheme": METHODS[name].scheme, "seed": seed, **told}
            path = harness.folder / f"{name}.safetensors"
            if "error" not in told:
                row |= {"bits": bits(METHODS[name], options.group)} | harness.compare(path)
            path.unlink(missing_ok=True)
            yield row
    except RuntimeError as error:
        last_words = str(error)
    for name in missing:
        scheme = METHODS[name].scheme
        yield {"scheme": scheme, "seed": seed, "method": name, "error": last_words}


def bits(method: Method, group: int) -> float:
    """Bits of a weight with its share of a scale; those of a scale per row are left out."""
    size = group if method.group is None else method.group
    return int(method.scheme[1]) + (method.overhead / size if size else 0)


def table(rows: Sequence[Row]) -> str:
    """By scheme and KL, means over seeds, the smallest and the largest in brackets."""

    def shown(some: Sequence[Row], part: str, key: str) -> str:
        values = [row[part][key] for row in some]
        spread = f" ({min(values):.4f}, {max(values):.4f})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.4f}{spread}"

    lines = [
        "| scheme | package | bits | KL of answers | agreement | KL of text | seconds | same |"
    ]
    lines += ["|---" * 8 + "|"]
    names = list(dict.fromkeys(row["method"] for row in rows))
    groups = [[row for row in rows if row["method"] == name] for name in names]
    for some in sorted(
        groups, key=lambda g: (g[0]["scheme"], g[0].get("answers", {}).get("kl", 1e9))
    ):
        scheme, name = some[0]["scheme"], some[0]["method"].replace(f" {some[0]['scheme']}", ":")
        good = [row for row in some if "error" not in row]
        if not good:
            lines.append(f"| {scheme} | {name} | failed: {some[0]['error']} |")
            continue
        cells = [scheme, f"{name} ({good[0]['modules']})", f"{good[0]['bits']:.2f}"]
        cells += [shown(good, "answers", key) for key in ("kl", "agreement")]
        cells += [shown(good, "text", "kl")]
        cells += [f"{sum(row['seconds'] for row in good) / len(good):.0f}"]
        cells += [f"{max(row['same'] for row in good):.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    transformers.utils.logging.disable_progress_bar()
    rows = rows_of(options.json)
    known = {(row["method"], row["seed"]) for row in rows}
    wanted = [
        (name, seed)
        for name, method in METHODS.items()
        for seed in range(options.seeds if method.calibrated else 1)
        if method.package in options.packages and method.scheme in options.schemes
        if (name, seed) not in known
    ]
    keys = ("group", "fields", "samples", "questions", "passages")
    chosen = {key: vars(options)[key] for key in keys}

    def keep(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(options.json, **chosen, rows=rows)

    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        harness = Harness(options, Path(folder)) if wanted else None
        for package in dict.fromkeys(METHODS[name].package for name, _ in wanted):
            assert harness is not None
            own = [each for each in wanted if METHODS[each[0]].package == package]
            try:
                with environment(package, options.environments) as python:
                    for seed in dict.fromkeys(seed for _, seed in own):
                        names = [name for name, its in own if its == seed]
                        for row in measure(harness, names, seed, python):
                            keep(row)
            except RuntimeError as error:  # it cannot be installed
                for name, seed in own:
                    scheme = METHODS[name].scheme
                    keep({"scheme": scheme, "seed": seed, "method": name, "error": str(error)})
    print(table(rows))


if __name__ == "__main__":
    main()
