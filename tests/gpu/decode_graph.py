"""Decoding with a model of random weights as one CUDA graph of a step, captured by hand.

    python tests/gpu/decode_graph.py --shape llava-1.5-7b --output decode.jsonl

For each way (bfloat16, and schemes): prefill, an eager step, a replayed step, launches and
microseconds by kernel of a step, memory. Ways follow one another, each a line of JSON at once. Only
ratios of one run mean anything. --dry: two layers and a short prompt on a CPU, no graph; its
times mean nothing.
"""

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

from qvlm_hf.bench.generation import cache_argument
from qvlm_hf.bench.random_models import random_model, random_prompt
from qvlm_hf.bench.shapes import shape_config
from qvlm_hf.cli.shapes import plan
from qvlm_hf.hub.saved import empty_model

WAYS = ("bfloat16", "W4A8", "W4A4", "W4A16", "W8A8")
PROMPT, PICTURE = 608, 576


def milliseconds(run: Callable[[], object], calls: int, dry: bool) -> float:
    """Of a call: the best of three times `calls`."""
    taken = []
    for _ in range(3):
        if dry:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            taken.append((time.perf_counter() - begin) * 1e3)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return min(taken) / calls


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a graph of one step, warmed on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def by_kernel(run: Callable[[], None]) -> dict:
    """Launches of a call, and microseconds of the 12 kernels that take most."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    count, taken = Counter(), Counter()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.split("<")[0].split("(")[0][-48:]
            count[name] += 1
            taken[name] += event.device_time
    most = [(name, count[name], round(us, 1)) for name, us in taken.most_common(12)]
    return {"launches": count.total(), "microseconds": most}


@torch.no_grad()
def measured(way: str, options: argparse.Namespace) -> dict:
    device = torch.device("cpu" if options.dry else "cuda")
    config, layers = shape_config(options.shape), 2 if options.dry else options.layers
    if layers:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
        config.vision_feature_layer = -1
    modules = None
    if way != WAYS[0]:
        modules = plan(empty_model(config), way, lm_head_bits=8).report.modules
    model = random_model(config, dtype=torch.bfloat16, device=device, modules=modules)
    sizes = {"prompt_tokens": PROMPT, "image_tokens": PICTURE, "images": 1}
    if options.dry:
        sizes |= {"prompt_tokens": 8, "images": 0}
    inputs = random_prompt(config, 1, **sizes, dtype=torch.bfloat16, device=device)
    cache = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=1024)
    run = partial(model, **{cache_argument(model): cache}, use_cache=True)
    token = torch.full((1, 1), 5, device=device)

    def prefill() -> None:
        cache.reset()
        run(**inputs, logits_to_keep=1)

    def step() -> None:
        token.copy_(run(input_ids=token).logits[:, -1].argmax(-1, keepdim=True))

    prefill()
    row = {"way": way, "weights_gb": sum(p.nbytes for p in model.parameters()) / 1e9}
    row["prefill_ms"] = milliseconds(prefill, 1, options.dry)
    row["eager_ms"] = milliseconds(step, 4, options.dry)
    if not options.dry:
        row |= {f"eager_{name}": value for name, value in by_kernel(step).items()}
        replay = captured(step)
        row["graph_ms"] = milliseconds(replay, options.tokens, dry=False)
        row |= by_kernel(replay)
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    for way in options.ways:
        try:
            row = measured(way, options)
        except Exception as error:  # one way must not end the run
            row = {"way": way, "error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(row), flush=True)
        with options.output.open("a") as file:
            file.write(json.dumps({"shape": options.shape, **row}) + "\n")
        gc.collect()
        if not options.dry:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
