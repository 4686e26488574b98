"""Cost of `qvlm autoload install` at a start of Python: `python -c pass` with it and without.

Two virtual environments take turns; each reads the file twice, as Python's site module goes through
its site-packages twice. Wall time and processor time (user and system) of the process, in
milliseconds. The interval is a bootstrap of the median of the paired differences, 95 %.

    python tests/bench/startup.py --rounds 400 --json tests/bench/results/startup.json
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

import torch

from qvlm_hf.bench.machine import device_name
from qvlm_hf.cli.autoload import PTH_NAME, pth_text


def start(python: Path) -> tuple[float, float]:
    """Wall and processor milliseconds of one start."""
    begun = time.perf_counter()
    process = os.posix_spawn(python, [str(python), "-c", "pass"], {})
    _, status, used = os.wait4(process, 0)
    wall = time.perf_counter() - begun
    assert status == 0
    return 1e3 * wall, 1e3 * (used.ru_utime + used.ru_stime)


def interval(differences: list[float], draws: int = 2000) -> tuple[float, float]:
    """Where the median of the differences lies with 95 %."""
    generator = random.Random(0)
    medians = sorted(
        median(generator.choices(differences, k=len(differences))) for _ in range(draws)
    )
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "autoload": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in times:
            venv.create(Path(folder) / name, with_pip=False, symlinks=True)
        (packages,) = (Path(folder) / "autoload" / "lib").glob("python*/site-packages")
        (packages / PTH_NAME).write_text(pth_text())
        for _ in range(options.rounds + 5):  # the first ones warm the page cache
            for name in random.sample(list(times), 2):
                times[name].append(start(Path(folder) / name / "bin" / "python"))
    result = {
        "device": device_name(torch.device("cpu")),
        "python": sys.version.split()[0],
        "rounds": options.rounds,
    }
    for index, kind in enumerate(("wall", "processor")):
        bare, with_it = ([pair[index] for pair in times[name][5:]] for name in ("bare", "autoload"))
        differences = [after - before for before, after in zip(bare, with_it, strict=True)]
        low, high = interval(differences)
        result[kind] = {
            "bare_ms": round(median(bare), 3),
            "autoload_ms": round(median(with_it), 3),
            "difference_ms": round(median(differences), 3),
            "difference_interval_ms": [round(low, 3), round(high, 3)],
            "ratio": round(median(with_it) / median(bare), 3),
        }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
