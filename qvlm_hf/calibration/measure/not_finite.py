"""NaN or infinity in a calibration: the first module that makes it is named.

The search sees it where it enters a layer, far behind its source: an overflow of float16 in the
vision encoder shows up in the language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import NotFiniteError, run_model
from qvlm_hf.calibration.samples import Batch, Processor, Sample, batches
from qvlm_hf.models.graph import canonical_name

__all__ = ["naming_the_source"]


@contextmanager
def naming_the_source(
    model: nn.Module, samples: Sequence[Sample], processor: Processor
) -> Iterator[None]:
    """Inside, an error about NaN or infinity gets the name of the module that makes it.

    One of `samples` then runs through the model again, in full precision.

    Raises:
        ValueError: with the name; without it, as it came, where full precision makes none.
    """
    try:
        yield
    except NotFiniteError as error:
        seen = [sample for sample in samples if sample.origin in error.origins]
        for batch in batches(seen, processor, 1):
            if source := _first_source(model, batch):
                raise ValueError(f"{source} makes NaN or infinity: {error}") from error
        raise


def _first_source(model: nn.Module, batch: Batch) -> str | None:
    """The innermost module whose output is not finite though its input is; None if there is none.

    A module tells when it has run, those inside it before it: the first that tells is the source.
    """
    found: list[str] = []

    def look(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entering = args[0] if args else next(iter(kwargs.values()), None)
        if not found and _is_finite(entering) and not _is_finite(output):
            found.append(canonical_name(name))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hook = module.register_forward_hook(partial(look, name), with_kwargs=True)
            hooks.callback(hook.remove)
        run_model(model, batch)
    return next(iter(found), None)


def _is_finite(value: Any) -> bool:
    """Of a tensor, or of the first tensor in what a module returns; others are finite."""
    if isinstance(value, tuple | list):
        value = next(iter(value), None)
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
