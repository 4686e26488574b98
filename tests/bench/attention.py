r"""One token's attention on a CPU: "qvlm" beside Transformers' `sdpa` and `eager`, in turns.

`composed` is the fallback of "qvlm" where the C++ kernel cannot be compiled. A call goes through
the caches of as many layers as fit into half a gigabyte, up to 22: beyond the processor's own.

    cd tests/bench
    taskset -c 2,3 python attention.py --threads 2 --json results/attention_cpu.json
    taskset -c 2,3 python attention.py --threads 2 --keys 4096 --rounds 5 \
        --json results/attention_cpu_4096.json
"""

import time

import torch
from results_file import options_of, write
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from qvlm_hf.bench.turns import summarize, take_turns
from qvlm_hf.hf.runtime.attention import attend
from qvlm_hf.ops.attention import attend_with_pytorch

SIZES = {"LLaVA-1.5-7B": (32, 32, 128), "TinyLlama": (32, 4, 64)}  # heads, key heads, head size
LAYERS, BYTES = 22, 2**29


def by_operators(module, query, key, value, mask, scaling, **_):
    return attend_with_pytorch(query, key, value, mask, scaling), None


WAYS = {
    "sdpa": sdpa_attention_forward,
    "eager": eager_attention_forward,
    "composed": by_operators,
    "qvlm": attend,
}


def measure(heads, key_heads, size, keys, dtype, batch, rounds):
    """Way -> microseconds of a call, spread, times `sdpa`, and GB/s of keys and values."""
    module = nn.Module().eval()
    module.num_key_value_groups = heads // key_heads
    read = 2 * batch * key_heads * keys * size * dtype.itemsize
    shapes = (batch, heads, 1, size), (batch, key_heads, keys, size), (batch, key_heads, keys, size)
    layers = [
        [torch.randn(shape, dtype=dtype) for shape in shapes]
        for _ in range(max(1, min(LAYERS, BYTES // read)))
    ]

    def run(name, _turn):
        start = time.perf_counter()
        for tensors in layers:
            WAYS[name](module, *tensors, None, scaling=size**-0.5, dropout=0.0)
        return (time.perf_counter() - start) / len(layers)

    times, found = take_turns(WAYS, rounds, run, warm_ups=2), {}
    for name in WAYS:
        timing = summarize(times[name], times["sdpa"])
        found[name] = {
            "microseconds": timing.seconds * 1e6,
            "spread": timing.spread,
            "speedup": timing.speedup,
            "gigabytes": read / timing.seconds / 1e9,
        }
    return found


def main() -> None:
    parser = options_of(__doc__, rounds=15)
    parser.add_argument("--keys", type=int, default=640)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for shape, sizes in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for batch in options.batches:
                with torch.no_grad():
                    ways = measure(*sizes, options.keys, dtype, batch, options.rounds)
                row = {"shape": shape, "keys": options.keys, "dtype": str(dtype).split(".")[1]}
                rows.append({**row, "batch": batch, "ways": ways})
                speedups = {name: round(way["speedup"], 2) for name, way in ways.items()}
                print(f"{shape:<14}{row['dtype']:<10}batch {batch}", speedups)
    write(options.json, rows=rows)


if __name__ == "__main__":
    main()
