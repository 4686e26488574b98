"""Running a model of an unknown family until every part of it was seen."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from qvlm_hf.errors import one_line
from qvlm_hf.models.parts import PartNames
from qvlm_hf.models.trace_inputs import accepted, count_rows, picture_guesses, text_inputs
from qvlm_hf.models.tracing import Recorder

__all__ = ["run_all_parts"]

_TOKEN_COUNTS = (
    "image_seq_length", "mm_tokens_per_image", "num_image_tokens", "latent_query_num",
    "num_query_tokens",
)  # fmt: skip


def run_all_parts(
    model: nn.Module, recorder: Recorder, parts: PartNames
) -> tuple[str, dict[str, Any], list[str]]:
    """Runs the model as a whole where its inputs can be guessed, else in parts.

    Returns:
        "model" or "parts"; what the whole model ran on; what went wrong on the way.
    """
    trial = _Trial(model, recorder, parts)
    guess = trial.with_features() or trial.with_token_counts()
    if guess is not None:
        return "model", guess, trial.problems
    return "parts", trial.in_parts(), trial.problems


class _Trial:
    """Guesses, one after the other; `problems` holds the error of each that failed."""

    def __init__(self, model: Any, recorder: Recorder, parts: PartNames) -> None:
        self.problems: list[str] = []
        self._model = model
        self._recorder = recorder
        self._vision = parts.vision
        self._encoder: Any = model.get_submodule(parts.vision) if parts.vision else None
        self._decoder = model.get_submodule(parts.language)
        self._picture: tuple[Callable[..., Any], dict[str, Any]] | None = None
        owners = dict.fromkeys((model, getattr(model, "base_model", model)))
        functions = (getattr(owner, "get_image_features", None) for owner in owners)
        self._features = [each for each in functions if each and _takes_pixels(each)]

    def with_features(self) -> dict[str, Any] | None:
        """The whole model on a picture whose tokens `get_image_features` tells."""
        model, forward = self._model, self._model.forward
        for function in self._features:
            for guess in picture_guesses(model, function):
                answer = self._attempt(function, guess)
                if answer is None:
                    continue
                self._picture = self._picture or (function, guess)
                seen = self._recorder.trace.linears.keys()
                whole = text_inputs(model, forward, count_rows(answer)) | accepted(forward, guess)
                ran = self._attempt(model, whole) is not None
                if ran and seen <= self._recorder.trace.linears.keys():
                    return whole
        return None

    def with_token_counts(self) -> dict[str, Any] | None:
        """The whole model on a picture of as many tokens as it may become."""
        if self._features or self._vision is None:
            return None
        model, forward = self._model, self._model.forward
        for guess in picture_guesses(model, forward):
            for tokens in dict.fromkeys(_token_counts(model, guess)):
                whole = guess | text_inputs(model, forward, tokens)
                if self._attempt(model, whole) is not None:
                    linears = self._recorder.trace.linears
                    if any(name.startswith(f"{self._vision}.") for name in linears):
                        return whole
        return None

    def in_parts(self) -> dict[str, Any]:
        """A picture and a text apart; returns what the whole model ran on, the text or nothing."""
        if self._picture is None and self._encoder is not None:
            for guess in picture_guesses(self._model, self._encoder.forward):
                if self._attempt(self._encoder, guess) is not None:
                    self._picture = (self._encoder, guess)
                    break
        self._recorder.forget()
        if self._picture is not None:
            self._attempt(*self._picture, forget=False)
        text = text_inputs(self._model, self._model.forward, 0)
        if self._attempt(self._model, text, forget=False) is not None:
            return text
        alone = text_inputs(self._model, self._decoder.forward, 0)
        self._attempt(self._decoder, alone, forget=False)
        return {}

    def _attempt(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], *, forget: bool = True
    ) -> Any:
        if forget:
            self._recorder.forget()
        try:
            return self._recorder.run(lambda: function(**arguments))
        except Exception as error:  # a guess that does not fit fails in any way
            self.problems.append(one_line(error))
            return None


def _takes_pixels(function: Callable[..., Any]) -> bool:
    """Whether a function says what it takes; some pass everything on."""
    return bool(accepted(function, {"pixel_values": None, "flattened_patches": None}))


def _token_counts(model: nn.Module, guess: Mapping[str, Any]) -> Iterator[int]:
    """How many tokens a picture may become."""
    config: Any = model.config
    values = (getattr(config, name, None) for name in _TOKEN_COUNTS)
    yield from (value for value in values if isinstance(value, int))
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    pixels = guess.get("pixel_values")
    if pixels is not None and isinstance(patch, int) and pixels.dim() >= 4:
        side = pixels.shape[-1] // patch
        yield side * side
        yield side * side // 4
    yield 0
