"""Gradients of the answers: which tokens and which directions of a hidden state they depend on.

Let z be the logits of an answer token, p = softmax(z / T) and F = diag(p) - p p^T, the Fisher
information of its distribution. A random direction v with mean 0 and covariance F is drawn for
every answer token, and g is the gradient of (v . z / T) with respect to a layer's output. Then for
a small error e of that output

    KL(answers || answers with the error) = 1/2 E (g . e)^2  at T = 1

and E |g|^2 is the trace of the Fisher information. Directions vary less than drawn answers do,
which agree all but always where the model is certain.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qvlm_hf.calibration.backward import frozen
from qvlm_hf.calibration.measure.answers import run_answers
from qvlm_hf.calibration.measure.pull_back import cut_at_layers, pull_back
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch

__all__ = ["answer_gradients"]


def answer_gradients(
    calibration: Calibration, batches: Sequence[Batch], *, draws: int, temperature: float = 1.0
) -> Iterator[tuple[int, str, list[Tensor]]]:
    """Runs the model on batches and takes g; only one layer's activations are alive at a time.

    Args:
        calibration: its model in full precision, in eval mode.
        batches: with labels, of all processes; their own ones alone run.
        draws: directions per answer token; all go back through a layer together.
        temperature: T.

    Yields:
        Batch after batch, layer after layer from the last to the first: the batch's index, the
        name of a live layer that it reaches, and g of each draw, in the shape of the layer's
        output, [B, T, H]. Zeros where there is no answer.
    """
    model = calibration.model
    generator = torch.Generator().manual_seed(calibration.settings.seed)
    foreign = {id(batch) for batch in calibration.data}
    foreign -= {id(batch) for batch in calibration.own_data}
    skipped = 0
    with frozen(model):
        for index, batch in enumerate(batches):
            if id(batch) in foreign:
                skipped += int((batch.labels != IGNORE_INDEX).sum())
                continue
            with cut_at_layers(calibration.segments) as runs, torch.enable_grad():
                logits = torch.cat(run_answers(model, batch, use_cache=False)).float() / temperature
            for _ in range(draws):  # every process gives a batch the directions of one process
                _signs((skipped, logits.shape[1]), generator)
            skipped = 0
            directions = (_direction(logits.detach(), generator) for _ in range(draws))
            for name, gradients in pull_back(runs, logits, directions):
                yield index, name, gradients


def _direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v for logits [tokens, vocabulary]: mean 0, covariance diag(p) - p p^T, from random signs."""
    chances = torch.softmax(logits, dim=-1)
    roots = chances.sqrt()
    signs = _signs(roots.shape, generator).to(roots) * 2 - 1
    return roots * signs - chances * (roots * signs).sum(-1, keepdim=True)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator)
