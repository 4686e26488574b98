"""`qvlm bench --kernels`: how fast this machine's kernels are, beside PyTorch's."""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from qvlm_hf.bench import KernelRow, measure_kernels
from qvlm_hf.ops.cpu import kernel_name

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--kernels", action="store_true", required=True, help="time single linear layers, the only measurement so far")
    parser.add_argument("--out-features", type=int, default=4096, metavar="N", help="outputs of the layer (default: 4096)")
    parser.add_argument("--in-features", type=int, default=4096, metavar="K", help="inputs of the layer, a multiple of 128 (default: 4096)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 608], metavar="M", help="tokens per call (default: 1 8 64 608)")
    parser.add_argument("--rounds", type=int, default=9, metavar="R", help="turns of every way (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if min(options.out_features, options.in_features, options.rounds - 1, *options.tokens) < 1 or options.in_features % 128:
        raise ValueError("sizes must be at least 1, --rounds at least 2, and --in-features a multiple of 128.")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"--json {options.json}: the directory does not exist.")
    print(f"{_device()}, {torch.get_num_threads()} threads, {options.out_features} x {options.in_features}")
    with tqdm(total=len(options.tokens), disable=None, leave=False) as bar:
        rows = measure_kernels(options.out_features, options.in_features, options.tokens, rounds=options.rounds, advance=bar.update)
    for line in _table(rows):
        print(line)
    if options.json:
        result = {
            "device": _device(), "threads": torch.get_num_threads(), "out_features": options.out_features,
            "in_features": options.in_features, "rounds": options.rounds,
            "versions": {name: version(name) for name in ("qvlm_hf", "torch")}, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _device() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, kernel: {kernel_name(4096, 4, 8, 128)}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _table(rows: Sequence[KernelRow]) -> list[str]:
    """One line per row; times are of this run alone, the speedup is what may be compared."""
    lines = [f"{'tokens':>6}  {'':<30}{'ms':>9}{'spread':>8}{'against bfloat16':>18}{'of read bandwidth':>19}"]
    for row in rows:
        limit = f"{row.bandwidth:.0%}" if row.tokens == 1 else ""
        lines.append(f"{row.tokens:>6}  {row.way:<30}{row.milliseconds:>9.2f}{row.spread:>8.0%}{row.speedup:>17.2f}x{limit:>19}")
    return lines
