"""`qvlm bench DIR`, `qvlm bench --shape NAME` and `qvlm bench --kernels`: how fast this machine is, beside full precision and others."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from qvlm_hf.bench import KernelRow, measure_kernels
from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.shapes import SHAPES
from qvlm_hf.cli.bench_models import bench_models
from qvlm_hf.cli.record import benchmark_entry, shown_command
from qvlm_hf.cli.result_file import check_result_file, write_result_file
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.contents import REPORT_NAME
from qvlm_hf.hub.record import check_recordable, record_measurement
from qvlm_hf.ops.cpu import kernel_name

__all__ = ["add_arguments", "run"]

# Options of one kind of measurement and what they are if not given; those of the other kind are
# refused.
_KERNELS: dict[str, Any] = {"out_features": 4096, "in_features": 4096, "tokens": [1, 8, 64, 608]}
_MODELS: dict[str, Any] = {
    "against": None, "scheme": None, "lm_head_bits": None, "batch": [1], "prompt_tokens": None, "images": 1, "new_tokens": 32,
    "device": "cpu", "compile": False, "peers": True, "record": False,
}  # fmt: skip
_KERNEL_ROUNDS, _MODEL_ROUNDS = 9, 5
_RECORDED = (
    "batch",
    "prompt_tokens",
    "images",
    "new_tokens",
    "device",
    "rounds",
    "compile",
)  # options that a recorded command repeats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "directory", nargs="?", metavar="DIR", help="time a saved quantized model, end to end"
    )
    parser.add_argument(
        "--shape",
        metavar="NAME",
        help=f"time a model with random weights instead: {', '.join(SHAPES)}",
    )
    parser.add_argument("--kernels", action="store_true", help="time single linear layers instead")
    parser.add_argument(
        "--rounds", type=int, metavar="R", help="turns of every way (default: 5; --kernels: 9)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    models = parser.add_argument_group("models (DIR or --shape)")
    models.add_argument(
        "--against",
        metavar="MODEL",
        help="DIR: the full-precision model (default: DIR dequantized)",
    )
    models.add_argument(
        "--scheme",
        nargs="+",
        metavar="S",
        help="--shape: bits of weights and activations (default: W4A8)",
    )
    models.add_argument(
        "--lm-head-bits",
        type=int,
        choices=(8,),
        help="--shape: quantize the output head too (default: leave it)",
    )
    models.add_argument(
        "--batch", type=int, nargs="+", metavar="B", help="prompts at once (default: 1)"
    )
    models.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="of each prompt (default: those of the pictures and 32 more)",
    )
    models.add_argument("--images", type=int, metavar="N", help="pictures per prompt (default: 1)")
    models.add_argument(
        "--new-tokens", type=int, metavar="N", help="generated per prompt (default: 32)"
    )
    models.add_argument("--device", choices=("cpu", "cuda"), help="where (default: cpu)")
    models.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="decode with torch.compile and a static cache, every way",
    )
    models.add_argument(
        "--no-peers",
        dest="peers",
        action="store_false",
        default=None,
        help="leave out bitsandbytes, torchao, gptqmodel",
    )
    models.add_argument(
        "--record",
        action="store_true",
        default=None,
        help="DIR: keep the result there: in its report and model card",
    )
    kernels = parser.add_argument_group("single layers (--kernels)")
    kernels.add_argument(
        "--out-features", type=int, metavar="N", help="outputs of the layer (default: 4096)"
    )
    kernels.add_argument(
        "--in-features",
        type=int,
        metavar="K",
        help="inputs of the layer, a multiple of 128 (default: 4096)",
    )
    kernels.add_argument(
        "--tokens", type=int, nargs="+", metavar="M", help="tokens per call (default: 1 8 64 608)"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if (options.directory is not None) + (options.shape is not None) + options.kernels != 1:
        _wrong_usage("name exactly one of DIR, --shape NAME and --kernels: see qvlm bench --help.")
    defaults, foreign = (_KERNELS, _MODELS) if options.kernels else (_MODELS, _KERNELS)
    _refuse(options, foreign, "--kernels" if not options.kernels else "DIR and --shape")
    if options.directory is None:
        _refuse(options, ("against", "record"), "DIR")
    if options.shape is None:
        _refuse(options, ("scheme", "lm_head_bits"), "--shape")
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("batch", "scheme", "tokens"):
        _refuse_twice(name, getattr(options, name))
    if options.json:
        check_result_file(options.json)
    if options.rounds is None:
        options.rounds = _KERNEL_ROUNDS if options.kernels else _MODEL_ROUNDS
    folder = check_recordable(options.directory) if options.record else None
    result = _bench_kernels(options) if options.kernels else bench_models(options)
    if options.json:
        write_result_file(options.json, result)
    if folder is not None:
        asked = {
            name: getattr(options, name)
            for name in _RECORDED
            if getattr(options, name) != _MODELS.get(name, _MODEL_ROUNDS)
        }
        command = shown_command(
            "bench",
            folder,
            against=options.against,
            **asked,
            no_peers=not options.peers,
            record=True,
        )
        record_measurement(folder, benchmark=benchmark_entry(result, command=command))
        print(f"recorded in {REPORT_NAME} and {CARD_NAME}")
    return 0


def _refuse(options: argparse.Namespace, names: Sequence[str] | dict[str, Any], owner: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            option = "--no-peers" if name == "peers" else f"--{name.replace('_', '-')}"
            _wrong_usage(f"{option} belongs to {owner}: leave it out.")


def _refuse_twice(name: str, values: Sequence[int | str] | None) -> None:
    """Refuses a value that is named twice: its rows could not be told apart."""
    shown = [str(value) for value in values or ()]
    if len({value.upper() for value in shown}) < len(shown):
        raise ValueError(f"--{name} {' '.join(shown)} names a value twice: name each once.")


def _wrong_usage(message: str) -> NoReturn:
    print(f"qvlm: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _bench_kernels(options: argparse.Namespace) -> dict[str, Any]:
    if (
        min(options.out_features, options.in_features, options.rounds - 1, *options.tokens) < 1
        or options.in_features % 128
    ):
        raise ValueError(
            "sizes must be at least 1, --rounds at least 2, and --in-features a multiple of 128."
        )
    device = f"{device_name(torch.device('cpu'))}, kernel: {kernel_name(4096, 4, 8, 128)}"
    print(
        f"{device}, {torch.get_num_threads()} threads, {options.out_features} x "
        f"{options.in_features}"
    )
    with tqdm(total=len(options.tokens), disable=None, leave=False) as bar:
        rows = measure_kernels(
            options.out_features,
            options.in_features,
            options.tokens,
            rounds=options.rounds,
            advance=bar.update,
        )
    for line in _table(rows):
        print(line)
    return {
        "device": device, "threads": torch.get_num_threads(), "out_features": options.out_features, "in_features": options.in_features,
        "rounds": options.rounds, "versions": {name: version(name) for name in ("qvlm_hf", "torch")}, "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def _table(rows: Sequence[KernelRow]) -> list[str]:
    """One line per row; times are of this run alone, the speedup is what may be compared."""
    lines = [
        f"{'tokens':>6}  "
        f"{'':<30}{'ms':>9}{'spread':>8}{'against bfloat16':>18}{'of read bandwidth':>19}"
    ]
    for row in rows:
        limit = f"{row.bandwidth:.0%}" if row.tokens == 1 else ""
        lines.append(
            f"{row.tokens:>6}  {row.way:<30}{row.milliseconds:>9.2f}{row.spread:>8.0%}{row.speedup:>17.2f}x{limit:>19}"
        )
    return lines
