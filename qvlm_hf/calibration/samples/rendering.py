"""A chat -> its text, as the processor's template renders it, and the token ids of its last answer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qvlm_hf.calibration.samples.errors import first_line
from qvlm_hf.calibration.samples.sample import Message, Sample

__all__ = ["Processor", "Tokenizer", "adds_special_tokens", "check_processor", "render"]


class Tokenizer(Protocol):
    """What is used of a Transformers tokenizer."""

    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None

    def __call__(self, text: str, **options: object) -> Mapping[str, Any]:
        """Tokenizes `text`; "input_ids" holds the token ids."""


class Processor(Protocol):
    """What is used of a Transformers processor, and of `image_token` and `image_token_id` where it has them."""

    tokenizer: Tokenizer

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
    if getattr(processor, "chat_template", "") is None:
        remedy = "add chat_template.jinja to its files, set its chat_template, or take a chat model"
        raise ValueError(f"{name} has no chat template; {remedy}")
    if processor.tokenizer.pad_token is None:
        remedy = "set it in tokenizer_config.json or on the tokenizer, for example to the eos_token"
        raise ValueError(f"the tokenizer of {name} has no pad_token; {remedy}")


def render(sample: Sample, processor: Processor) -> tuple[str, list[int]]:
    """Returns the rendered chat, pictures as single placeholders, and the token ids of its last answer (empty if there is none)."""
    answer = sample.answer
    if answer is None:
        return _apply_template(
            sample.messages, processor, sample.origin, add_generation_prompt=True
        ), []
    prompt = _apply_template(
        sample.messages[:-1], processor, sample.origin, add_generation_prompt=True
    )
    text = _apply_template(
        sample.messages, processor, sample.origin, add_generation_prompt=False
    ).rstrip()
    shared = _shared(prompt, text)
    if answer.strip() not in text[shared:]:
        shown = repr(answer.strip()[:40])
        raise ValueError(
            f"{sample.origin}: the chat template does not show the answer {shown} after the "
            f"prompt; use another template"
        )
    tokenizer = processor.tokenizer
    if (
        text.endswith(answer.strip())
        and tokenizer.eos_token
        and _tokens(text, tokenizer)[-1] != tokenizer.eos_token_id
    ):
        text += tokenizer.eos_token
    ids, prompt_ids = _tokens(text, tokenizer), _tokens(prompt, tokenizer)
    shared = _shared(ids, prompt_ids)
    return text, ids[shared:]


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Returns the length of the longest common beginning."""
    return next(
        (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def _apply_template(
    messages: Sequence[Message], processor: Processor, origin: str, *, add_generation_prompt: bool
) -> str:
    try:
        text = processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is foreign code: it may raise anything
        raise ValueError(
            f"{origin}: the processor's chat template fails on this sample ({first_line(error)})"
        ) from error
    return str(text)


def adds_special_tokens(text: str, tokenizer: Tokenizer) -> bool:
    """False if the template wrote the beginning-of-sequence token itself, the rule of `apply_chat_template(tokenize=True)`."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(
        tokenizer(text, add_special_tokens=adds_special_tokens(text, tokenizer), truncation=False)[
            "input_ids"
        ]
    )
