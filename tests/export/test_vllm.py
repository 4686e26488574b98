"""A real vLLM loads the exports and answers as we do.

It has an environment of its own, whose Python VLLM_PYTHON names.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import save_tiny, tiny_messages
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.export.checkpoint import export
from qvlm_hf.export.vllm_check import check_for_vllm

PYTHON = os.environ.get("VLLM_PYTHON", "")
W8A8 = {
    "scheme": "W8A8",
    "symmetric": True,
    "group_size": -1,
    "activation_granularity": "dynamic_token",
    "lm_head_bits": 8,
}
WIDE = {
    "vision_hidden_size": 128,
    "vision_intermediate_size": 256,
    "text_hidden_size": 128,
    "text_intermediate_size": 384,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which(PYTHON) is None,
        reason="VLLM_PYTHON names no Python with vLLM (docs/serving.md)",
    ),
]


def prepared(source, processor, folder, fields, dtype):
    """The quantized model and its export."""
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, quantization_config=QVLMConfig(**fields)
    )
    save_quantized(model, processor, folder / "qvlm", report=None)
    return model, export(folder / "qvlm", folder / "exported").path


def by_vllm(path, dtype, requests, folder):
    """What vLLM answers."""
    (folder / "requests.json").write_text(json.dumps(requests))
    script = Path(__file__).parent / "vllm_generate.py"
    arguments = [PYTHON, script, path, dtype, folder / "requests.json", folder / "answers.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


def by_us(model, processor, request):
    """Greedy tokens and the log-probabilities of the first."""
    fed = processor(
        text=request["prompt"],
        images=[Image.open(request["image"]).convert("RGB")],
        return_tensors="pt",
    )
    fed = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in fed.items()
    }
    with torch.no_grad():
        logprobs = model(**fed).logits[0, -1].float().log_softmax(-1)
        return model.generate(**fed, max_new_tokens=4, do_sample=False)[
            0, fed["input_ids"].shape[1] :
        ].tolist(), logprobs


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        pytest.param(
            {"scheme": "W4A16", "symmetric": True, "group_size": 64}, "bfloat16", id="W4A16"
        ),
        pytest.param(
            {"scheme": "W4A16", "group_size": 64}, "bfloat16", id="W4A16 with zero points"
        ),
        pytest.param(
            {"scheme": "W3A16", "symmetric": True, "group_size": 256}, "bfloat16", id="two groups"
        ),
        pytest.param(W8A8, "float32", id="W8A8"),
    ],
)
def test_the_same_probabilities(processor, tmp_path, fields, dtype):
    model, path = prepared(
        save_tiny(tmp_path / "wide", **WIDE), processor, tmp_path, fields, torch.float32
    )
    assert not any(finding.fatal for finding in check_for_vllm(path, device="cpu"))
    requests = []
    for index, sample in enumerate(tiny_messages(4, seed=7)):
        chat = sample["messages"][:1]
        next(part["image"] for part in chat[0]["content"] if part["type"] == "image").save(
            tmp_path / f"{index}.png"
        )
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        requests.append({"prompt": prompt, "image": str(tmp_path / f"{index}.png")})
    for request, answer in zip(requests, by_vllm(path, dtype, requests, tmp_path), strict=True):
        _, logprobs = by_us(model, processor, request)
        difference = max(
            abs(logprobs[int(token)].item() - value) for token, value in answer["logprobs"].items()
        )
        assert difference < 0.1  # bfloat16 there; measured 0.04
        assert int(logprobs.argmax()) == answer["tokens"][0]


def test_the_demo_model_answers_as_here(tmp_path):
    processor = AutoProcessor.from_pretrained(model_dir())
    model, path = prepared(model_dir(), processor, tmp_path, W8A8, torch.float32)
    folder = dataset_path("test").parent
    requests = []
    for line in dataset_path("test").read_text().splitlines()[:16]:
        chat = json.loads(line)["messages"][:1]
        image = next(part["path"] for part in chat[0]["content"] if part["type"] == "image")
        requests.append(
            {
                "prompt": processor.apply_chat_template(chat, add_generation_prompt=True),
                "image": str(folder / image),
            }
        )
    answers = by_vllm(path, "float32", requests, tmp_path)
    same = sum(
        by_us(model, processor, request)[0] == answer["tokens"]
        for request, answer in zip(requests, answers, strict=True)
    )
    assert same >= 15
