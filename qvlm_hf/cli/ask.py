"""`qvlm ask DIR --image F "question"`."""

import argparse
import re
from typing import Any

import torch

from qvlm_hf.calibration.samples import Sample, load_samples
from qvlm_hf.cli.models import load_with_processor

__all__ = ["add_arguments", "answer", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "model", metavar="DIR", help="directory or Hub id of a model, quantized or not"
    )
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--image", metavar="F", required=True, help="the picture")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="length of the answer at most (default: 64)",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    sample = _sample(options.image, options.question)
    model, processor = load_with_processor(options.model)
    print(answer(model, processor, sample, max_new_tokens=options.max_new_tokens))
    return 0


def _sample(image: str, question: str) -> Sample:
    """The question about the picture.

    Raises:
        ValueError: one of the two cannot be used; named as on the command line.
    """
    try:
        (sample,) = load_samples([{"image": image, "question": question}])
    except ValueError as error:
        text = re.sub(r'^dataset\[0\]: key "image":? ', "--image: ", str(error))
        text = re.sub(r'^dataset\[0\]: key "question" ', "the question ", text)
        raise ValueError(text.replace(" or remove the sample", "")) from error
    return sample


def answer(model: Any, processor: Any, sample: Sample, *, max_new_tokens: int = 64) -> str:
    """The model's greedy answer to the question of a sample (its own answer, if it has one, is not shown)."""
    pictures = iter(sample.images())
    question = [
        {
            **m,
            "content": [
                {**part, "image": next(pictures)} if part["type"] == "image" else part
                for part in m["content"]
            ],
        }
        for m in sample.messages
        if m is not sample.messages[-1] or m["role"] != "assistant"
    ]
    inputs = processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = inputs.to(model.device, dtype=model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
