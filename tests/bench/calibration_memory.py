r"""Memory that calibration takes for language models of growing depth, and a line through it.

The demo model's configuration with a wider language model of random weights, `--layers` deep,
calibrated from a checkpoint on the demo's samples, in a process each, with scratch files and
without. Memory is anonymous: mapped files are what the kernel can drop and read again.

    python tests/bench/calibration_memory.py --json tests/bench/results/calibration_memory.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results_file import highest, line, options_of, write
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf.bench.memory import status_bytes
from qvlm_hf.bench.random_models import random_model
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.hf.calibrate import read_samples
from qvlm_hf.hf.preflight import expect
from qvlm_hf.hf.saving import save_quantized
from qvlm_hf.hub.saved import empty_model

# The C library gives blocks from 64 KiB on back at once: what it hoards is no need of calibration.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def save_model(folder: Path, layers: int, hidden: int, dtype: torch.dtype, **text: int) -> int:
    """Saves a random model, `text` in its configuration; returns the bytes of a decoder layer."""
    config = AutoConfig.from_pretrained(model_dir())
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "head_dim": 64}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), hidden // 64)
    config.text_config.update(sizes | heads | {"num_hidden_layers": layers} | text)
    model = random_model(config, dtype=dtype, device=torch.device("cpu"))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(model_dir()).save_pretrained(folder)
    layer = model.get_decoder().layers[0]
    return sum(parameter.nbytes for parameter in layer.parameters())


def calibrate(folder: Path, scratch: str | None, share: float, **fields: object) -> dict:
    """Calibrates the model there, in this process; returns what it took and was promised.

    With a `share` the kernel refuses more than that share of the promise: RLIMIT_DATA. It counts
    what is private and writable, which is anonymous memory and the checkpoint as safetensors maps
    it, but not scratch files.
    """
    config = qvlm_hf.QVLMConfig(
        recipe="fixed",
        dataset=str(dataset_path("calibration")),
        processor=AutoProcessor.from_pretrained(folder),
        scratch_dir=scratch,
        **fields,
    )
    empty = empty_model(AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
    promised = expect(empty, config, read_samples(config))
    before, start = status_bytes("RssAnon"), time.process_time()
    if share:
        reserved = status_bytes("VmData") - before  # not touched, as of stacks
        limit = int(share * promised.memory + promised.weights) + reserved
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with highest("RssAnon") as memory:
        model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
        save_quantized(model, config.processor, folder / "result", report=None, overwrite=True)
    seconds = time.process_time() - start
    return {
        "anonymous": memory["RssAnon"] - before,
        "highest": memory["RssAnon"],
        "promised": promised.memory,
        "seconds": seconds,
    }


def in_a_process(folder: Path, *options: str) -> dict:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder), *options]
    environment = os.environ | MALLOC
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = options_of(__doc__, rounds=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument(
        "--fields",
        default='{"percentiles": [1.0], "margins": [], "max_block_depth": 1}',
        help="further fields of QVLMConfig, as JSON",
    )
    parser.add_argument("--folder", help="where to write; default: a temporary directory")
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        fields = {"scheme": options.scheme, "num_samples": options.samples}
        fields |= json.loads(options.fields)
        print(json.dumps(calibrate(Path(options.child), options.scratch, options.share, **fields)))
        return
    same = ["--scheme", options.scheme, "--samples", str(options.samples), "--threads", "1"]
    same += ["--fields", options.fields]
    found: dict[str, dict[int, dict]] = {"memory": {}, "scratch": {}}
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            layer = save_model(Path(folder), layers, options.hidden, torch.bfloat16)
            for way, places in (("memory", []), ("scratch", ["--scratch", folder])):
                result = in_a_process(Path(folder), *same, *places)
                found[way][layers] = result
                size, seconds = result["anonymous"] / 2**20, result["seconds"]
                print(f"{layers} layers, {way}: {size:.0f} MiB, {seconds:.0f} s", flush=True)
    fits = {}
    for way, results in found.items():
        sizes = [result["anonymous"] for result in results.values()]
        base, slope = line(options.layers, sizes)
        fits[way] = {"base": base, "per_layer": slope, "of_a_layer": slope / layer}
        print(
            f"{way}: {base / 2**20:.0f} MiB + {slope / 2**20:.2f} MiB a layer, "
            f"{slope / layer:.1%} of its weights"
        )
    about = {name: vars(options)[name] for name in ("scheme", "hidden", "samples", "fields")}
    write(options.json, **about, found=found, fits=fits)


if __name__ == "__main__":
    main()
