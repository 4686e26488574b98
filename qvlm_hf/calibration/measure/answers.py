"""The logits that predict the answers of a batch, and the divergence of two models' answers."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import NotFiniteError, model_inputs
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch

__all__ = ["answer_kl", "answer_logits", "eval_mode", "run_answers"]


def answer_logits(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Runs the model in eval mode and without gradients; arguments, returns and raises as below."""
    with eval_mode(model), torch.inference_mode():
        return run_answers(model, batch)


def run_answers(model: nn.Module, batch: Batch, **options: Any) -> list[Tensor]:
    """Runs the model once and picks the logits that predict the answers.

    Args:
        model: called with the batch's tensors, returns `.logits`; runs where its parameters are.
        batch: with labels.
        options: further arguments of the model.

    Returns:
        Per row [answer tokens, vocabulary] in the model's dtype; empty for a row without an answer.

    Raises:
        NotFiniteError: logits that are not numbers.
    """
    inputs = model_inputs(model, batch)
    answered = batch.labels != IGNORE_INDEX
    tokens = batch.labels.shape[1]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # the head is the widest layer: it runs only from the first answer of the batch on
        first = int(answered.any(dim=0).nonzero()[0]) if answered.any() else tokens
        options["logits_to_keep"] = tokens - first + 1
    logits = model(**inputs, **options).logits
    offset = tokens - logits.shape[1]
    rows = []
    for row, origin in enumerate(batch.origins):
        # The logits at position p - 1 predict the token at p.
        own = logits[row, answered[row].nonzero().flatten().to(logits.device) - 1 - offset]
        if own.isnan().any():
            raise NotFiniteError(
                f"{origin}: the model's logits are not numbers (NaN); it is broken, or its dtype "
                f"overflows: try bfloat16",
                (origin,),
            )
        rows.append(own)
    return rows


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode; afterwards every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def answer_kl(reference_logits: Tensor, logits: Tensor) -> float:
    """Mean over answer tokens of KL(reference || model) in nats.

    Args:
        reference_logits: [tokens, vocabulary], those of the full-precision model.
        logits: same shape, those of the model in question.

    Returns:
        The mean divergence, computed in float64; 0 if and only if the distributions are equal.

    Raises:
        ValueError: if the shapes differ or there are no tokens.
    """
    if reference_logits.shape != logits.shape or logits.dim() != 2 or logits.shape[0] == 0:
        shapes = f"{tuple(reference_logits.shape)} and {tuple(logits.shape)}"
        raise ValueError(
            f"logits have the shapes {shapes}; both must be [tokens, vocabulary] with at least one "
            f"token"
        )
    reference = torch.log_softmax(reference_logits.double(), dim=-1)
    model = torch.log_softmax(logits.double(), dim=-1)
    # A token that the reference rules out (-inf) adds nothing, whatever the model says of it.
    terms = torch.where(reference == -torch.inf, 0.0, reference.exp() * (reference - model))
    return max(0.0, terms.sum(dim=-1).mean().item())
