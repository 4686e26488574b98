"""`qvlm quantize --resume`, killed again and again: python killed_quantize.py FOLDER KILLS SEED

FOLDER holds `model` and `samples.jsonl`. Every run is a forked child of this process, so that the
imports are paid once. Prints how many kills hit a run that was still going.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)  # a fork takes no threads along

from transformers import LlavaForConditionalGeneration, LlavaProcessor  # noqa: E402, F401

from qvlm_hf.cli import main  # noqa: E402
from qvlm_hf.cli.quantize import run  # noqa: E402, F401

OPTIONS = (
    "--recipe",
    "fixed",
    "--num-samples",
    "8",
    "--batch-size",
    "4",
    "--max-block-depth",
    "1",
    "--group-size",
    "32",
)


def start(folder, output):
    """A child that quantizes; its process number."""
    words = ["quantize", f"{folder}/model", "--dataset", f"{folder}/samples.jsonl", *OPTIONS]
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = main([*words, "--output", str(output), "--resume"])
    finally:
        os._exit(status)


def finish(child):
    """Waits for a child, which must succeed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"status {status}"


def content(output):
    """Every file of a result; reports without the seconds that steps took."""
    assert not Path(f"{output}.resume").exists()
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    report = json.loads(files.pop("qvlm_report.json"))
    del report["seconds"]
    digests = json.loads(files.pop("qvlm_files.json"))
    del digests["qvlm_report.json"]
    return files | {"report": report, "digests": digests}


def compare(output, expected):
    found = content(output)
    assert [name for name in expected if found.get(name) != expected[name]] == []
    assert found.keys() == expected.keys()


def kill_until_done(folder, kills, seed):
    """How many of `kills` hit a run; every result is compared with that of an undisturbed run."""
    # of the same name, which the card holds
    undisturbed, output = folder / "undisturbed" / "out", folder / "killed" / "out"
    begin = time.monotonic()
    finish(start(folder, undisturbed))
    duration, expected = time.monotonic() - begin, content(undisturbed)
    chosen, hits = random.Random(seed), 0
    for _ in range(kills):
        child = start(folder, output)
        time.sleep(chosen.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        hits += status == -signal.SIGKILL
        if output.exists():  # it was faster
            state = Path(f"{output}.resume")
            shutil.rmtree(state, ignore_errors=True)  # killed while it cleared up
            compare(output, expected)
            shutil.rmtree(output)
    finish(start(folder, output))
    compare(output, expected)
    return hits


if __name__ == "__main__":
    print(kill_until_done(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
