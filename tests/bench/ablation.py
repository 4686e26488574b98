r"""The worth of each part of the method on the demo model: accuracy and answer KL over seeds.

Every line adds one part to the line above it (`LINES`), those below "+ equalization" to that one;
`greedy` and `paper` stand beside them. Seconds are processor time, which other programs on the
machine do not change.

    python tests/bench/ablation.py --seeds 5 --questions 1000 \
        --json tests/bench/results/ablation_w4a4.json
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.evaluation import evaluate

_BARE = {
    "weight_rounding": "nearest",
    "rotation": None,
    "guard": False,
    "token_importance": False,
    "equalization": False,
    "optimize_vision": False,
}
_GUARDED = _BARE | {"weight_rounding": "gptq", "guard": True}
_BEST = _GUARDED | {"token_importance": True, "equalization": True}
LINES = {
    "search": _BARE,
    "+ gptq": _BARE | {"weight_rounding": "gptq"},
    "+ guard": _GUARDED,
    "+ token importance": _GUARDED | {"token_importance": True},
    "+ equalization": _BEST,
    "+ vision optimisation": _BEST | {"optimize_vision": True},
    "+ rotation": _BEST | {"rotation": "hadamard"},
}
VARIANTS = LINES | {
    "rtn": {"activation_granularity": "dynamic_token", "dataset": None, "rotation": None},
    "paper": {
        "activation_granularity": {
            "vision": "token",
            "projector": "channel",
            "language": "channel",
        },
        "margins": (),
        "percentiles": (1.0, 0.995, 0.99, 0.985, 0.98),
        **_BARE,
    },
    "greedy": _BARE | {"max_block_depth": 1},
    "defaults": {},
    "defaults, greedy": {"max_block_depth": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="+", default=list(LINES), choices=list(VARIANTS))
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--model", default=str(model_dir()))
    parser.add_argument("--data", default=str(dataset_path("test").parent))
    parser.add_argument("--json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(options.model)
    test = load_samples(f"{options.data}/test.jsonl", num_samples=options.questions)
    full = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    base = evaluate(full, test, processor, keep_logits=True)
    print(f"full precision {base.accuracy.value:.4f}", flush=True)
    rows = []
    for name in options.variants:
        for seed in range(options.seeds if name != "rtn" else 1):
            fields = {"dataset": f"{options.data}/calibration.jsonl", "processor": processor}
            fields |= VARIANTS[name]
            start = time.process_time()
            config = qvlm_hf.QVLMConfig(scheme=options.scheme, seed=seed, **fields)
            model = AutoModelForImageTextToText.from_pretrained(
                options.model, dtype=torch.float32, quantization_config=config
            )
            seconds = time.process_time() - start
            found = evaluate(model, test, processor, reference=base)
            figures = {"accuracy": found.accuracy.value, "kl": found.comparison.kl}
            rows.append({"variant": name, "seed": seed, **figures, "seconds": seconds})
            print(rows[-1], flush=True)
        own = [row for row in rows if row["variant"] == name]
        accuracy, kl = (mean(row[key] for row in own) for key in ("accuracy", "kl"))
        print(f"{name:<14} accuracy {accuracy:.4f}  KL {kl:.5f}", flush=True)
    if options.json:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }
        result = {
            "scheme": options.scheme,
            "questions": options.questions,
            "full_precision": base.accuracy.value,
            "versions": versions,
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
