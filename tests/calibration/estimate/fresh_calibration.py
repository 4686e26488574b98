"""Calibrates a small random model in a process of its own; prints what was promised and held."""

import json
import threading

import torch
from tiny_models import tiny_llava, tiny_messages, tiny_processor

import qvlm_hf
from qvlm_hf.bench.memory import status_bytes
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.hf.preflight import expect


def watch(highest: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.002):
        highest.append(status_bytes("RssAnon") or 0)


def main() -> None:
    torch.set_num_threads(1)
    sizes = {"text_hidden_size": 512, "text_intermediate_size": 1408, "text_layers": 3}
    model = tiny_llava(**sizes, dtype=torch.bfloat16)
    rows = tiny_messages(8)
    fields = {"recipe": "fixed", "processor": tiny_processor(), "num_samples": 8, "batch_size": 4}
    promised = expect(model, qvlm_hf.QVLMConfig(**fields), load_samples(rows))
    highest, stop = [], threading.Event()
    before = status_bytes("RssAnon")
    watcher = threading.Thread(target=watch, args=(highest, stop))
    watcher.start()
    qvlm_hf.quantize_model(model, qvlm_hf.QVLMConfig(dataset=rows, **fields))
    stop.set()
    watcher.join()
    print(json.dumps({"promised": promised.memory, "before": before, "highest": max(highest)}))


if __name__ == "__main__":
    main()
