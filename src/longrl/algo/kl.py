"""Estimates of a KL divergence from the log-probabilities of sampled tokens."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: exp(20) = 5e8 is beyond any clip and finite in every dtype but fp16."""


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = ref_logprobs - logprobs.

    Unbiased for KL(policy || reference) over samples of the policy, and never negative.

    Reference: Schulman, "Approximating KL divergence" (2020), k3; GRPO, arXiv 2402.03300, Eq. 4.
    Differs: d is clamped to +-20.

    Args:
        logprobs: [...], of the policy that sampled.
        ref_logprobs: [...], of the reference.

    Returns:
        [...]
    """
    d = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return d.expm1() - d
