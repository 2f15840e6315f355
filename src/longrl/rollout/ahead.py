"""One step off-policy: servers draw the rollouts of the next step while this one's update runs.

    step t     collect the rollouts of t, drawn from v[t-2]     hand out v[t-1], ask for those of t+1     v[t-1] -> v[t]

The first step's are drawn from v[0], which they train. What is drawn is a function of the step, not of the clock; a
checkpoint holds the rollouts of the step that follows it, whose weights are gone.

Reference: one-step off-policy RL, Noukhovitch et al., "Asynchronous RLHF" (arXiv 2410.18252), section 3; AReaL (arXiv
2505.24298), section 5.2, for the objective: ratios to the policy as the update begins, weighed by `algo.correction`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from pydantic import TypeAdapter

from longrl.rollout.engine import Engine
from longrl.rollout.remote import Drawn, RemoteEngine
from longrl.rollout.wire import Weights
from longrl.training import Batch, Share, Training
from longrl.types import Example

log = logging.getLogger(__name__)

_DRAWN = TypeAdapter(Drawn)
STOPPING_S = 60.0
"""A cluster that has asked a run to stop ends it before long, saved or not."""


class Ahead:
    """All ranks make the same calls."""

    def __init__(self, engine: Engine, training: Training, examples: Sequence[Example]) -> None:
        assert isinstance(engine, RemoteEngine), f"{type(engine).__name__} draws rollouts in this process"
        self.engine, self.training, self.examples = engine, training, examples
        self._asked: tuple[int, Batch] | None = None
        """The step that follows, and what it draws."""

    def draw(self, step: int) -> Batch:
        """As Training.draw, once a step: a file that is there now, and was not, must not part it from its rollouts."""
        return self._asked[1] if self._asked else self.training.draw(self.examples, step)

    def __call__(self, step: int, batch: Batch) -> None:
        """After this the rollouts of the step are there, and those of the next on their way.

        Raises:
            ServerLostError, ServerRefusedError: as RemoteEngine.collect.
        """
        if self._asked is None:
            self._take_up(step, batch)
        with self.engine.time("rollout"):
            self._collect(step, batch)
        self._asked = None
        if step < self.training.config.steps:
            with self.engine.time("media"):
                self._asked = step + 1, self.training.draw(self.examples, step + 1)
            self._begin(*self._asked)

    def pending(self, stopping: bool) -> str | None:
        """The rollouts of the step that follows, of all ranks, as text; None after the last. Waits for them; where the
        run is stopping not for long: None then, too."""
        if self._asked is None:
            return None
        step, batch = self._asked
        try:
            self._collect(step, batch, STOPPING_S if stopping else threading.TIMEOUT_MAX)
        except TimeoutError:
            log.warning("the rollouts of step %d are not there %g s after it was to stop: not saved", step, STOPPING_S)
            return None
        drawn: Drawn = {}
        for share in batch.shares:
            mine = {seed: self.engine.drawn[seed] for seed in self._seeds(step, share)}
            for part in share.ranks.gather(mine):
                drawn |= part
        return _DRAWN.dump_json(drawn).decode()

    def _take_up(self, step: int, batch: Batch) -> None:
        """The first step of this process: as its checkpoint has it, or by the weights that would have drawn it, if they
        are still there, as after a server was lost; or anew."""
        saved, self.training.rollouts = _DRAWN.validate_json(self.training.rollouts or "{}"), None
        mine = {seed for share in batch.shares for seed in self._seeds(step, share)}
        self.engine.drawn |= {seed: rollouts for seed, rollouts in saved.items() if seed in mine}
        outbox = self.engine.outbox
        earlier = None if saved else outbox.of(self.training.done - 1)
        if not saved and earlier is None and step > 1:
            log.warning("the rollouts of step %d are drawn anew, from the policy as it is", step)
        self._begin(step, batch, earlier)

    def _begin(self, step: int, batch: Batch, weights: Weights | None = None) -> None:
        weights = weights or self.engine.outbox.current()
        for share in batch.shares:
            self.training.policy.share_with(share.ranks.sp)
            self.engine.begin(share.examples, share.prompts, self._seeds(step, share), weights)

    def _collect(self, step: int, batch: Batch, within_s: float = threading.TIMEOUT_MAX) -> None:
        for share in batch.shares:
            self.training.policy.share_with(share.ranks.sp)
            self.engine.collect(self._seeds(step, share), within_s)

    def _seeds(self, step: int, share: Share) -> list[int]:
        return share.seeds(self.training.config.runtime.seed, "rollout", step)
