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

from longrl.algo.kl import ESTIMATES
from longrl.algo.losses import denominator, policy_loss
from longrl.config import RlConfig
from longrl.models.streams import Streams, make_streams, split_length
from longrl.optim import require_finite
from longrl.policy import Policy, StreamLoss
from longrl.totals import Totals
from longrl.types import Group, LossInputs, Prefix, Prompt, Scored


@dataclass(slots=True, kw_only=True)
class Cohort:
    """What is trained of the groups that share a prefix: rollout rows[n] is row n of the streams."""

    prompts: list[Prompt]
    """Of all groups, also those without rows: they say how long the prefix is."""
    length: int
    """Of the prefix."""
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

    Every scored rollout counts in the denominator; those of a group without signal (all advantages zero, no KL term and
    no bonus for entropy) are not run. An empty response has nothing to train, but was compared with the others.

    Args:
        reference: of the KL term in the loss.
        prefix: of the rollout; None: it was released, and is computed again if there is something to train.

    Returns:
        What `update_again` needs; empty: nothing was trained.

    Raises:
        RuntimeError: engine and trainer log-probs differ by more than algo.max_logprob_diff, or the loss is not finite.
    """
    rows: list[tuple[Group, Scored]] = []
    for group, ones in zip(groups, scored, strict=True):
        trained = [(group, one) for one in ones if one.reward is not None and one.rollout.token_ids]
        lengths = [len(one.rollout.token_ids) for _, one in trained]
        totals.denominator += denominator(lengths, config.algo.normalise, config.rollout.max_new_tokens)
        informative = bool(reference or config.algo.entropy_coef or any(one.advantage for one in ones))
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
        ref_logprobs = reference.logprobs_of(prompts, prefix.length, streams, config.rollout.temperature)
    cohort = Cohort(prompts=prompts, length=prefix.length, rows=rows, streams=streams, ref_logprobs=ref_logprobs)
    cohort.old_logprobs = _backward(policy, cohort, prefix, config, totals)
    return [cohort]


def update_again(policy: Policy, cohort: Cohort, config: RlConfig, totals: Totals) -> None:
    """Accumulates the gradient of a cohort under weights that have moved since it was sampled.

    Raises:
        RuntimeError: the loss is not finite.
    """
    prefix = policy.prefix(cohort.prompts)
    assert prefix.length == cohort.length
    _backward(policy, cohort, prefix, config, totals)


def divergences(
    reference: Policy, groups: Sequence[Group], scored: Sequence[list[Scored]], config: RlConfig
) -> list[list[float]]:
    """The estimate of the KL divergence from the reference of every rollout, summed over its tokens; 0 of an empty one.

    Reference: as in RLOO, arXiv 2402.14740, Eq. 4, where a response is one action.
    Differs: of the log-probs that the engine recorded, which are the trainer's up to algo.max_logprob_diff.
    """
    rows = [(group, one) for group, ones in zip(groups, scored, strict=True) for one in ones if one.rollout.token_ids]
    prompts, sums = [group.prompt for group in groups], iter(())
    if rows:
        responses = [one.rollout.token_ids for _, one in rows]
        length = split_length(prompts)
        streams = make_streams([group.prompt for group, _ in rows], responses, length)
        ref_logprobs = reference.logprobs_of(prompts, length, streams, config.rollout.temperature).double()
        estimate = ESTIMATES[config.algo.kl](engine_logprobs(streams, [one for _, one in rows]), ref_logprobs)
        sums = iter(torch.where(streams.mask, estimate, 0.0).sum(-1).tolist())
    return [[next(sums) if one.rollout.token_ids else 0.0 for one in ones] for ones in scored]


def engine_logprobs(streams: Streams, scored: Sequence[Scored]) -> Tensor:
    """float64 [N, R]: what the engine recorded of these rollouts, laid out as their streams; 0 elsewhere."""
    engine = torch.zeros(streams.mask.shape, dtype=torch.float64)
    engine[streams.mask] = torch.tensor([x for one in scored for x in one.rollout.logprobs], dtype=torch.float64)
    return engine


def _backward(policy: Policy, cohort: Cohort, prefix: Prefix, config: RlConfig, totals: Totals) -> Tensor:
    """Returns the log-probs [N, R] under the current weights."""
    seen: list[Tensor] = []
    loss = _loss(cohort, config, totals, seen, policy.version)
    learns = config.algo.entropy_coef > 0
    policy.backward(prefix, cohort.streams, loss, config.rollout.temperature, entropy_learns=learns)
    return torch.cat(seen)


def _loss(cohort: Cohort, config: RlConfig, totals: Totals, seen: list[Tensor], version: int) -> StreamLoss:
    """The loss of a cohort's streams, which it checks before they are differentiated, and whose log-probs it notes.

    version: of the policy.
    """
    streams, rows = cohort.streams, cohort.rows
    engine = engine_logprobs(streams, [one for _, one in rows])
    advantages = torch.tensor([one.advantage for _, one in rows], dtype=torch.float64)
    advantages = advantages[:, None].expand(streams.mask.shape)
    ids = sorted({group.id for group, _ in rows})
    is_stale = any(one.rollout.policy_version != version for _, one in rows)

    def loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        mask, current = streams.mask[part], logprobs.detach()
        if cohort.old_logprobs is None:
            difference = (current - engine[part])[mask].abs().max().item()
            if is_stale:  # other weights
                totals.stale_logprob_diff = max(totals.stale_logprob_diff or 0.0, difference)
            elif not difference <= config.algo.max_logprob_diff:  # true of NaN too
                raise RuntimeError(
                    f"engine and trainer log-probs differ by {difference:.2e}, more than algo.max_logprob_diff "
                    f"{config.algo.max_logprob_diff:g} (groups {', '.join(ids)}); the weights were not changed. If the "
                    "engine computes in another precision, set algo.correction and raise the bound"
                )
            else:
                totals.logprob_diff = max(totals.logprob_diff or 0.0, difference)
        seen.append(current)
        inputs = LossInputs(
            logprobs=logprobs,
            # in the first update ratios are to the current policy: it sampled, or algo.correction weighs how near it is
            old_logprobs=current if cohort.old_logprobs is None else cohort.old_logprobs[part],
            ref_logprobs=None if cohort.ref_logprobs is None else cohort.ref_logprobs[part],
            rollout_logprobs=engine[part],
            entropy=entropy,
            advantages=advantages[part],
            mask=mask,
        )
        output = policy_loss(inputs, config.algo)
        loss_sum = output.loss_sum.item()
        require_finite("the loss", loss_sum, ids)
        totals.loss_sum += loss_sum
        totals.trained_tokens += int(mask.sum())
        totals.token_sums["entropy"] += entropy.detach().sum().item()
        for name, value in output.metrics.items():
            totals.token_sums[name] += value
        return output.loss_sum

    return loss
