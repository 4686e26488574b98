"""One small LLaVA on disk, quantized in several ways and saved, each once and when a test asks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor

from qvlm_hf import QVLMConfig, save_quantized

SEARCH = {
    "recipe": "fixed",
    "num_samples": 4,
    "batch_size": 4,
    "percentiles": (1.0, 0.999),
    "margins": (),
    "max_block_depth": 2,
}
KINDS: dict[str, Callable[[LlavaProcessor], QVLMConfig]] = {
    "rounded": lambda _: QVLMConfig(scheme="W4A16", symmetric=True, lm_head_bits=8),
    "dynamic": lambda _: QVLMConfig(
        scheme="W3A8", activation_granularity="dynamic_token", group_size=32
    ),
    "searched": lambda processor: QVLMConfig(
        scheme="W4A4", dataset=tiny_messages(4), processor=processor, **SEARCH
    ),
    "rotated": lambda processor: QVLMConfig(
        scheme="W4A8", dataset=tiny_messages(4), processor=processor, **SEARCH
    ),
    "budgeted": lambda processor: QVLMConfig(
        precision_budget=3.5, dataset=tiny_messages(4), processor=processor, **SEARCH
    ),
    "rotated, rounded": lambda _: QVLMConfig(scheme="W4A16", rotation="hadamard"),
    "paper": lambda processor: QVLMConfig.paper(
        dataset=tiny_messages(4), processor=processor, num_samples=4, batch_size=4
    ),
}


@dataclass(frozen=True)
class Saved:
    """A quantized model on disk and what it answered before it was saved."""

    path: Path
    logits: torch.Tensor
    tokens: torch.Tensor


@pytest.fixture(scope="session")
def kinds() -> dict[str, Callable[[LlavaProcessor], QVLMConfig]]:
    """What `saved` was made with."""
    return KINDS


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return tiny_processor()


@pytest.fixture(scope="session")
def inputs(processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Three prompts with pictures."""
    messages = [sample["messages"][:1] for sample in tiny_messages(3, seed=7)]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in messages]
    images = [
        [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
        for chat in messages
    ]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-precision checkpoint."""
    return save_tiny(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    source: Path,
    processor: LlavaProcessor,
    inputs: dict[str, torch.Tensor],
) -> dict[tuple[str, str], Saved]:
    """(kind, dtype) -> a model quantized by from_pretrained and saved; "searched" ones in shards."""
    root = tmp_path_factory.mktemp("saved")

    class Models(dict):
        def __missing__(self, key: tuple[str, str]) -> Saved:
            kind, dtype = key
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, quantization_config=KINDS[kind](processor)
            )
            path = root / "-".join(key)
            shard_size = "60KB" if kind == "searched" else "50GB"
            save_quantized(
                model, processor, path, report=model.hf_quantizer.report, max_shard_size=shard_size
            )
            self[key] = Saved(path, *answers(model, inputs))
            return self[key]

    return Models()


@pytest.fixture(scope="session")
def hub_layout(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """The full-precision checkpoint with the keys of llava-hf/llava-1.5-7b-hf:
    `vision_tower.vision_model.` on top.
    """
    path = tmp_path_factory.mktemp("hub_layout")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    renamed = {
        key.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for key, tensor in tensors.items()
    }
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def answers(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedily generated tokens."""
    fed = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    with torch.no_grad():
        return model(**fed).logits, model.generate(**fed, max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="session")
def ask() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`answers`, for tests."""
    return answers
