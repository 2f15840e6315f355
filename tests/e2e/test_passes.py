"""One prompt, once: how often the RL loop runs over a video, forward and backward."""

from __future__ import annotations

from collections import Counter

import pytest

from longrl.config import QuickstartConfig
from longrl.config_files import load_config
from longrl.models.trunk import Trunk
from longrl.plan.plan import make_plan
from longrl.policy import Policy
from longrl.train_rl import train_rl
from tests.e2e.conftest import rl_config

EVEN = {"tests.e2e.rewards:first_token_even": 1.0}
LATE = {"tests.e2e.rewards:late_for_some": 1.0}
PASSES = {
    "one update: what decodes is what trains": ({"rewards": EVEN}, 4, 4),
    "rewards without signal": ({"rewards": {"tests.e2e.rewards:constant": 1.0}}, 4, 0),
    "half of the rewards late": ({"rewards": LATE}, 4 + 2, 4),
    "two updates": ({"rewards": EVEN, "algo": {"updates_per_batch": 2}}, 2 * 4, 2 * 4),
    "a reference": ({"rewards": EVEN, "algo": {"kl": "k3", "kl_coef": 0.1}}, 2 * 4, 4),
    "advantages over the batch": ({"rewards": EVEN, "algo": {"advantage": "reinforce_pp"}}, 2 * 4, 4),
    "that, and two updates": (
        {"rewards": EVEN, "algo": {"advantage": "reinforce_pp", "updates_per_batch": 2}},
        3 * 4,
        2 * 4,
    ),
    "compared with the likeliest": ({"rewards": EVEN, "algo": {"advantage": "remax"}}, 4, 4),
    "compared with shuffled frames": (
        {"rewards": EVEN, "algo": {"shuffled_rollouts": 2, "accuracy": "tests.e2e.rewards:first_token_even"}},
        2 * 4,
        4,
    ),
}
UNPLANNED = {"rewards without signal", "half of the rewards late"}
"""What nobody knows beforehand."""


@pytest.mark.parametrize("name", PASSES)
def test_passes_over_a_video(dataset, tmp_path, monkeypatch, name):
    """Four steps, each of three questions about one video, four rollouts each. They are those of the plan."""
    changes, forward, backward = PASSES[name]
    seen: Counter[str] = Counter()
    run_forward, run_backward = Trunk.prefix, Policy.backward

    def prefix(*args, **kwargs):
        seen["forward"] += 1
        return run_forward(*args, **kwargs)

    def back(*args, **kwargs):
        seen["backward"] += 1
        return run_backward(*args, **kwargs)

    monkeypatch.setattr(Trunk, "prefix", prefix)
    monkeypatch.setattr(Policy, "backward", back)
    config = rl_config(dataset, tmp_path, steps=4, prompts_per_step=3, **changes)
    train_rl(config)
    assert (seen["forward"], seen["backward"]) == (forward, backward)
    if name not in UNPLANNED:
        assert 4 * make_plan(config, "CPU", 1).cost.passes == forward + 2 * backward


def test_the_quickstart_takes_one_update_a_batch(root):
    """So its rollouts and updates share the pass over each video, as above: in the same loop."""
    config = load_config([root / "configs" / "tiny" / "quickstart.yaml"])
    assert isinstance(config, QuickstartConfig)
    assert config.rl.algo.updates_per_batch == 1
