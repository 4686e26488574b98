"""Which tokens matter to the answers: weights of the squared error that search and GPTQ minimise.

The error of a layer's output is dominated by picture tokens that no answer depends on. A token's
weight is the norm of the gradient of the answers' log-likelihood with respect to that layer's
output at the token. Answers are drawn from the full-precision model's own softened predictions, so
that confident samples count as well, and the dataset's labels do not.

Left out: directions inside a token. The full Fisher form, (gradient . error)^2, found 20 % worse
models from 64 samples than these norms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import frozen, live_layers, observe_outputs, run_model
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch

__all__ = ["token_importance"]

_DRAWS = 4  # answers drawn per sample
_TEMPERATURE = 3.0  # softens predictions that are all but certain
_FLOOR = 0.1  # of the mean weight: what no drawn answer looked at may matter to another question


def token_importance(calibration: Calibration) -> dict[str, list[Tensor]]:
    """Weights of the tokens that leave each live layer; the model is in full precision.

    Returns:
        Layer name -> per batch that reached its segment, float32 [B, T], mean 1 over all tokens
        before the floor. Each is 1 without answers. A layer that a batch passes over has the
        weights of the one before.
    """
    names = [layer.name for segment in calibration.segments for layer in live_layers(segment)]
    norms: dict[str, list[Tensor]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(calibration.settings.seed)
    with frozen(calibration.model):
        for batch in calibration.data:
            found = _gradient_norms(calibration.model, names, batch, generator)
            for segment in calibration.segments:
                norm = None
                for layer in live_layers(segment):
                    norm = found.get(layer.name, norm)
                    if norm is not None:
                        norms[layer.name].append(norm)
    return {name: _weights(batches) for name, batches in norms.items()}


def _gradient_norms(
    model: nn.Module, names: Sequence[str], batch: Batch, generator: torch.Generator
) -> dict[str, Tensor]:
    """Layer name -> [B, T], the root of the summed squared gradients of all draws."""
    with torch.enable_grad(), observe_outputs(model, names) as outputs:
        logits = run_model(model, batch).logits
        answered = (batch.labels[:, 1:] != IGNORE_INDEX).to(logits.device)
        predictions = torch.log_softmax(logits[:, :-1][answered].float() / _TEMPERATURE, dim=-1)
        squares = {name: torch.zeros(h.shape[:-1], device=h.device) for name, h in outputs.items()}
        for _ in range(_DRAWS if len(predictions) else 0):
            chances = predictions.detach().exp().cpu()
            drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
            gradients = torch.autograd.grad(
                predictions.gather(1, drawn).sum(),
                list(outputs.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for name, gradient in zip(outputs, gradients, strict=True):
                squares[name] += gradient.float().square().sum(-1)
    return {name: square.sqrt().detach() for name, square in squares.items()}


def _weights(norms: Sequence[Tensor]) -> list[Tensor]:
    total, count = sum(float(norm.sum()) for norm in norms), sum(norm.numel() for norm in norms)
    if total == 0:
        return [torch.ones_like(norm) for norm in norms]
    return [(norm * (count / total)).clamp(min=_FLOOR) for norm in norms]
