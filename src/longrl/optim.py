"""The optimizer step: divide once by the global count, refuse what is not finite, clip, update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from longrl.config import OptimConfig


class Optimizer:
    """AdamW with a schedule; gradients arrive as sums over the step's tokens (or sequences)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], config: OptimConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.parameters = list(parameters)
        decay = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)

    def learning_rate(self, step: int) -> float:
        """Of step 1, 2, ...: linear warm-up to lr, then the schedule down to min_lr_ratio * lr at the last step."""
        config = self.config
        if step <= config.warmup_steps:
            return config.lr * step / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
        floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
        return config.lr * (floor + (1 - floor) * shape)

    def step(self, step: int, count: int) -> tuple[float, float]:
        """Updates the weights from the accumulated gradients and clears them.

        Args:
            step: 1, 2, ...
            count: what the summed loss is divided by. 0: nothing was trained, and nothing changes.

        Returns:
            Gradient norm before clipping, learning rate.

        Raises:
            RuntimeError: a gradient is not finite; the weights have not changed.
        """
        lr = self.learning_rate(step)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if count == 0 or not grads:
            return 0.0, lr
        for grad in grads:
            grad.div_(count)
        norm = self._norm(grads)
        if not math.isfinite(norm):
            self.adamw.zero_grad()
            raise RuntimeError(f"step {step}: the gradient norm is {norm}; the weights were not changed")
        if norm > self.config.max_grad_norm:
            for grad in grads:
                grad.mul_(self.config.max_grad_norm / (norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        return norm, lr

    @staticmethod
    def _norm(grads: list[Tensor]) -> float:
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])))
