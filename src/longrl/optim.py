"""The optimizer step: divide once by the global count, refuse what is not finite, clip, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor

from longrl.config import OptimConfig


class Optimizer:
    """AdamW with a schedule; gradients arrive as sums over the step's tokens (or sequences)."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        encoder: Iterable[torch.nn.Parameter] = (),
    ) -> None:
        """
        Args:
            parameters: those that require gradients are updated; perhaps sharded.
            encoder: more of them, on every rank whole.
        """
        self.config, self.total_steps = config, total_steps
        self.parameters, self.encoder = ([p for p in ps if p.requires_grad] for ps in (parameters, encoder))
        groups = []
        for some in filter(None, (self.parameters, self.encoder)):
            decay, rest = ([p for p in some if (p.ndim > 1) == large] for large in (True, False))
            groups += [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)

    def learning_rate(self, step: int) -> float:
        """Of step 1, 2, ...: linear warm-up to lr, then from lr down the schedule.

        The step after the last would have min_lr_ratio * lr, so that no step is spent on a rate of 0.
        """
        config = self.config
        if step <= config.warmup_steps:
            return config.lr * step / config.warmup_steps
        done = (step - config.warmup_steps - 1) / (self.total_steps - config.warmup_steps)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
        floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
        return config.lr * (floor + (1 - floor) * shape)

    def step(self, step: int, count: int, ids: Sequence[str]) -> tuple[float, float]:
        """Updates the weights from the accumulated gradients and clears them.

        Args:
            step: 1, 2, ...
            count: what the summed loss is divided by. 0: nothing was trained, and nothing changes.
            ids: of the batch's examples, for the message.

        Returns:
            Gradient norm before clipping, learning rate.

        Raises:
            RuntimeError: a gradient is not finite; the weights have not changed.
        """
        lr = self.learning_rate(step)
        grads = [[p.grad for p in some if p.grad is not None] for some in (self.parameters, self.encoder)]
        grads = [some for some in grads if some]
        if count == 0 or not grads:
            return 0.0, lr
        for grad in (grad for some in grads for grad in some):
            grad.div_(count)
        norms = [torch.nn.utils.get_total_norm(some) for some in grads]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
        norm = total.item()
        require_finite(f"the gradient norm of step {step}", norm, ids)
        for some in (self.parameters, self.encoder):
            torch.nn.utils.clip_grads_with_norm_(some, self.config.max_grad_norm, total)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        return norm, lr


def require_finite(what: str, value: float, ids: Sequence[str]) -> None:
    """Called before anything is learned from a value.

    Raises:
        RuntimeError: it is infinite or not a number; names the examples.
    """
    if not math.isfinite(value):
        raise RuntimeError(f"{what} is {value} (examples {', '.join(ids)}); the weights were not changed")
