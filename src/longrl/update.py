"""What an RL step learns from one cohort: groups that share a prefix, their advantages -> gradients that add up.

    update         the first of a batch, with the weights that sampled: over the prefix of the rollout, or, where
                   rewards were late, over one that is computed again
    update_again   any further one (`algo.updates_per_batch`), with weights that have moved: the prefix once more,
                   and ratios to the log-probs of the first

Between updates a cohort is prompts, tokens and a few [N, R] tables: no keys, no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algo.losses import denominator, policy_loss
from longrl.config import RlConfig
from longrl.models.streams import Streams, make_streams
from longrl.optim import require_finite
from longrl.policy import Policy, StreamLoss
from longrl.totals import Totals
from longrl.types import Group, LossInputs, Prefix, Prompt, Scored


@dataclass(slots=True, kw_only=True)
class Cohort:
    """What is trained of the groups that share a prefix: rollout rows[n] is row n of the streams."""

    prompts: list[Prompt]
    """Of all groups: they say how long the prefix is."""
    rows: list[tuple[Group, Scored]]
    streams: Streams
    ref_logprobs: Tensor | None
    old_logprobs: Tensor | None = None
    """[N, R], the trainer's, under the weights that sampled; None until the first update has computed them."""


def update(
    policy: Policy,
    reference: Policy | None,
    groups: Sequence[Group],
    scored: Sequence[list[Scored]],
    prefix: Prefix | None,
    config: RlConfig,
    totals: Totals,
) -> list[Cohort]:
    """Accumulates the gradient of one cohort's groups and releases their prefix.

    Every scored rollout counts in the denominator; those of a group without signal (all advantages zero and no KL term)
    are not run.

    Args:
        prefix: of the rollout; None: it was released, and is computed again if there is something to train.

    Returns:
        What `update_again` needs; empty: nothing was trained.

    Raises:
        RuntimeError: engine and trainer log-probs differ by more than algo.max_logprob_diff, or the loss is not finite.
    """
    rows: list[tuple[Group, Scored]] = []
    for group, ones in zip(groups, scored, strict=True):
        trained = [(group, one) for one in ones if one.reward is not None]
        lengths = [len(one.rollout.token_ids) for _, one in trained]
        totals.denominator += denominator(lengths, config.algo.normalise)
        informative = reference is not None or any(one.advantage for one in ones)
        totals.means["groups/informative"].add(informative)
        rows += trained if informative else []
    if not rows:
        if prefix is not None:
            prefix.release()
        return []
    prompts = [group.prompt for group in groups]
    prefix = policy.prefix(prompts) if prefix is None else prefix
    streams = make_streams(
        [group.prompt for group, _ in rows], [one.rollout.token_ids for _, one in rows], prefix.length
    )
    ref_logprobs = None
    if reference is not None:
        with torch.no_grad():
            ref_prefix = reference.prefix(prompts)
            assert ref_prefix.length == prefix.length
            ref_logprobs, _ = reference.logprobs(ref_prefix, streams, config.rollout.temperature)
            reference.reshard()
            ref_prefix.release()
    cohort = Cohort(prompts=prompts, rows=rows, streams=streams, ref_logprobs=ref_logprobs)
    cohort.old_logprobs = _backward(policy, cohort, prefix, config, totals)
    return [cohort]


def update_again(policy: Policy, cohort: Cohort, config: RlConfig, totals: Totals) -> None:
    """Accumulates the gradient of a cohort under weights that have moved since it was sampled.

    Raises:
        RuntimeError: the loss is not finite.
    """
    _backward(policy, cohort, policy.prefix(cohort.prompts), config, totals)


def _backward(policy: Policy, cohort: Cohort, prefix: Prefix, config: RlConfig, totals: Totals) -> Tensor:
    """Returns the log-probs [N, R] under the current weights."""
    seen: list[Tensor] = []
    loss = _loss(cohort, config, totals, seen)
    policy.backward(prefix, cohort.streams, loss, config.rollout.temperature)
    return torch.cat(seen)


def _loss(cohort: Cohort, config: RlConfig, totals: Totals, seen: list[Tensor]) -> StreamLoss:
    """The loss of a cohort's streams, which it checks before they are differentiated, and whose log-probs it notes."""
    streams, rows = cohort.streams, cohort.rows
    engine = torch.zeros(streams.mask.shape, dtype=torch.float64)
    engine[streams.mask] = torch.tensor([x for _, one in rows for x in one.rollout.logprobs], dtype=torch.float64)
    advantages = torch.tensor([one.advantage for _, one in rows])
    ids = sorted({group.id for group, _ in rows})

    def loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        mask, current = streams.mask[part], logprobs.detach()
        if cohort.old_logprobs is None:
            difference = (current - engine[part])[mask].abs().max().item()
            if not difference <= config.algo.max_logprob_diff:  # true of NaN too
                raise RuntimeError(
                    f"engine and trainer log-probs differ by {difference:.2e}, more than algo.max_logprob_diff "
                    f"{config.algo.max_logprob_diff:g} (groups {', '.join(ids)}); the weights were not changed"
                )
            totals.logprob_diff = max(totals.logprob_diff or 0.0, difference)
        seen.append(current)
        inputs = LossInputs(
            logprobs=logprobs,
            # in the first update the sampling policy is the current one
            old_logprobs=current if cohort.old_logprobs is None else cohort.old_logprobs[part],
            ref_logprobs=None if cohort.ref_logprobs is None else cohort.ref_logprobs[part],
            advantages=advantages[part],
            mask=mask,
        )
        output = policy_loss(inputs, config.algo)
        loss_sum = output.loss_sum.item()
        require_finite("the loss", loss_sum, ids)
        totals.loss_sum += loss_sum
        totals.trained_tokens += int(mask.sum())
        totals.token_sums["entropy"] += entropy.sum().item()
        for name, value in output.metrics.items():
            totals.token_sums[name] += value
        return output.loss_sum

    return loss
