"""`qvlm bench DIR`, `--shape NAME` or `--kernels`: speed here, beside full precision."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from qvlm_hf.bench.kernels import measure_kernels
from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.shapes import SHAPES
from qvlm_hf.cli.bench_models import Peer, bench_models
from qvlm_hf.cli.bench_tables import kernel_table
from qvlm_hf.cli.results import benchmark_entry, check_result_file, shown_command, write_result_file
from qvlm_hf.cli.wording import command_arguments, shown_name
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hub.card import CARD_NAME
from qvlm_hf.hub.measurements import check_recordable, record_measurement
from qvlm_hf.hub.saved import REPORT_NAME
from qvlm_hf.ops.linear import kernel_name

__all__ = ["add_arguments", "run"]

# Options of one kind of measurement and their defaults; the other kind refuses them.
_KERNELS: dict[str, Any] = {"out_features": 4096, "in_features": 4096, "tokens": [1, 8, 64, 608]}
_MODELS: dict[str, Any] = {
    "against": None,
    "scheme": None,
    "lm_head_bits": None,
    "batch": [1],
    "prompt_tokens": None,
    "images": None,
    "new_tokens": 32,
    "device": "cpu",
    "compile": False,
    "record": False,
}
_KERNEL_ROUNDS, _MODEL_ROUNDS = 9, 5
# Options that a recorded command repeats.
_RECORDED = ("batch", "prompt_tokens", "images", "new_tokens", "device", "rounds", "compile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    shapes, add = ", ".join(SHAPES), parser.add_argument
    add("directory", nargs="?", metavar="DIR", help="time a saved quantized model, end to end")
    shape = f"time random weights instead, of a config.json, its directory, a Hub id or {shapes}"
    add("--shape", metavar="NAME", help=shape)
    add("--kernels", action="store_true", help="time single linear layers instead")
    rounds = "turns of every way (default: 5; --kernels: 9)"
    add("--rounds", type=int, metavar="R", help=rounds)
    add("--json", metavar="FILE", help="write the rows there too")
    add = parser.add_argument_group("models (DIR or --shape)").add_argument
    against = "DIR: the full-precision model (default: DIR dequantized)"
    add("--against", metavar="MODEL", help=against)
    scheme = "--shape: bits of weights and activations (default: W4A8)"
    add("--scheme", nargs="+", metavar="S", help=scheme)
    head = "--shape: quantize the output head too (default: leave it)"
    add("--lm-head-bits", type=int, choices=(8,), help=head)
    add("--batch", type=int, nargs="+", metavar="B", help="prompts at once (default: 1)")
    prompt = "of each prompt (default: those of the pictures and 32 more)"
    add("--prompt-tokens", type=int, metavar="N", help=prompt)
    add(
        "--images",
        type=int,
        metavar="N",
        help="pictures per prompt (default: 1, if they can be made)",
    )
    add("--new-tokens", type=int, metavar="N", help="generated per prompt (default: 32)")
    add("--device", choices=("cpu", "cuda"), help="where (default: cpu)")
    compiled = "decode with torch.compile and a static cache, every way"
    add("--compile", action="store_true", default=None, help=compiled)
    add("--no-peers", action="store_true", help=argparse.SUPPRESS)  # in cards of earlier versions
    record = "DIR: keep the result there: in its report and model card"
    add("--record", action="store_true", default=None, help=record)
    add = parser.add_argument_group("single layers (--kernels)").add_argument
    add("--out-features", type=int, metavar="N", help="outputs of the layer (default: 4096)")
    inputs = "inputs of the layer, a multiple of 128 (default: 4096)"
    add("--in-features", type=int, metavar="K", help=inputs)
    tokens = "tokens per call (default: 1 8 64 608)"
    add("--tokens", type=int, nargs="+", metavar="M", help=tokens)


def run(options: argparse.Namespace, peers: Sequence[Peer] = ()) -> int:
    """Runs the command, with other packages if `peers` are given (tests/bench/peers.py)."""
    _check_usage(options)
    for name, value in (_KERNELS if options.kernels else _MODELS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.rounds is None:
        options.rounds = _KERNEL_ROUNDS if options.kernels else _MODEL_ROUNDS
    for name in ("batch", "scheme", "tokens"):
        _refuse_twice(name, getattr(options, name) or ())
    if options.json:
        check_result_file(options.json)
    folder = check_recordable(options.directory) if options.record else None
    result = _bench_kernels(options) if options.kernels else bench_models(options, peers)
    if options.json:
        write_result_file(options.json, result)
    if folder is not None:
        defaults = _MODELS | {"rounds": _MODEL_ROUNDS}
        given = {name: getattr(options, name) for name in _RECORDED}
        given = {name: value for name, value in given.items() if value != defaults[name]}
        command = shown_command("bench", folder, against=options.against, **given, record=True)
        record_measurement(folder, benchmark=benchmark_entry(result, command=command))
        print(f"recorded in {REPORT_NAME} and {CARD_NAME}")
    return 0


def _check_usage(options: argparse.Namespace) -> None:
    if (options.directory is not None) + (options.shape is not None) + options.kernels != 1:
        _wrong_usage("name exactly one of DIR, --shape NAME and --kernels: see qvlm bench --help.")
    if options.kernels:
        _refuse(options, _MODELS, "DIR and --shape")
    else:
        _refuse(options, _KERNELS, "--kernels")
    if options.directory is None:
        _refuse(options, ("against", "record"), "DIR")
    if options.shape is None:
        _refuse(options, ("scheme", "lm_head_bits"), "--shape")


def _refuse(options: argparse.Namespace, names: Iterable[str], owner: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            option = shown_name(command_arguments("bench")[name])
            _wrong_usage(f"{option} belongs to {owner}: leave it out.")


def _refuse_twice(name: str, values: Iterable[int | str]) -> None:
    """Refuses a value that is named twice: its rows could not be told apart."""
    shown = [str(value) for value in values]
    if len({value.upper() for value in shown}) < len(shown):
        raise ValueError(f"--{name} {' '.join(shown)} names a value twice: name each once.")


def _wrong_usage(message: str) -> NoReturn:
    print(f"qvlm: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _bench_kernels(options: argparse.Namespace) -> dict[str, Any]:
    sizes, rounds = (options.out_features, options.in_features), options.rounds
    if min(*sizes, rounds - 1, *options.tokens) < 1 or options.in_features % 128:
        raise ValueError(
            "sizes must be at least 1, --rounds at least 2, and --in-features a multiple of 128."
        )
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    scheme = QuantScheme(weight_bits=4, activation_bits=8, granularity="dynamic_token")
    device = f"{device_name(cpu)}, kernel: {kernel_name(cpu, 4096, scheme)}"
    print(f"{device}, {threads} threads, {sizes[0]} x {sizes[1]}")
    with tqdm(total=len(options.tokens), disable=None, leave=False) as bar:
        rows = measure_kernels(*sizes, options.tokens, rounds=rounds, advance=bar.update)
    for line in kernel_table(rows):
        print(line)
    return {
        "device": device,
        "threads": threads,
        "out_features": options.out_features,
        "in_features": options.in_features,
        "rounds": rounds,
        "versions": {name: version(name) for name in ("qvlm_hf", "torch")},
        "rows": [asdict(row) for row in rows],
    }
