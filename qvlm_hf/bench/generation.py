"""One greedy answer, with marks where the phases meet.

The loop is written out instead of calling `model.generate`: generate works around the model
(stopping rules, logits processors, masks) for milliseconds that are the same for every way, and
that would be counted to the first token or to all others. Here the model is called as generate
calls it, with its key-value cache and the logits of the last position alone:

    start | vision encoder, projector, embeddings | decoder over the prompt, argmax | one step a
    token: decoder, argmax | end
          ^ first token = vision + prefill        ^ prefill                         ^ decode, over the number of steps

The phases come from one pass: a hook marks the moment when the decoder is called. No step waits for
another but through its token.
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
    """Seconds of one answer.

    Attributes:
        vision: until the decoder is called: vision encoder, projector, embeddings.
        prefill: the decoder over the whole prompt, and the choice of the first token.
        decode: one further token, the mean of all.
        cache_bytes: of the key-value cache, the mean of the first and the last step.
        tokens: what was generated, [batch, new_tokens].
    """

    vision: float
    prefill: float
    decode: float
    cache_bytes: float
    tokens: Tensor

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
    """Answers greedily; an end-of-sequence token ends nothing, so that every way does the same work.

    Args:
        model: an image-text-to-text model.
        inputs: what the model is called with; prompts of one length, no padding.
        new_tokens: at least 2.
        cache: empty.
        clock: of the model's device.
        step: what decodes, for example the compiled `model.forward`; default: the model.

    Returns:
        The times of the phases.

    Raises:
        ValueError: the model did not fill the cache.
    """
    step, marks = step or model, []
    cached = {cache_argument(model): cache, "use_cache": True}
    clock.wait()
    start = clock.mark()
    # the decoder is called once: what lies before is the vision encoder's
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: marks.append(clock.mark()))
    try:
        logits = model(**inputs, **cached, logits_to_keep=1).logits
    finally:
        hook.remove()
    tokens = [logits[:, -1].argmax(-1, keepdim=True)]
    first = clock.mark()
    before = cache_bytes(cache)
    for _ in range(new_tokens - 1):
        logits = step(input_ids=tokens[-1], **cached).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    last = clock.mark()
    clock.wait()
    positions = inputs["input_ids"].shape[1] + new_tokens - 1
    if int(cache.get_seq_length()) != positions:
        raise ValueError(
            f"the key-value cache holds {int(cache.get_seq_length())} positions instead of "
            f"{positions}: it was not used."
        )
    return Pass(
        vision=clock.seconds(start, marks[0]),
        prefill=clock.seconds(marks[0], first),
        decode=clock.seconds(first, last) / (new_tokens - 1),
        cache_bytes=(before + cache_bytes(cache)) / 2,
        tokens=torch.cat(tokens, -1).cpu(),
    )


def cache_argument(model: Any) -> str:
    """What the model's forward pass calls its key-value cache: "cache" from Transformers 5.24 on."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
