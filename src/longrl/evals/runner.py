"""Accuracy on held-out questions: several samples a question, by category and kind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrl.algo.shaping import RIGHT
from longrl.check import require_model
from longrl.config import EvalRunConfig, QuickstartConfig, RlConfig
from longrl.data.examples import Skips, load_examples
from longrl.data.order import by_media
from longrl.data.prompts import Change, PromptBuilder, prompt_limit
from longrl.evals.controls import CONTROLS, require_control
from longrl.files import write_whole
from longrl.models.streams import num_tokens
from longrl.parallel.ranks import ALONE, Ranks
from longrl.policy import Policy, load_policy
from longrl.report.headline import standard_error
from longrl.rewards.compose import Begun, Rewards, build_rewards
from longrl.rollout.native import NativeEngine
from longrl.rollout_config import RolloutConfig
from longrl.runtime import seed_for, start_run
from longrl.totals import Totals
from longrl.types import Example, Group, Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A mean over questions of the mean over samples: of right answers, or of what near ones score."""

    accuracy: float | None
    """None: of no question."""
    num_questions: int
    """With a score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """What an evaluation found."""

    stage: str
    overall: Accuracy
    by_category: dict[str, Accuracy]
    by_kind: dict[str, Accuracy]
    samples_per_question: int
    mean_response_tokens: float
    asked: dict[str, float | None]
    """What judging took: calls, tokens, money, seconds a call."""
    skipped: dict[str, str]
    """Questions whose media could not be used -> why. All their samples count as wrong."""
    unscored: int
    """Responses that could not be judged, which count neither way: a judge that is away makes nothing wrong."""
    examples: list[dict[str, Any]]
    """For the report: id, category, kind, video, question, answer, responses with their scores (null: unscored)."""

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        flat = {
            "stage": self.stage,
            "accuracy": self.overall.accuracy,
            "num_questions": self.overall.num_questions,
            "samples_per_question": self.samples_per_question,
            "mean_response_tokens": self.mean_response_tokens,
            "asked": self.asked,
            "skipped": self.skipped,
            "unscored": self.unscored,
            "by_category": {name: asdict(value) for name, value in self.by_category.items()},
            "by_kind": {name: asdict(value) for name, value in self.by_kind.items()},
            "examples": self.examples,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(flat, indent=1) + "\n")


def run_eval(config: EvalRunConfig, ranks: Ranks = ALONE) -> EvalResult:
    """Evaluates `model` on `data.eval` and writes eval.json into the run directory; every rank calls it."""
    skips = Skips(config.data)
    examples = load_questions(config, skips)
    rewards = build_rewards(config.rewards, config.scoring, config.judge, ranks.dp_size, evaluates=True)
    rewards.require((), examples, expressions=ranks.is_main)
    require_model(config.model, config.parallel)
    if config.control:
        require_control(config.control, examples)
    if ranks.is_main:
        rewards.check()
    run_dir = start_run(config, is_main=ranks.is_main)
    policy = load_policy(config.model, config, ranks)
    change = CONTROLS[config.control] if config.control else None
    stage = config.control or "eval"
    result = evaluate(policy, examples, config, skips, rewards, stage=stage, ranks=ranks, change=change)
    if ranks.is_main:
        _write(result, run_dir)
    rewards.require_judge(ranks)
    return result


def _write(result: EvalResult, run_dir: Path) -> None:
    result.write(run_dir / "eval.json")
    for name, value in {"all": result.overall, **result.by_kind, **result.by_category}.items():
        if value.accuracy is None:
            logger.info("%-12s not known: no question has a score", name)
            continue
        error = standard_error(value.accuracy, value.num_questions)
        logger.info("%-12s %.3f +- %.3f  (%d questions)", name, value.accuracy, error, value.num_questions)
    if result.unscored:
        logger.warning("%d responses could not be judged; they count neither way", result.unscored)
    logger.info("%s has all answers; +- is one standard error, questions counted", run_dir / "eval.json")


def load_questions(config: RlConfig | EvalRunConfig, skips: Skips) -> list[Example]:
    """All of `data.eval`, those with missing files too: `evaluate` counts them as wrong.

    Raises:
        ValueError: there is no such file, or a row cannot be used.
    """
    if config.data.eval is None:
        raise ValueError("data.eval is not set; evaluation needs questions with answers")
    return load_examples(config.data.eval, config.data, config.video, skips, cache=config.cache, keep_skipped=True)


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    config: RlConfig | EvalRunConfig | QuickstartConfig,
    skips: Skips,
    rewards: Rewards,
    *,
    stage: str,
    ranks: Ranks = ALONE,
    change: Change | None = None,
    forced: str = "",
) -> EvalResult:
    """Asks every question `eval.samples` times at `eval.temperature`.

    A sample that cannot be scored counts neither way; those of a question whose media cannot be used count as wrong.

    Args:
        skips: of the questions.
        rewards: of the run.
        ranks: the policy's: data-parallel ranks take different videos, and all get the result of all.
        change: a control: what is done to each prompt's example and media first (see controls.py).
        forced: a control: the text that every response is made to begin with.
    """
    limit = prompt_limit(config, skips.data, ranks)
    build = PromptBuilder(policy.family, config.cache, skips, ranks, *limit)
    together, most = by_media(examples), config.rollout.prompts_in_flight
    engine = NativeEngine(policy, _sampling(config, most))
    # questions whose media a control takes away share no prefix any more, and would be asked one by one
    apart = engine.resampled(_sampling(config, max(most, config.rollout.max_streams // config.eval.samples)))
    forced_ids = policy.family.tokenizer.encode(forced, add_special_tokens=False)
    begun: list[Begun] = []
    """On the rank that judges."""

    def judge(groups: Sequence[Group]) -> None:
        for group in groups:
            said = tuple(replace(one, text=forced + one.text) for one in group.rollouts)
            begun.append(rewards.begin(replace(group, rollouts=said), held_out=True))

    build.prepare(examples)
    keys: set[str] = set()
    for layout, mine in _deal(examples, together, build, change):
        policy.share_with(layout.sp)
        for some in (mine[start : start + most] for start in range(0, len(mine), most)):
            members = [i for k in some for i in together[k]]
            kept, prompts = build([examples[i] for i in members], change)
            keys |= {media.key for prompt in prompts for media in prompt.media}
            batch = [examples[members[k]] for k in kept]
            bare = not any(prompt.media for prompt in prompts) and all(example.clips for example in batch)
            prompts = [prompt.followed_by(forced_ids) for prompt in prompts]
            seeds = [seed_for(config.runtime.seed, "eval", example.id) for example in batch]
            with torch.no_grad():
                for groups, prefix in (apart if bare else engine).rollout(batch, prompts, seeds):
                    prefix.release()
                    layout.once(judge, groups)
    found = {one.group.id: one.result() for one in begun}
    found = {name: scored for part in ranks.gather_all(found) for name, scored in part.items()}
    if policy.embeds_pass:  # nobody reads them any more, here or on another rank
        build.cache.remove(keys)
    asked = Totals.sum(ranks.gather_all(rewards.take()))
    return _result(stage, examples, found, asked.counts, config.eval.samples, skips)


def _sampling(config: RlConfig | EvalRunConfig | QuickstartConfig, in_flight: int) -> RolloutConfig:
    asked = {name: getattr(config.eval, name) for name in ("temperature", "top_k", "top_p")}
    changes = {"group_size": config.eval.samples, "prompts_in_flight": in_flight}
    return config.rollout.model_copy(update=asked | changes)


def _deal(
    examples: Sequence[Example], together: Sequence[Sequence[int]], build: PromptBuilder, change: Change | None
) -> list[tuple[Ranks, list[int]]]:
    """As Ranks.deal, of the questions about the same media."""
    ranks = build.ranks
    if ranks.dp_size == 1:
        return [(ranks, list(range(len(together))))]
    tokens, lengths = [], []
    # all prompts are built, one video's at a time, to know their lengths; and so all ranks skip what any of them must
    for members in together:
        _, prompts = build([examples[i] for i in members], change)
        tokens.append(num_tokens(prompts) if prompts else 0)
        lengths.append(max(map(len, prompts), default=1))
    return ranks.deal(tokens, lengths)


def _result(
    stage: str,
    examples: Sequence[Example],
    found: dict[str, list[Scored]],
    asked: dict[str, float | None],
    samples: int,
    skips: Skips,
) -> EvalResult:
    given = {id: [one.rewards["answer"] for one in scored] for id, scored in found.items()}
    known = {e.id: [score for score in given.get(e.id, [0.0]) if score is not None] for e in examples}

    def accuracy(where: Callable[[Example], bool]) -> Accuracy:
        picked = [sum(scores) / len(scores) for e in examples if where(e) and (scores := known[e.id])]
        return Accuracy(accuracy=sum(picked) / len(picked) if picked else None, num_questions=len(picked))

    tokens = [len(one.rollout.token_ids) for scored in found.values() for one in scored]
    return EvalResult(
        stage=stage,
        overall=accuracy(lambda e: True),
        by_category={c: accuracy(lambda e, c=c: e.category == c) for c in sorted({e.category for e in examples})},
        by_kind={k: accuracy(lambda e, k=k: e.kind == k) for k in sorted({e.kind for e in examples})},
        samples_per_question=samples,
        mean_response_tokens=sum(tokens) / max(len(tokens), 1),
        asked=asked,
        unscored=sum(scores.count(None) for scores in given.values()),
        skipped={e.id: skips.names[e.id] for e in examples if e.id not in found},
        examples=[_describe(e, found.get(e.id, [])) for e in examples],
    )


def _describe(example: Example, scored: list[Scored]) -> dict[str, Any]:
    return {
        "id": example.id,
        "category": example.category,
        "kind": example.kind,
        "video": example.clips[0].path if example.clips else None,
        "question": "".join(part for part in example.messages[-1].content if isinstance(part, str)),
        "answer": example.answer,
        "responses": [
            {"text": one.rollout.text, "reward": one.reward, "score": score, "correct": (score or 0.0) > RIGHT}
            for one in scored
            for score in (one.rewards["answer"],)
        ],
    }
