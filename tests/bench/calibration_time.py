r"""Seconds that calibration takes for language models of growing depth, and a line through them.

The demo model's configuration with random weights and `--layers` decoder layers, calibrated on the
demo's samples. Seconds are processor time of all threads, which other programs hardly change; the
fewest of `--rounds`.

    python tests/bench/calibration_time.py --json tests/bench/results/calibration_time.json
"""

import time

import torch
from results_file import line, options_of, write
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf.demo import dataset_path, model_dir


def seconds(layers: int, scheme: str, samples: int) -> float:
    config = AutoConfig.from_pretrained(model_dir())
    config.text_config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    quantization = qvlm_hf.QVLMConfig(
        recipe="fixed",
        scheme=scheme,
        dataset=str(dataset_path("calibration")),
        num_samples=samples,
        processor=AutoProcessor.from_pretrained(model_dir()),
    )
    start = time.process_time()
    qvlm_hf.quantize_model(model, quantization)
    return time.process_time() - start


def main() -> None:
    parser = options_of(__doc__, rounds=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[int, list[float]] = {layers: [] for layers in options.layers}
    for _ in range(options.rounds):
        for layers, times in found.items():
            times.append(seconds(layers, options.scheme, options.samples))
            print(f"{layers} layers: {times[-1]:.1f} s", flush=True)
    fewest = [min(times) for times in found.values()]
    base, slope = line(options.layers, fewest)
    off = [time / (base + slope * count) - 1 for count, time in zip(found, fewest, strict=True)]
    print(f"{base:.1f} s + {slope:.2f} s a layer, at most {max(map(abs, off)):.0%} beside the line")
    fit = {"base": base, "per_layer": slope, "beside_the_line": off}
    write(options.json, scheme=options.scheme, samples=options.samples, seconds=found, fit=fit)


if __name__ == "__main__":
    main()
