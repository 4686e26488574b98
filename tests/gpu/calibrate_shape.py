"""How long calibrating a model of a named shape takes and how much device memory: random weights,
drawn pictures.

Time and memory depend on shapes, not on values; the accuracy of such a model means nothing. Target:
a 7B shape with 64 samples in 10 minutes and 24 GB of device memory on one H100
(docs/benchmarks.md).

python tests/gpu/calibrate_shape.py --shape llava-1.5-7b --scheme W4A4 --json
tests/bench/results/calibration_h100_7b.json
"""

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, LlavaProcessor

import qvlm_hf
from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.random_models import random_model
from qvlm_hf.bench.shapes import shape_config
from qvlm_hf.nn.footprint import count_parameters

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import tiny_messages, tiny_processor


def shape_processor(config) -> LlavaProcessor:
    """The tests' word tokenizer with pictures of the shape's size."""
    side, words = config.vision_config.image_size, tiny_processor()
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=words.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llava-1.5-7b")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--layers",
        type=int,
        help="of the language model and the vision encoder, at least 2, for a trial (default: all)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: the directory does not exist")
    config = shape_config(options.shape)
    if options.layers:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = (
            options.layers
        )
    processor = shape_processor(config)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    device = torch.device(options.device)
    model = random_model(config, dtype=torch.bfloat16, device=device)
    on_gpu = device.type == "cuda"
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    report = qvlm_hf.quantize_model(
        model,
        qvlm_hf.QVLMConfig(
            recipe="fixed",
            scheme=options.scheme,
            dataset=tiny_messages(options.samples + 16),
            processor=processor,
            num_samples=options.samples,
        ),
    )
    if on_gpu:
        torch.cuda.synchronize()
    result = {
        "device": device_name(device),
        "versions": {name: version(name) for name in ("qvlm_hf", "torch", "transformers")},
        "shape": options.shape,
        "layers": options.layers,
        "scheme": options.scheme,
        "samples": report.provenance["samples"],
        "tokens": report.provenance["tokens"],
        "parameters": count_parameters(model),
        "seconds": time.perf_counter() - start,
        "weights_before_gb": weights / 1e9,
        "peak_device_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
