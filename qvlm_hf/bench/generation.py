"""One greedy answer, timed in three phases.

    vision     vision encoder, projector, embeddings: until the decoder is called
    prefill    the decoder over the prompt, argmax; first token = vision + prefill
    decode     one step per token: decoder, argmax; the mean of all steps

The loop replaces `model.generate`, whose logits processors, masks and stopping rules cost every
contender the same milliseconds. The model is called as generate calls it: with its key-value cache,
for the logits of the last position. No step waits for the device.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm_hf.bench.machine import Clock

__all__ = ["Pass", "cache_argument", "cache_bytes", "generate"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One answer."""

    vision: float  # seconds until the decoder is called
    prefill: float  # seconds of the decoder over the prompt
    decode: float  # seconds per further token
    cache_bytes: float  # of the key-value cache, the mean of the first and the last step
    tokens: Tensor  # generated, [batch, new_tokens]

    @property
    def first_token(self) -> float:
        """Seconds until the first token."""
        return self.vision + self.prefill


@torch.no_grad()
def generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    new_tokens: int,
    cache: Any,
    clock: Clock,
    step: Callable[..., Any] | None = None,
) -> Pass:
    """Answers greedily, past end-of-sequence tokens, so that every contender does the same work.

    Args:
        model: an image-text-to-text model.
        inputs: what the model is called with; prompts of one length, no padding.
        new_tokens: at least 2.
        cache: empty.
        clock: of the model's device.
        step: decodes instead of the model, for example the compiled `model.forward`.

    Raises:
        ValueError: the model did not fill the cache.
    """
    step, marks = step or model, []
    cached = {cache_argument(model): cache, "use_cache": True}
    clock.wait()
    start = clock.mark()
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: marks.append(clock.mark()))
    try:
        logits = model(**inputs, **cached, logits_to_keep=1).logits
    finally:
        hook.remove()
    tokens = [logits[:, -1].argmax(-1, keepdim=True)]
    first = clock.mark()
    bytes_before = cache_bytes(cache)
    for _ in range(new_tokens - 1):
        logits = step(input_ids=tokens[-1], **cached).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    last = clock.mark()
    clock.wait()
    found, expected = int(cache.get_seq_length()), inputs["input_ids"].shape[1] + new_tokens - 1
    if found != expected:
        raise ValueError(
            f"the key-value cache holds {found} positions instead of {expected}: it was not used."
        )
    return Pass(
        vision=clock.seconds(start, marks[0]),
        prefill=clock.seconds(marks[0], first),
        decode=clock.seconds(first, last) / (new_tokens - 1),
        cache_bytes=(bytes_before + cache_bytes(cache)) / 2,
        tokens=torch.cat(tokens, -1).cpu(),
    )


def cache_argument(model: Any) -> str:
    """The forward pass's name for its key-value cache: "cache" from Transformers 5.24 on."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
