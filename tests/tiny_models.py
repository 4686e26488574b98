"""A LLaVA small enough for unit tests: random weights, a word-level tokenizer, pictures drawn in
memory.

Everything is built from code and a seed: nothing is downloaded, and two calls with the same
arguments give equal tensors. The sizes are
chosen to be awkward on purpose: an intermediate size that is no multiple of a power-of-two group,
non-zero biases and norm weights that differ from one, so that a dropped bias or a forgotten norm
changes the output.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

__all__ = [
    "ANSWERS",
    "CHAT_TEMPLATE",
    "IMAGE_TOKENS",
    "VOCABULARY",
    "randomize",
    "save_tiny",
    "tiny_llava",
    "tiny_messages",
    "tiny_processor",
]

IMAGE_SIZE = 32
PATCH_SIZE = 8
# one placeholder per patch; the class token is dropped ("default" feature selection)
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("square", "circle", "triangle", "cross")
LETTERS = ("A", "B", "C", "D", "E")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
ANSWERS = (*COLOURS, *SHAPES, *LETTERS, *NUMBERS)
WORDS = """
USER ASSISTANT SYSTEM : ? . , ( ) ' s what which colour shape is are the a an in of this picture image how many there do you see
Context Question Options Answer with option letter from given choices directly N / hint yes no left right top bottom
large small object thing background and or not it on shown describe please answer word here all short long
"""
VOCABULARY = tuple(dict.fromkeys((*SPECIAL_TOKENS, *ANSWERS, *WORDS.split())))

# The template of llava-hf/llava-1.5-7b-hf: pictures first, no end-of-sequence token after the
# answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + "
    "': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ "
    "'<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ "
    "content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_llava(
    seed: int = 0,
    *,
    vision_layers: int = 3,
    vision_hidden_size: int = 64,
    vision_intermediate_size: int = 88,
    text_layers: int = 2,
    text_hidden_size: int = 64,
    text_intermediate_size: int = 104,
    vocab_size: int = 128,
    attention_heads: int = 4,
    key_value_heads: int | None = None,
    vision_feature_layer: int | list[int] = -2,
    tie_word_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """Builds a LLaVA with random weights (about 0.2 M parameters), in eval mode on the CPU.

    Args:
        seed: of all weights; the global generator is left as it was.
        vision_layers: CLIP encoder layers; with `vision_feature_layer=-2` the last one never
            influences the output.
        vision_hidden_size: CLIP width, a multiple of `attention_heads`.
        vision_intermediate_size: CLIP MLP width.
        text_layers: Llama decoder layers.
        text_hidden_size: Llama width, a multiple of `attention_heads`.
        text_intermediate_size: Llama MLP width.
        vocab_size: at least `len(VOCABULARY)`.
        attention_heads: of both parts.
        key_value_heads: of Llama; None means `attention_heads`.
        vision_feature_layer: index, or list of indices, of the CLIP hidden states that the
            projector reads.
        tie_word_embeddings: share the output head with the embedding.
        dtype: of the weights.
    """
    vision_config = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=vision_intermediate_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=attention_heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=vision_hidden_size,
    )
    text_config = LlamaConfig(
        hidden_size=text_hidden_size,
        intermediate_size=text_intermediate_size,
        num_hidden_layers=text_layers,
        num_attention_heads=attention_heads,
        num_key_value_heads=key_value_heads or attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=512,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        tie_word_embeddings=tie_word_embeddings,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=SPECIAL_TOKENS.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        randomize(model)
    return model.to(dtype).eval()


def randomize(model: torch.nn.Module) -> None:
    """Replaces the library's initial values: they are so small that every layer would be close to the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
            elif name.endswith("A_log"):  # linear attention that remembers several tokens
                parameter.normal_(mean=-3.0)
            elif parameter.dim() == 1 and "class_embedding" not in name:
                parameter.normal_(mean=1.0, std=0.1)
            elif parameter.dim() in (2, 3) and "embed" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(std=0.5)


def tiny_processor() -> LlavaProcessor:
    """Builds the processor that fits `tiny_llava`: `IMAGE_TOKENS` placeholders per picture, a word
    per token, BOS added.
    """
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Whitespace()
    bos = SPECIAL_TOKENS.index("<s>")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_messages(
    n: int, seed: int = 0, *, kinds: Sequence[str] = ("colour", "shape")
) -> list[dict]:
    """Draws n pictures and asks about each: chat samples (format 1 of `load_samples`) with PIL
    pictures and a "kind".

    Args:
        n: number of samples.
        seed: of pictures and questions.
        kinds: of the questions, taken in turn: "colour" or "shape".
    """
    generator = random.Random(seed)
    return [_message(generator, kinds[index % len(kinds)]) for index in range(n)]


def _message(generator: random.Random, kind: str) -> dict:
    colour, background = generator.sample(COLOURS, 2)
    shape = generator.choice(SHAPES)
    questions = {
        "colour": (
            f"what colour is the {shape} ?",
            "which colour do you see in this picture ? answer with one word .",
            colour,
        ),
        "shape": (f"which shape is {colour} ?", "what is the shape in the picture ?", shape),
    }
    *texts, answer = questions[kind]
    user = [
        {"type": "image", "image": _picture(generator, colour, background, shape)},
        {"type": "text", "text": generator.choice(texts)},
    ]
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "kind": kind,
    }


def _picture(generator: random.Random, colour: str, background: str, shape: str) -> Image.Image:
    width, height = generator.choice(((32, 32), (48, 32), (32, 40)))
    picture = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(picture)
    left, top, size = (
        generator.randrange(2, 10),
        generator.randrange(2, 10),
        generator.randrange(12, 20),
    )
    right, bottom = left + size, top + size
    if shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=colour)
    else:
        draw.line((left, top, right, bottom), fill=colour, width=4)
        draw.line((left, bottom, right, top), fill=colour, width=4)
    return picture


def save_tiny(
    directory: str | Path, dtype: torch.dtype = torch.float32, *, seed: int = 0, **overrides: object
) -> Path:
    """Saves `tiny_llava(seed, **overrides)` and its processor as an ordinary checkpoint and returns
    the directory.
    """
    path = Path(directory)
    tiny_llava(seed, dtype=dtype, **overrides).save_pretrained(path)  # type: ignore[arg-type]
    tiny_processor().save_pretrained(path)
    return path


def save_tiny_samples(directory: str | Path, n: int, *, seed: int = 3) -> Path:
    """Saves `tiny_messages(n, seed)` as samples.jsonl with PNGs beside it and returns the file."""
    path, records = Path(directory), tiny_messages(n, seed)
    for index, record in enumerate(records):
        part = record["messages"][0]["content"][0]
        part.pop("image").save(path / f"{index}.png")
        part["path"] = f"{index}.png"
    (path / "samples.jsonl").write_text("\n".join(map(json.dumps, records)))
    return path / "samples.jsonl"
