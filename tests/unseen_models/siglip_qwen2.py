"""SigLIP and Qwen2, trained from nothing: `python -m unseen_models.siglip_qwen2` in tests/ builds it.

Another make and another task than the demo model: a picture shows four handwritten digits
(scikit-learn's, UCI, CC BY 4.0), and the answer is several tokens long: the digits forwards,
backwards, sorted, or twice over. Heads share keys, embeddings are tied, q, k and v have biases.

    1. the tower, on the digit under every patch
    2. everything, on the answers, and the tower further on its patches
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from unseen_models.cache import cached

__all__ = ["siglip_qwen2"]

_SEED = 0
_SIDE, _PATCH, _CELLS = 32, 8, 2  # pixels; cells a side
_TOKENS = (_SIDE // _PATCH) ** 2
_PATCH_STEPS, _STEPS, _BATCH = 250, 700, 32
_HELD_OUT = 300  # handwritten digits that no training picture shows
_SIZES = {"calibration": 96, "test": 200}
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_ORDERS = ("forwards", "backwards", "sorted", "twice")
_WORDS = ("<pad>", "<unk>", "<end>", "<image>", "user", "assistant", "read", *_ORDERS, *_DIGITS)
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
    "{{ part['text'] }} {% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def siglip_qwen2() -> Path:
    """The directory of the model, with processor, calibration.jsonl and test.jsonl."""
    return cached("siglip_qwen2", _build)


def _build(target: Path) -> None:
    processor, model = _processor(), _untrained()
    start = time.process_time()
    model.train()
    _train(model)
    logging.info("trained in %.0f s of processor time", time.process_time() - start)
    model.eval().save_pretrained(target)
    processor.save_pretrained(target)
    digits = load_digits()
    for seed, (split, count) in enumerate(_SIZES.items(), 1):
        _write_chats(target, split, _draw(digits, slice(-_HELD_OUT, None), count, seed), seed)


def _processor() -> LlavaProcessor:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE}),
        tokenizer=fast,
        patch_size=_PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=_TEMPLATE,
    )


def _untrained() -> LlavaForConditionalGeneration:
    vision = SiglipVisionConfig(
        image_size=_SIDE,
        patch_size=_PATCH,
        hidden_size=96,
        intermediate_size=264,
        num_hidden_layers=4,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(_WORDS),
        hidden_size=160,
        intermediate_size=424,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=_WORDS.index("<end>"),
        pad_token_id=_WORDS.index("<pad>"),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_WORDS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(_SEED)
    return LlavaForConditionalGeneration(config)


def _draw(digits: Any, part: slice, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [count, side, side] of handwritten digits `part`, and the digits [count, 4]."""
    generator = np.random.default_rng(seed)
    images, labels = digits.images[part] / 16, digits.target[part]
    chosen = generator.integers(0, len(labels), (count, _CELLS**2))
    cells = images[chosen].repeat(2, axis=2).repeat(2, axis=3)
    size = cells.shape[-1]
    rows = cells.reshape(count, _CELLS, _CELLS, size, size).transpose(0, 1, 3, 2, 4)
    canvas = rows.reshape(count, _SIDE, _SIDE)
    ink, ground = generator.uniform(0.6, 1.0, (2, count, 1, 1))
    canvas = canvas * ink + (1 - canvas) * (1 - ground)
    canvas += generator.normal(0, 0.04, canvas.shape)
    return (canvas.clip(0, 1) * 255).astype(np.uint8), labels[chosen]


def _answer(digits: Sequence[int], order: str) -> list[str]:
    arranged = {
        "forwards": list(digits),
        "backwards": list(digits)[::-1],
        "sorted": sorted(digits),
        "twice": [digit for digit in digits for _ in range(2)],
    }[order]
    return [_DIGITS[digit] for digit in arranged]


def _pixels(pictures: np.ndarray) -> Tensor:
    """What the image processor makes of grey pictures."""
    return torch.from_numpy(pictures).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)


def _rows(labels: np.ndarray, orders: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] of the chats as the template writes them, and labels of their answers."""
    number = {word: index for index, word in enumerate(_WORDS)}
    longest = _TOKENS + 4 + 2 * _CELLS**2 + 1
    ids = torch.full((len(labels), longest), number["<pad>"])
    targets = torch.full((len(labels), longest), -100)
    for row, (digits, order) in enumerate(zip(labels, orders, strict=True)):
        prompt = ["user", *["<image>"] * _TOKENS, "read", order, "assistant"]
        answer = [*_answer(digits, order), "<end>"]
        tokens = torch.tensor([number[word] for word in prompt + answer])
        ids[row, : len(tokens)] = tokens
        targets[row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return ids, targets


def _train(model: Any) -> None:
    heads = nn.Linear(model.config.text_config.hidden_size, len(_DIGITS))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=_PATCH_STEPS + _STEPS, pct_start=0.1
    )
    digits, generator = load_digits(), np.random.default_rng(_SEED)
    # the digit under a patch: cells in reading order, each of several patches
    side = _SIDE // _PATCH
    cell = np.arange(_CELLS**2).reshape(_CELLS, _CELLS)
    cell = cell.repeat(side // _CELLS, 0).repeat(side // _CELLS, 1).ravel()
    for step in range(_PATCH_STEPS + _STEPS):
        pictures, labels = _draw(digits, slice(0, -_HELD_OUT), _BATCH, 1000 + step)
        pixels = _pixels(pictures)
        states = model.model.vision_tower(pixels).last_hidden_state
        features = model.model.multi_modal_projector(states)
        patches = torch.from_numpy(labels[:, cell])
        loss = functional.cross_entropy(heads(features).flatten(0, 1), patches.flatten())
        right = (heads(features).argmax(-1) == patches).float().mean()
        if step >= _PATCH_STEPS:
            orders = generator.choice(_ORDERS, _BATCH)
            ids, targets = _rows(labels, orders)
            words = model.model.language_model.embed_tokens(ids)
            places = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(words)
            words = words.masked_scatter(places, features)
            answered = targets[:, 1:] != -100
            hidden = model.model.language_model(inputs_embeds=words).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][answered])
            right = (logits.argmax(-1) == targets[:, 1:][answered]).float().mean()
            loss = 0.3 * loss + functional.cross_entropy(logits, targets[:, 1:][answered])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            logging.info("step %d: loss %.3f, %.0f %% right", step + 1, loss.detach(), 100 * right)


def _write_chats(target: Path, split: str, drawn: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    generator = np.random.default_rng(seed)
    (target / split).mkdir()
    with open(target / f"{split}.jsonl", "w", encoding="utf-8") as lines:
        for index, (picture, digits) in enumerate(zip(*drawn, strict=True)):
            name, order = f"{split}/{index:03}.png", str(generator.choice(_ORDERS))
            Image.fromarray(picture).save(target / name)
            row = {
                "image": name,
                "question": f"read {order}",
                "answer": " ".join(_answer(digits, order)),
                "kind": order,
            }
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(siglip_qwen2())
