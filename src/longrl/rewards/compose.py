"""Several rewards, one number: the weighted sum that advantages are computed from."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrl.judge_config import JudgeConfig
from longrl.registry import resolve
from longrl.rewards.answer import exact_reward
from longrl.rewards.choice import choice_reward, letter_of
from longrl.rewards.format import format_reward
from longrl.rewards.judge import Judge
from longrl.rewards.maths import is_plain_number, math_reward, require_math_verify
from longrl.rewards.penalties import length_reward, repetition_reward
from longrl.rewards.pool import Pool, RewardError, message_of
from longrl.rewards.quantity import grounding_reward, number_of, number_reward, regression_reward, span_of
from longrl.rewards.text import ocr_reward, plain_words, read_words, rouge_reward
from longrl.scoring_config import ScoringConfig, require_used, require_weights, rewards_of, with_answer
from longrl.totals import Totals
from longrl.types import Example, Group, Rollout, Scored

if TYPE_CHECKING:
    from longrl.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

Reward = Callable[..., "float | Future[Any] | None"]
"""Called with an Example and a Rollout, and with its options. A Future: the reward is late. Nothing waits for it before
the other prompts of the step have been decoded."""

REWARDS: dict[str, Reward] = {
    "choice": choice_reward,
    "exact": exact_reward,
    "format": format_reward,
    "grounding": grounding_reward,
    "length": length_reward,
    "math": math_reward,
    "number": number_reward,
    "ocr": ocr_reward,
    "regression": regression_reward,
    "repetition": repetition_reward,
    "rouge": rouge_reward,
}
"""And `answer`, the reward of an example's kind."""

ISOLATED = frozenset(("math",))
"""Built-in rewards that are never called in this process."""

_TRUTHS: dict[str, Callable[[Example], Any]] = {
    "choice": letter_of,
    "number": number_of,
    "regression": number_of,
    "grounding": span_of,
    "ocr": read_words,
    "rouge": plain_words,
}
"""Rewards that cannot use every truth -> what reads it, or raises ValueError. `math` is another: see `require`."""

_CUT_OFF = Rollout(token_ids=(), logprobs=(), text="", finish_reason="length", policy_version=0)

_AT_FIRST = 16
"""Calls of a reward for several examples, all of which fail: it does not work. (A judge may be away for a while.)"""
_LOOKED_BACK = 1000
"""Calls of a reward of which `scoring.max_failures` may fail."""


@dataclass(frozen=True, slots=True)
class Soon:
    """A reward from a worker process. Unlike a late one it is waited for at once: its time is limited."""

    future: Future[float | None]


class JudgeLostError(RuntimeError):
    """The judge has been away for too long."""


class Rewards:
    """Scores groups. `failures` counts, by reward name, the rollouts that a reward failed on."""

    def __init__(
        self,
        weights: Mapping[str, float],
        scoring: ScoringConfig,
        known: Mapping[str, Reward] = REWARDS,
        judge: Judge | None = None,
        *,
        evaluates: bool = False,
    ) -> None:
        require_weights(weights)
        self.weights, self.scoring = dict(weights), scoring
        self.judge = judge
        # `answer` is never looked up, but may be what a misspelt name meant
        self._known = {**known, "answer": exact_reward} | ({} if judge is None else {"judge": judge})
        self.failures: Counter[str] = Counter()
        self._recent: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=_LOOKED_BACK))
        self._warned: set[tuple[str, str]] = set()
        self._failing: dict[str, set[str]] = defaultdict(set)
        """By name, the examples that a reward has failed on."""
        self._last_failure = ""
        """Of the judge."""
        keys = {key for model in (judge.models if judge else ()) if (key := model.config.key_env)}
        self._pool = Pool(scoring.workers, scoring.timeout_s, int(scoring.memory_gib * 2**30), keys)
        self._bound: dict[str, Reward] = {}
        require_used(with_answer(weights) if evaluates else weights, scoring)
        for name in sorted({*weights, *scoring.by_kind.values()} - {"answer"}):
            self._reward(name)

    def __call__(self, group: Group) -> list[Scored]:
        """The group's rollouts in their order, each with its rewards, late ones too; advantages are still 0."""
        return self.begin(group).result()

    def begin(self, group: Group, *, held_out: bool = False) -> Begun:
        """Calls every reward; those that return a Future are not waited for.

        Args:
            held_out: `answer` too, whatever the run names: evaluation calls it accuracy.
        """
        return Begun(self, group, with_answer(self.weights) if held_out else self.weights)

    def require(
        self, examples: Sequence[Example], held_out: Sequence[Example] = (), *, expressions: bool = True
    ) -> None:
        """Looks whether all examples can be scored, before a model is loaded.

        Args:
            held_out: those of evaluation, which needs `answer` too.
            expressions: the truths of math too, some milliseconds each: of several ranks one is enough.

        Raises:
            ValueError: a truth that its reward cannot read, or a reward that cannot be loaded.
        """
        asked: dict[str, Example] = {}
        named = [*((one, self.weights) for one in examples), *((one, with_answer(self.weights)) for one in held_out)]
        for example, weights in named:
            for name in rewards_of(example.kind, weights, self.scoring):
                self._reward(name)
                require_truth(name, example)
                is_expression = example.answer is not None and not is_plain_number(example.answer)
                if name == "math" and expressions and is_expression:
                    asked.setdefault(example.answer or "", example)
        self._require_expressions(asked)

    def _require_expressions(self, examples: Mapping[str, Example]) -> None:
        """By workers, as it may take for ever: of a response that was cut off `math` reads the truth alone."""
        if examples:
            logger.info("looking whether math can read the %d truths that are no plain numbers", len(examples))
        asked = {truth: self._pool.submit("math", {}, example, _CUT_OFF) for truth, example in examples.items()}
        for truth, read in asked.items():
            error = read.exception()
            if isinstance(error, RewardError) and not str(error).startswith("ValueError: "):
                # its time was up, say: on a machine that was busy, perhaps
                error = self._pool.submit("math", {}, examples[truth], _CUT_OFF).exception()
            if error is None:
                continue
            if not isinstance(error, RewardError):
                raise error
            for other in asked.values():
                other.cancel()
            why = str(error).removeprefix("ValueError: ")
            if not why.startswith("example "):  # its time was up, say
                why = f"example {examples[truth].id}: the truth {truth[:60]!r} cannot be read by math: {why}"
            raise ValueError(why) from error

    def check(self) -> None:
        """Looks whether what the rewards ask outside this process is there; raises as `Judge.check`."""
        if self.judge is not None:
            self.judge.check()

    def require_judge(self, ranks: Ranks) -> None:
        """Called between steps, by all ranks, which lose the judge alike: its failures do not stop the run before.

        Raises:
            JudgeLostError: some rank has had more than `scoring.max_failures` of its failures.
        """
        if self.judge is None:
            return
        recent = self._recent["judge"]
        count = sum(recent)
        lost = count > self.scoring.max_failures and (
            f"the judge has failed on {count} of its last {len(recent)} responses, scoring.max_failures allows "
            f"{self.scoring.max_failures}; of {self._last_failure}; see whether its service is up"
        )
        if said := next(filter(None, ranks.gather_all(lost)), None):
            raise JudgeLostError(said)

    def take(self) -> Totals:
        """What was asked outside this process since this was last called, and what it cost."""
        return Totals() if self.judge is None else self.judge.take()

    def call(self, names: Iterable[str], example: Example, rollout: Rollout) -> dict[str, Any]:
        """By name, what each reward returns, or the exception that it raises."""
        return {name: self._call(name, example, rollout) for name in names}

    def score(self, example: Example, rollout: Rollout, made: dict[str, Any]) -> Scored:
        """made: by name, what each reward gave: a number, None, an exception, or a Future that is waited for.

        Raises:
            RuntimeError: a reward has failed too often.
        """
        parts, failed, whys = {}, [], dict[str, str | None]()
        for name, x in made.items():
            why = None
            try:
                parts[name] = _number(x)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - user code: its failure must not end the run, nor pass for a 0
                parts[name], why = None, f"{type(error).__name__}: {message_of(error)}"
                failed.append(name)
            self.failures[name] += why is not None
            routed = self._routed(name, example)
            if name in self.weights:
                whys[routed] = whys.get(routed) or why
            elif why is not None:  # of accuracy alone, which never stops a run
                self._warn(routed, example, why)
        for name, why in whys.items():
            self._count(name, example, why)
        # A reward of weight 0 is only watched: it cannot keep a rollout from being trained.
        weighted = {name: weight for name, weight in self.weights.items() if weight and name in parts}
        known = [weight * part for name, weight in weighted.items() if (part := parts[name]) is not None]
        reward = math.fsum(known) if len(known) == len(weighted) else None
        return Scored(rollout=rollout, rewards=parts, reward=reward, failed=tuple(failed))

    def _call(self, name: str, example: Example, rollout: Rollout) -> Any:
        try:
            return self._reward(self._routed(name, example))(example, rollout)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - as in `score`, which counts it
            return error

    def _routed(self, name: str, example: Example) -> str:
        """What `answer` is for an example; any other reward is itself."""
        return rewards_of(example.kind, {name: 1.0}, self.scoring)[0]

    def _reward(self, name: str) -> Reward:
        if name not in self._bound:
            options = self.scoring.options.get(name, {})
            if name == "math":
                require_math_verify()
            if name in ISOLATED or (":" in name and name not in self.scoring.in_process):
                self._pool.require(name, options)
                self._bound[name] = lambda example, rollout: Soon(self._pool.submit(name, options, example, rollout))  # pyright: ignore[reportArgumentType]
            else:
                self._bound[name] = bound(name, options, self._known)
        return self._bound[name]

    def _count(self, name: str, example: Example, why: str | None) -> None:
        """
        Args:
            name: of what `answer` is, not `answer`.
            why: it failed; None: it has not.

        Raises:
            RuntimeError: it has failed too often.
        """
        recent = self._recent[name]
        recent.append(why is not None)
        if why is None:
            return
        self._failing[name].add(example.id)
        self._warn(name, example, why)
        if name == "judge":  # see require_judge
            self._last_failure = f"example {example.id}: {why}"
            return
        count = sum(recent)
        if count > self.scoring.max_failures:
            allowed = f"scoring.max_failures allows {self.scoring.max_failures}"
        elif count == len(recent) >= _AT_FIRST and len(self._failing[name]) > 1:
            allowed = "none was scored"
        else:
            return
        raise RuntimeError(
            f"reward {name} has failed on {count} of its last {len(recent)} responses, {allowed}; of example "
            f"{example.id}: {why}; mend it, or set scoring.max_failures to what may fail"
        )

    def _warn(self, name: str, example: Example, why: str) -> None:
        """Of failures that say the same, the first; all are counted."""
        if (name, why) in self._warned or len(self._warned) == _LOOKED_BACK:
            return
        self._warned.add((name, why))
        logger.warning("reward %s of example %s failed: %s (said once; failures are counted)", name, example.id, why)
        if len(self._warned) == _LOOKED_BACK:
            logger.warning("%d failures of rewards have been said; from here on they are only counted", _LOOKED_BACK)


def require_truth(name: str, example: Example) -> None:
    """
    Raises:
        ValueError: a truth that the reward cannot read. Of `math`, only its workers find out.
    """
    if example.answer is not None and name in _TRUTHS:
        _TRUTHS[name](example)


class Begun:
    """A group whose rewards have been called; some may be late."""

    def __init__(self, rewards: Rewards, group: Group, names: Iterable[str]) -> None:
        self.rewards, self.group = rewards, group
        self.made = [rewards.call(names, group.example, rollout) for rollout in group.rollouts]

    @property
    def is_late(self) -> bool:
        """Whether any reward came as a Future, be it done by now or not."""
        return any(isinstance(x, Future) for made in self.made for x in made.values())

    def result(self) -> list[Scored]:
        """Waits. The rollouts in their order; a reward that raises late is None, as one that raises at once."""
        pairs = zip(self.group.rollouts, self.made, strict=True)
        return [self.rewards.score(self.group.example, rollout, made) for rollout, made in pairs]


def bound(name: str, options: Mapping[str, Any], known: Mapping[str, Reward]) -> Reward:
    """A reward with its options, to be called with an Example and a Rollout.

    Raises:
        ValueError: There is none of this name, or it takes other arguments.
    """
    reward: Reward = resolve(name, known, "reward")
    if not callable(reward):
        kind = type(reward).__name__
        raise ValueError(f"reward {name!r} is of type {kind}, expected a function of (example, rollout)")
    try:
        inspect.signature(reward).bind(None, None, **options)
    except TypeError as error:
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        mend = f"; {'mend' if given else 'set'} scoring.options.{name}"
        raise ValueError(f"reward {name!r} cannot be called as (example, rollout{given}): {error}{mend}") from error
    return functools.partial(reward, **options) if options else reward


def _number(made: Any) -> float | None:
    value = made.future if isinstance(made, Soon) else made
    value = value.result() if isinstance(value, Future) else value
    if isinstance(value, BaseException):
        raise value
    return number_or_none(value)


def number_or_none(value: Any) -> float | None:
    """What a reward returned, as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    if value is None:
        return None
    if isinstance(value, Future):
        raise TypeError("a late reward cannot leave a worker process; name it in scoring.in_process")
    if not hasattr(value, "__float__"):
        raise TypeError(f"a reward must be a number or None, got a {type(value).__name__}")
    if not abs(value) <= 1e30:  # nor NaN
        raise ValueError(f"a reward must be a finite number, got {value}")
    return float(value)


def build_rewards(
    weights: Mapping[str, float],
    scoring: ScoringConfig | None = None,
    judge: JudgeConfig | None = None,
    processes: int = 1,
    *,
    evaluates: bool = False,
) -> Rewards:
    """The scoring function of a run. Built once: the judge's limits are of one judge.

    Args:
        weights: Reward name, `package.module:attr` or `file.py:attr`, -> weight.
        scoring: Which reward is for which kind of example, options and limits; None: the defaults.
        judge: What the reward `judge` asks.
        processes: That score, each its own groups.
        evaluates: Options of what `answer` is are used, even if it has no weight.

    Returns:
        A callable `Group -> list[Scored]`: reward = sum of weight * part, or None if a part of non-zero weight is None.

    Raises:
        ValueError: Unknown name, non-finite weight, nothing with a weight, or options that a reward does not have.
    """
    judges = judge and Judge(judge, processes)
    return Rewards(weights, scoring or ScoringConfig(), judge=judges, evaluates=evaluates)
