"""Policy losses: what the trainer differentiates. All un-normalised: sums, which the caller divides once, at the end.

output = policy_loss(inputs, algo)          # per group, or per micro-batch of whole sequences
output.loss_sum.backward()                  # gradients add up
total += denominator(lengths, algo.normalise)   # of all scored responses, with or without a gradient
...                                         # after the last group: divide the gradients by the global total
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from longrl.algo.kl import MAX_LOG_RATIO, k3
from longrl.config import AlgoConfig
from longrl.registry import resolve
from longrl.types import LossInputs, LossOutput

Normalise = Literal["token", "sequence"]

DUAL_CLIP = 3.0
"""c of dual-clip PPO; the paper's value."""


def token_weights(mask: Tensor, normalise: Normalise, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose plain sum over tokens, divided by the global `denominator`, is the mean that `normalise` names.

    token: 1 for each trained token: the mean over all tokens of the batch (DAPO, arXiv 2503.14476, Eq. 8).
    sequence: 1 / (trained tokens of its row): the mean over sequences of the means over their tokens (GRPO, arXiv
    2402.03300, Eq. 3).

    Args:
        mask: bool [N, R].
        normalise: token | sequence.
        dtype: Of the result.

    Returns:
        [N, R]
    """
    weights = mask.to(dtype)
    return weights if normalise == "token" else weights / weights.sum(-1, keepdim=True).clamp(min=1)


def denominator(lengths: Sequence[int], normalise: Normalise) -> int:
    """What the summed loss is divided by, after adding up over all groups and ranks.

    Args:
        lengths: [N], trained tokens of each sequence.
        normalise: token: trained tokens; sequence: sequences with at least one.
    """
    return sum(lengths) if normalise == "token" else sum(length > 0 for length in lengths)


def clip(inputs: LossInputs, algo: AlgoConfig) -> LossOutput:
    """PPO's clipped surrogate with separate bounds, and a floor for bad tokens that became likely.

    r = exp(logprobs - old_logprobs); s = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); if A < 0, s = max(s, 3 A).
    loss = -sum of weight * s over the trained tokens.

    Reference: PPO, arXiv 1707.06347, Eq. 7; clip-higher: DAPO, arXiv 2503.14476, Eq. 8 and 10; dual clip: arXiv
    1912.09729, section "Dual-clip PPO" (c = 3).
    Differs: log r is clamped to +-20.

    Args:
        inputs: [N, R], whole sequences.
        algo: clip_low, clip_high, normalise.

    Returns:
        The sum, and sums over tokens of: ratio; clip/low, clip/high, clip/dual (tokens without gradient because of each
        bound); approx_kl (k3 estimate of KL(old || current)).
    """
    # Selected before exp, so that whatever stands in untrained positions reaches neither the loss nor the gradient.
    log_ratio = torch.where(inputs.mask, inputs.logprobs - inputs.old_logprobs, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = inputs.advantages.unsqueeze(-1).to(ratio.dtype)
    clipped = ratio.clamp(1 - algo.clip_low, 1 + algo.clip_high) * advantages
    surrogate = torch.minimum(ratio * advantages, clipped)
    bounded = torch.where(advantages < 0, torch.maximum(surrogate, DUAL_CLIP * advantages), surrogate)
    weights = token_weights(inputs.mask, algo.normalise, ratio.dtype)
    with torch.no_grad():
        metrics = {
            "ratio": ratio,
            "clip/low": (advantages < 0) & (ratio < 1 - algo.clip_low),
            "clip/high": (advantages > 0) & (ratio > 1 + algo.clip_high),
            "clip/dual": (advantages < 0) & (ratio > DUAL_CLIP),
            "approx_kl": k3(torch.zeros_like(log_ratio), log_ratio),
        }
    return LossOutput(
        loss_sum=-(weights * bounded).sum(), metrics={name: _masked_sum(x, inputs.mask) for name, x in metrics.items()}
    )


LOSSES: dict[str, Callable[[LossInputs, AlgoConfig], LossOutput]] = {
    "clip": clip,
}


def policy_loss(inputs: LossInputs, algo: AlgoConfig) -> LossOutput:
    """The loss that the configuration names, plus kl_coef * k3(policy, reference) per token if `algo.kl` is k3.

    Reference: GRPO, arXiv 2402.03300, Eq. 3: the KL term has the weights and the denominator of the surrogate.

    Args:
        inputs: [N, R], whole sequences; ref_logprobs are needed for the KL term.
        algo: loss, kl, kl_coef and what the loss itself reads.

    Returns:
        The sum over trained tokens, and the loss's metrics; with a KL term also `kl`.

    Raises:
        ValueError: Unknown loss.
    """
    output: LossOutput = resolve(algo.loss, LOSSES, "loss")(inputs, algo)
    if algo.kl == "off":
        return output
    assert inputs.ref_logprobs is not None, "algo.kl is on, but no reference log-probs were computed"
    logprobs = torch.where(inputs.mask, inputs.logprobs, 0.0)
    divergence = k3(logprobs, torch.where(inputs.mask, inputs.ref_logprobs, 0.0))
    weights = token_weights(inputs.mask, algo.normalise, divergence.dtype)
    metrics = output.metrics | {"kl": _masked_sum(divergence, inputs.mask)}
    return LossOutput(loss_sum=output.loss_sum + algo.kl_coef * (weights * divergence).sum(), metrics=metrics)


def _masked_sum(values: Tensor, mask: Tensor) -> float:
    return (values.detach() * mask).sum().item()
