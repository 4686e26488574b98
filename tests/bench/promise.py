r"""What the preflight promises against what calibrations take: seconds by step, and memory.

Random language models of four sizes behind the demo's vision encoder, each saved and calibrated in
a process of its own. Seconds are processor time, which other programs hardly change; so are the
rates. Memory is the highest anonymous memory of the process. Prints the factor of every step, to be
written into qvlm_hf/calibration/estimate/seconds.py, and how far each size is from the promise.

    python tests/bench/promise.py --threads 1 --json tests/bench/results/promise.json
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from calibration_memory import save_model
from results_file import highest, options_of, write
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf.calibration.estimate.seconds import FACTORS
from qvlm_hf.demo import dataset_path
from qvlm_hf.hf.calibrate import read_samples
from qvlm_hf.hf.preflight import expect
from qvlm_hf.hub.saved import empty_model

# hidden size, layers, samples
SIZES = ((192, 4, 16), (256, 6, 32), (512, 3, 32), (768, 2, 32))


def calibrate(folder: Path, samples: int, scheme: str, scratch: str | None) -> dict:
    """Promises and calibrates the model there, in this process."""
    fields = {"scheme": scheme, "num_samples": samples, "recipe": "fixed"}
    if scratch:
        fields["scratch_dir"] = scratch
    processor, dataset = AutoProcessor.from_pretrained(folder), str(dataset_path("calibration"))
    config = qvlm_hf.QVLMConfig(dataset=dataset, processor=processor, **fields)
    empty = empty_model(AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
    with patch("time.perf_counter", time.process_time):
        promised = expect(empty, config, read_samples(config))
        with highest("RssAnon") as memory:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
            start = time.process_time()
            report = qvlm_hf.quantize_model(model, config)
        seconds = time.process_time() - start
    steps = dict(report.seconds)
    return {
        "promised": promised.seconds,
        "seconds": steps | {"other": seconds - sum(steps.values())},
        "promised_memory": promised.memory,
        "memory": memory["RssAnon"],
        "tokens": report.provenance["tokens"],
    }


def factors(rows: list[dict]) -> dict[str, float]:
    """Of each step: by what the counted seconds are to be multiplied, in the geometric mean."""
    found = {}
    for step, own in FACTORS.items():
        ratios = [
            row["seconds"].get(step, 0) / row["promised"][step] * own
            for row in rows
            if row["promised"][step]
        ]
        if ratios and all(ratio > 0 for ratio in ratios):
            found[step] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return found


def main() -> None:
    parser = options_of(__doc__, rounds=1)
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--with-scratch", action="store_true", help="and scratch files")
    parser.add_argument("--folder", help="where to write; default: a temporary directory")
    for hidden in ("--scratch", "--child", "--samples"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child = Path(options.child), int(options.samples), options.scheme, options.scratch
        print(json.dumps(calibrate(*child)))
        return
    rows = []
    for hidden, layers, samples in SIZES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            save_model(Path(folder), layers, hidden, torch.bfloat16)
            words = ["--samples", str(samples), "--scheme", options.scheme]
            words += ["--threads", str(options.threads)]
            words += ["--scratch", folder] if options.with_scratch else []
            command = [sys.executable, __file__, "--child", folder, *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
        rows.append({"hidden": hidden, "layers": layers, "samples": samples} | row)
        measured, promised = sum(row["seconds"].values()), sum(row["promised"].values())
        memory = row["memory"] / 2**20, row["promised_memory"] / 2**20
        print(
            f"{hidden} x {layers}, {samples} samples: {measured:.1f} s of {promised:.1f} promised "
            f"({measured / promised:.2f}), {memory[0]:.0f} MiB of {memory[1]:.0f} "
            f"({memory[1] / memory[0]:.2f} promised of each)",
            flush=True,
        )
        write(options.json, scheme=options.scheme, rows=rows, factors=factors(rows))
    print("factors: " + ", ".join(f"{step} {factor:.2f}" for step, factor in factors(rows).items()))


if __name__ == "__main__":
    main()
