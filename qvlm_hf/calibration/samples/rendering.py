"""A chat -> its text in the processor's template, and the token ids of its last answer.

A processor without a template may take a question and its answer apart, as PaliGemma's does: its
model reads the first in both directions and the second in one.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qvlm_hf.calibration.samples.errors import place, sample_error
from qvlm_hf.calibration.samples.sample import Message, Sample
from qvlm_hf.errors import first_line

__all__ = ["Processor", "adds_special_tokens", "check_processor", "render", "takes_suffix"]


class Processor(Protocol):
    """The used part of a processor; also `image_token`, `image_token_id` where it has them."""

    tokenizer: Any

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: object) -> object:
        """Renders a chat as text."""

    def __call__(self, **inputs: object) -> Mapping[str, Any]:
        """Turns text and pictures into the model's tensors."""


def check_processor(processor: Processor) -> None:
    """Checks that a processor renders chats and pads.

    Raises:
        ValueError: it has no chat template, no tokenizer or no padding token.
    """
    name = type(processor).__name__
    if (
        not callable(getattr(processor, "apply_chat_template", None))
        or getattr(processor, "tokenizer", None) is None
    ):
        raise ValueError(
            f"{name} is no chat processor (no apply_chat_template or tokenizer); take the one that "
            f"was saved with the model"
        )
    if getattr(processor, "chat_template", "") is None and not takes_suffix(processor):
        remedy = "add chat_template.jinja to its files, set its chat_template, or take a chat model"
        raise ValueError(f"{name} has no chat template; {remedy}")
    if processor.tokenizer.pad_token is None:
        remedy = "set it in tokenizer_config.json or on the tokenizer, for example to the eos_token"
        raise ValueError(f"the tokenizer of {name} has no pad_token; {remedy}")


def takes_suffix(processor: Processor) -> bool:
    """Whether a processor has no chat template and takes the answer as `suffix` of a question."""
    if getattr(processor, "chat_template", "") is not None:
        return False
    # before Transformers 5.23 it was declared among the keywords of the text
    declared = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    words = getattr(declared.get("text_kwargs"), "__annotations__", {})
    return "suffix" in {*inspect.signature(processor.__call__).parameters, *words}


def render(sample: Sample, processor: Processor) -> tuple[str, list[int]]:
    """Renders a chat.

    Returns:
        The text, pictures as single placeholders, and the token ids of the last answer; none where
        there is no answer. Of a processor that `takes_suffix` the text is the question alone.
    """
    if takes_suffix(processor):
        return _render_question(sample, processor)

    def apply_template(messages: Sequence[Message], prompt: bool) -> str:
        try:
            text = processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            problem = f"the processor's chat template fails on this sample ({first_line(error)})"
            raise ValueError(f"{sample.origin}: {problem}") from error
        _check_system(sample, str(text))
        return str(text)

    if sample.answer is None:
        return apply_template(sample.messages, True), []
    answer, tokenizer = sample.answer.strip(), processor.tokenizer
    prompt = apply_template(sample.messages[:-1], True)
    text = apply_template(sample.messages, False).rstrip()
    if answer not in text[_shared(prompt, text) :]:
        problem = f"the chat template does not show the answer {answer[:40]!r} after the prompt"
        raise sample_error(place(sample.origin), problem, "use another template")
    open_end = text.endswith(answer) and tokenizer.eos_token
    if open_end and _tokens(text, tokenizer)[-1] != tokenizer.eos_token_id:
        text += tokenizer.eos_token or ""
    ids = _tokens(text, tokenizer)
    return text, ids[_shared(ids, _tokens(prompt, tokenizer)) :]


def _check_system(sample: Sample, text: str) -> None:
    """Refuses a template that drops the system prompt without a word."""
    first = sample.messages[0]
    said = [part["text"].strip() for part in first["content"] if part["type"] == "text"]
    if first["role"] == "system" and not all(one in text for one in said):
        problem = "the chat template does not show the system prompt"
        raise sample_error(place(sample.origin), problem, "remove it, or use another template")


def _render_question(sample: Sample, processor: Any) -> tuple[str, list[int]]:
    tokenizer, turns = processor.tokenizer, len(sample.messages) - (sample.answer is not None)
    if turns > 1:
        name = type(processor).__name__
        problem = f"has {turns} messages before the answer, and {name} takes one question"
        raise sample_error(place(sample.origin), problem, "leave it out, or split it")
    parts = sample.messages[0]["content"]
    text = " ".join(part["text"] for part in parts if part["type"] == "text")
    text = processor.image_token * len(sample.pictures()) + text
    if sample.answer is None:
        return text, []
    answer = sample.answer + tokenizer.eos_token
    return text, list(tokenizer(answer, add_special_tokens=False)["input_ids"])


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the longest common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def adds_special_tokens(text: str, tokenizer: Any) -> bool:
    """Whether to add them: not if the template wrote the beginning-of-sequence token itself."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _tokens(text: str, tokenizer: Any) -> list[int]:
    special = adds_special_tokens(text, tokenizer)
    return list(tokenizer(text, add_special_tokens=special, truncation=False)["input_ids"])
