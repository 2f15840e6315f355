"""Accuracy on held-out questions: several samples a question, by category and kind."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrl.config import EvalRunConfig, RunConfig
from longrl.data.examples import load_examples
from longrl.data.prompts import Change, PromptBuilder
from longrl.models import load_family
from longrl.policy import Policy
from longrl.rewards.compose import build_rewards
from longrl.rollout.native import NativeEngine
from longrl.runtime import seed_for, start_run
from longrl.types import Example, Scored

logger = logging.getLogger(__name__)

QUESTIONS_AT_ONCE = 64
"""Questions whose prompts are held at one time; those about the same video are decoded side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A mean over questions of the mean over samples."""

    accuracy: float
    num_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """What an evaluation found."""

    stage: str
    overall: Accuracy
    by_category: dict[str, Accuracy]
    by_kind: dict[str, Accuracy]
    samples_per_question: int
    mean_response_tokens: float
    cache_hit_rate: float
    examples: list[dict[str, Any]]
    """For the report: id, category, kind, video, question, answer, responses."""

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        flat = {
            "stage": self.stage,
            "accuracy": self.overall.accuracy,
            "num_questions": self.overall.num_questions,
            "samples_per_question": self.samples_per_question,
            "mean_response_tokens": self.mean_response_tokens,
            "by_category": {name: asdict(value) for name, value in self.by_category.items()},
            "by_kind": {name: asdict(value) for name, value in self.by_kind.items()},
            "examples": self.examples,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(flat, indent=1) + "\n")
        os.replace(beside, path)


def run_eval(config: EvalRunConfig) -> EvalResult:
    """Evaluates `model` on `data.eval` and writes eval.json into the run directory."""
    run_dir = start_run(config, config.runtime)
    if config.data.eval is None:
        raise ValueError("data.eval is not set; evaluation needs a JSONL file of questions with answers")
    policy = Policy(load_family(config.model, config.runtime.seed))
    examples = load_examples(config.data.eval, config.data, config.video)
    result = evaluate(policy, examples, config, stage="eval")
    result.write(run_dir / "eval.json")
    for name, value in {"all": result.overall, **result.by_kind, **result.by_category}.items():
        logger.info("%-12s %.3f  (%d questions)", name, value.accuracy, value.num_questions)
    return result


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    config: RunConfig,
    *,
    stage: str,
    change: Change | None = None,
    forced: str = "",
) -> EvalResult:
    """Asks every question `eval.samples` times at `eval.temperature`.

    A sample that cannot be scored, and every sample of a question whose media cannot be used, counts as wrong.

    Args:
        change: a control: what is done to each prompt's example and media first (see controls.py).
        forced: a control: the text that every response is made to begin with.
    """
    build = PromptBuilder(policy.family, config)
    sampling = config.rollout.model_copy(
        update={"group_size": config.eval.samples, "temperature": config.eval.temperature}
    )
    engine, score = NativeEngine(policy, sampling), build_rewards(config.rewards)
    forced_ids = policy.family.tokenizer.encode(forced, add_special_tokens=False)
    found: dict[str, list[Scored]] = {}
    for start in range(0, len(examples), QUESTIONS_AT_ONCE):
        batch, prompts = build(examples[start : start + QUESTIONS_AT_ONCE], change)
        prompts = [prompt.followed_by(forced_ids) for prompt in prompts]
        seeds = [seed_for(config.runtime.seed, "eval", example.id) for example in batch]
        with torch.no_grad():
            for groups, prefix in engine.rollout(batch, prompts, seeds):
                prefix.release()
                for group in groups:
                    rollouts = tuple(replace(one, text=forced + one.text) for one in group.rollouts)
                    found[group.id] = score(replace(group, rollouts=rollouts))
    return _result(stage, examples, found, config.eval.samples, build.cache.hit_rate)


def _result(
    stage: str, examples: Sequence[Example], found: dict[str, list[Scored]], samples: int, hit_rate: float
) -> EvalResult:
    right = {e.id: [one.rewards.get("answer") == 1.0 for one in found.get(e.id, [])] for e in examples}

    def accuracy(where: Callable[[Example], bool]) -> Accuracy:
        picked = [sum(right[e.id]) / samples for e in examples if where(e)]
        return Accuracy(accuracy=sum(picked) / max(len(picked), 1), num_questions=len(picked))

    tokens = [len(one.rollout.token_ids) for scored in found.values() for one in scored]
    return EvalResult(
        stage=stage,
        overall=accuracy(lambda e: True),
        by_category={c: accuracy(lambda e, c=c: e.category == c) for c in sorted({e.category for e in examples})},
        by_kind={k: accuracy(lambda e, k=k: e.kind == k) for k in sorted({e.kind for e in examples})},
        samples_per_question=samples,
        mean_response_tokens=sum(tokens) / max(len(tokens), 1),
        cache_hit_rate=hit_rate,
        examples=[_describe(e, found.get(e.id, []), right[e.id]) for e in examples],
    )


def _describe(example: Example, scored: list[Scored], right: list[bool]) -> dict[str, Any]:
    return {
        "id": example.id,
        "category": example.category,
        "kind": example.kind,
        "video": example.clips[0].path if example.clips else None,
        "question": "".join(part for part in example.messages[-1].content if isinstance(part, str)),
        "answer": example.answer,
        "responses": [
            {"text": one.rollout.text, "reward": one.reward, "correct": correct}
            for one, correct in zip(scored, right, strict=True)
        ],
    }
