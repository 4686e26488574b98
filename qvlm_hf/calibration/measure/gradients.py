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

from qvlm_hf.calibration.layers import frozen, live_layers, observe_outputs, recomputed
from qvlm_hf.calibration.measure.answers import run_answers
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import Batch

__all__ = ["answer_gradients"]


def answer_gradients(
    calibration: Calibration,
    batches: Sequence[Batch],
    *,
    draws: int,
    temperature: float = 1.0,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Runs the model on batches and takes g; only one layer's activations are alive at a time.

    Args:
        calibration: its model in full precision, in eval mode.
        batches: with labels.
        draws: directions per answer token, each a backward pass.
        temperature: T.

    Yields:
        Batch after batch and draw after draw: the batch's index, and name of each live layer that
        it reaches -> g, in the shape of the layer's output, [B, T, H]. Zeros where there is no
        answer.
    """
    model, segments = calibration.model, calibration.segments
    names = [layer.name for segment in segments for layer in live_layers(segment)]
    generator = torch.Generator().manual_seed(calibration.settings.seed)
    with frozen(model):
        for index, batch in enumerate(batches):
            with (
                recomputed(segments),
                observe_outputs(model, names) as outputs,
                torch.enable_grad(),
            ):
                answers = run_answers(model, batch, use_cache=False)
                logits = torch.cat(answers).float() / temperature
            for draw in range(draws):
                gradients = torch.autograd.grad(
                    logits,
                    list(outputs.values()),
                    _direction(logits.detach(), generator),
                    retain_graph=draw + 1 < draws,
                    allow_unused=True,
                    materialize_grads=True,
                )
                yield index, dict(zip(outputs, gradients, strict=True))


def _direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v for logits [tokens, vocabulary]: mean 0, covariance diag(p) - p p^T, from random signs."""
    chances = torch.softmax(logits, dim=-1)
    roots = chances.sqrt()
    signs = torch.randint(0, 2, roots.shape, generator=generator).to(roots) * 2 - 1
    return roots * signs - chances * (roots * signs).sum(-1, keepdim=True)
