"""The optimizer step: schedule, division, clipping, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from longrl.config import OptimConfig
from longrl.optim import Optimizer


def optimizer(total_steps: int = 10, **settings) -> tuple[Optimizer, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    return Optimizer([weight], OptimConfig(lr=0.1, weight_decay=0.0, **settings), total_steps), weight


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 9])
def test_every_step_has_a_rate_and_it_rises_then_falls(schedule, warmup):
    rates = [optimizer(schedule=schedule, warmup_steps=warmup)[0].learning_rate(step) for step in range(1, 11)]
    assert rates[:warmup] == pytest.approx([0.1 * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup] == 0.1  # the first step of the schedule has all of it
    after = rates[warmup:]
    assert min(rates) > 0
    assert after == sorted(after, reverse=True)
    assert (after[-1] < 0.1) == (schedule != "constant" and len(after) > 1)


def test_rates_by_hand():
    linear, _ = optimizer(5, schedule="linear", warmup_steps=1, min_lr_ratio=0.2)
    assert [linear.learning_rate(step) for step in range(1, 6)] == pytest.approx([0.1, 0.1, 0.08, 0.06, 0.04])
    cosine, _ = optimizer(4, schedule="cosine")
    assert cosine.learning_rate(3) == pytest.approx(0.05)


def test_gradients_are_divided_then_clipped():
    """What AdamW remembers after its first step is a tenth of the gradient that it got."""
    update, weight = optimizer(max_grad_norm=0.5)
    weight.grad = torch.tensor([[6.0, 8.0]])
    norm, lr = update.step(1, 10, ["a"])
    assert (norm, lr) == (pytest.approx(1.0), 0.1)
    got = update.adamw.state[weight]["exp_avg"] / (1 - 0.9)
    torch.testing.assert_close(got, torch.tensor([[0.3, 0.4]]), rtol=1e-5, atol=0)
    assert weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_names_the_examples_and_changes_nothing(bad):
    update, weight = optimizer()
    weight.grad = torch.tensor([[1.0, bad]])
    with pytest.raises(RuntimeError, match=r"gradient norm of step 7 is (nan|inf) \(examples q1, q2\)"):
        update.step(7, 1, ["q1", "q2"])
    assert torch.equal(weight.detach(), torch.tensor([[3.0, 4.0]]))


def test_nothing_trained_nothing_changes():
    update, weight = optimizer()
    assert update.step(1, 0, []) == (0.0, 0.1)
    assert torch.equal(weight.detach(), torch.tensor([[3.0, 4.0]]))
