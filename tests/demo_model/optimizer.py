"""AdamW, its schedule, and one step of it with the gradients of all workers."""

import math

import torch
from torch import distributed, nn

from demo_model.recipe import TrainOptions

__all__ = ["make_optimizer", "make_schedule", "take_step"]


def make_optimizer(parts: dict[nn.Module, float], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW for modules, each with its share of the learning rate; weight decay on matrices only."""
    groups = []
    for part, share in parts.items():
        for decay, is_matrix in ((options.weight_decay, True), (0.0, False)):
            chosen = [p for p in part.parameters() if (p.ndim > 1) == is_matrix]
            if chosen:
                groups.append(
                    {"params": chosen, "weight_decay": decay, "lr": options.learning_rate * share}
                )
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over 4 % of the steps, then a cosine to 2 % of the peak."""
    warm = max(1, round(0.04 * steps))

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warm) / max(1, steps - warm)))
        return min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def take_step(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Do one optimizer step with the mean gradient of all workers, its norm clipped to 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in trained])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = gradient.view_as(parameter)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
