"""`qvlm ask DIR --image F "question"`."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from qvlm_hf.calibration.samples import (
    Sample,
    collate,
    load_samples,
    longest_sample,
    moved,
    takes_suffix,
)
from qvlm_hf.cli.loading import load_with_processor

__all__ = ["add_arguments", "answer", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("model", metavar="DIR", help="directory or Hub id of a model, quantized or not")
    add("question", help="what to ask")
    add("--image", metavar="F", required=True, help="the picture")
    length = "length of the answer at most (default: 64)"
    add("--max-new-tokens", type=int, default=64, metavar="N", help=length)


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
    """The model's greedy answer to the question of a sample, without the sample's own answer.

    Raises:
        ValueError: the model has no positions for the question.
    """
    messages = sample.messages if sample.answer is None else sample.messages[:-1]
    inputs = _inputs(replace(sample, messages=messages), processor)
    length, positions = inputs["input_ids"].shape[1], longest_sample(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"the question and its picture are {length} tokens, more than the model's {positions} "
            f"positions: ask something shorter."
        )
    inputs = moved(inputs, model.device, model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    made = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(made, skip_special_tokens=True).strip()


def _inputs(sample: Sample, processor: Any) -> Mapping[str, torch.Tensor]:
    """Inputs of one question, for which no padding token is needed."""
    if takes_suffix(processor):
        return collate([sample], processor).inputs
    pictures = iter(sample.images())
    question = [
        {
            **message,
            "content": [
                {**part, "image": next(pictures)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in sample.messages
    ]
    return processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
