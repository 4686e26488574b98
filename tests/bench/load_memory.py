r"""Cost of loading a saved model: peak memory over the files' size, time over reading them twice.

Writes a checkpoint with random packed weights in a named shape, tensor by tensor into shards of a
gigabyte, then loads it in a process of its own. The files are in the page cache in both cases;
PyTorch and Transformers are imported before anything is timed. On a CPU the weights stay mapped
from the files, so memory is counted twice: behind loading, and when every page was read.

    python tests/bench/load_memory.py --shape llava-1.5-7b --scheme W4A4 \
        --json tests/bench/results/load_memory_7b_w4a4.json
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from results_file import highest
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

import qvlm_hf
from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.memory import status_bytes, stored_bytes
from qvlm_hf.bench.random_models import random_tensors, skeleton
from qvlm_hf.bench.shapes import shape_config
from qvlm_hf.hf.round_on_load import planned_report
from qvlm_hf.hub.saved import empty_model
from qvlm_hf.nn.replace import quantized_modules

_SHARD = 10**9
_CHUNK = 2**24
_PAGE = 4096
_EVERY = 0.01  # seconds between two looks at the memory


def write(folder: Path, shape: str, scheme: str) -> int:
    """Writes the checkpoint; returns the bytes of its tensors."""
    config = shape_config(shape)
    quantization = qvlm_hf.QVLMConfig(scheme=scheme)
    modules = planned_report(empty_model(shape_config(shape)), quantization.settings()).modules
    model = skeleton(config, dtype=torch.bfloat16, modules=modules)
    quantization.modules = modules
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.quantization_config = quantization.to_dict()
    shards, shard, size, total, places = 0, {}, 0, 0, {}

    def flush():
        nonlocal shards, shard, size
        shards += 1
        name = f"model-{shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, tensor in random_tensors(model, torch.device("cpu")):
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size > _SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    config.save_pretrained(folder)
    return total


def load(folder: Path) -> dict:
    """Loads it, in a process of its own, and says what that cost."""
    files = sorted(folder.glob("*.safetensors"))
    _read(files)
    start = time.perf_counter()
    _read(files)
    _read(files)
    reading = time.perf_counter() - start
    before = status_bytes("VmRSS")
    with highest("RssAnon", "RssFile", every=_EVERY) as parts:
        start, processor = time.perf_counter(), time.process_time()
        model = AutoModelForImageTextToText.from_pretrained(folder)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    loaded, peak = status_bytes("VmRSS"), status_bytes("VmHWM")
    # mapped pages count only when they are read: read them all
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.reshape(-1)[:: max(1, _PAGE // tensor.element_size())].sum()
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "reading_twice_seconds": reading,
        "rss_before": before,
        "rss_after": loaded,
        "peak_rss": peak,
        "peak_rss_all_read": status_bytes("VmHWM"),
        "peak_anonymous": parts["RssAnon"],
        "peak_mapped": parts["RssFile"],
        "stored_bytes": stored_bytes(model),
        "quantized_modules": sum(1 for _ in quantized_modules(model)),
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    }


def _read(files: list[Path]) -> None:
    buffer = bytearray(_CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--loads", type=int, default=3, help="processes, one after the other; the fastest counts"
    )
    parser.add_argument("--folder", help="where to write; default: a temporary directory")
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(load(Path(options.child))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write(Path(folder), options.shape, options.scheme)
        command = [sys.executable, __file__, "--child", folder, "--threads", str(options.threads)]
        loads = []
        for _ in range(options.loads):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            loads.append(json.loads(done.stdout.splitlines()[-1]))
    best = min(loads, key=lambda found: found["seconds"] / found["reading_twice_seconds"])
    packages = ("qvlm_hf", "torch", "transformers", "safetensors")

    def most(part: str, less: str | None = None) -> float:
        return max(found[part] - (found[less] if less else 0) for found in loads) / size

    result = {
        "device": device_name(torch.device("cpu")),
        "threads": options.threads,
        "shape": options.shape,
        "scheme": options.scheme,
        "versions": {name: version(name) for name in packages},
        "packed_bytes": size,
        "peak_over_packed": most("peak_rss"),
        "peak_all_read_over_packed": most("peak_rss_all_read"),
        "peak_all_read_less_imports_over_packed": most("peak_rss_all_read", "rss_before"),
        "seconds_over_reading_twice": best["seconds"] / best["reading_twice_seconds"],
        "loads": loads,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
