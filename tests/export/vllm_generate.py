"""Run by the Python of an environment that has vLLM and not qvlm_hf.

Usage: vllm_generate.py MODEL DTYPE REQUESTS.json ANSWERS.json

A request is {"prompt": text, "image": path}; an answer is {"tokens": [...], "logprobs": {token:
log-probability as the first one}}."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def main():
    from PIL import Image
    from vllm import LLM, SamplingParams

    model, dtype, requests, answers = sys.argv[1:]
    prompts = [
        {
            "prompt": request["prompt"],
            "multi_modal_data": {"image": Image.open(request["image"]).convert("RGB")},
        }
        for request in json.loads(Path(requests).read_text())
    ]
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
    )
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, logprobs=5))
    written = [
        {
            "tokens": list(result.outputs[0].token_ids),
            "logprobs": {
                token: entry.logprob for token, entry in result.outputs[0].logprobs[0].items()
            },
        }
        for result in results
    ]
    Path(answers).write_text(json.dumps(written))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
