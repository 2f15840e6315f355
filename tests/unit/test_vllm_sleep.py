"""What vLLM is told around an update, in order: on a GPU, where it sleeps meanwhile. A stand-in for vLLM notes it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from longrl.config import RlConfig
from longrl.models import load_family
from longrl.parallel.ranks import ALONE
from longrl.policy import Policy
from longrl.rollout import vllm_core
from longrl.rollout.vllm_core import Vllm
from longrl.types import Prompt

PROMPT = Prompt(token_ids=torch.arange(4), position_ids=torch.arange(4)[None], media=(), media_slots=())
RESETS = ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]


class Adapter(NamedTuple):
    """As vllm.lora.request.LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class StandIn:
    """For vllm.LLM and its engine."""

    def __init__(self) -> None:
        self.llm_engine = self
        self.model_config = SimpleNamespace(max_model_len=128)
        self.input_processor = SimpleNamespace(mm_encoder_cache_size=0)
        self.told: list[str] = []
        self._waiting: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def note(*_: Any, tags: list[str] = [], **__: Any) -> bool:  # noqa: B006
            self.told.append(" ".join([name, *tags]))
            return True

        return note

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        self.told.append(name)
        assert list(kwargs["weights_iterator"])

    def add_request(self, name: str, *_: Any, lora_request: Any) -> None:
        self.told.append("add_request" + (f" with {lora_request.lora_name}" if lora_request else ""))
        self._waiting.append(name)

    def has_unfinished_requests(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[Any]:
        said = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")
        return [SimpleNamespace(request_id=self._waiting.pop(), finished=True, outputs=[said])]


@pytest.fixture
def start(monkeypatch):
    """Of a configuration of the model: an engine that sleeps, and its stand-in."""
    request = SimpleNamespace(LoRARequest=Adapter)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace(request=request))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setattr(vllm_core, "installed", lambda: "0.32.0")
    monkeypatch.setattr(vllm_core, "engine_input", lambda *_: None)

    def make(**model: Any) -> tuple[Vllm, StandIn, Policy, RlConfig]:
        given = {"path": "tiny:qwen2", "device": "cpu", **model}
        config = RlConfig.model_validate({"run_dir": "run", "model": given, "steps": 1, "rollout": {"engine": "vllm"}})
        stand_in, policy = StandIn(), Policy(load_family(config.model, 0))
        monkeypatch.setattr(vllm_core, "_start", lambda _: stand_in)
        engine = Vllm(policy, config, ALONE)
        engine.sleeps = True
        return engine, stand_in, policy, config

    return make


def told(engine: Vllm, stand_in: StandIn, policy: Policy, config: RlConfig) -> list[list[str]]:
    """In each of: weights, rollouts, the weights of an update, rollouts, rollouts."""
    parts: list[list[str]] = []
    for what in ("load", "draw", "load", "draw", "draw"):
        if what == "load":
            policy.version += bool(parts)
            engine.load(policy)
        else:
            [[drawn]] = engine.draw([PROMPT], [[0]], config.rollout)
            assert drawn.version == policy.version
        parts.append(stand_in.told[:])
        stand_in.told.clear()
    return parts


def test_it_wakes_for_weights_then_for_keys_and_values_and_sleeps_once_all_is_drawn(start):
    assert told(*start()) == [
        ["reload_weights", *RESETS],
        ["add_request", "sleep"],
        ["wake_up weights", "reload_weights", *RESETS],
        ["wake_up kv_cache", "add_request", "sleep"],
        ["wake_up kv_cache weights", "add_request", "sleep"],
    ]


def test_of_adapters_the_base_goes_to_it_once(start):
    first, second = "add_request with step-1", "add_request with step-2"
    assert told(*start(lora={"rank": 4})) == [
        ["reload_weights", *RESETS],
        [first, "sleep"],
        ["wake_up weights", "remove_lora", *RESETS],
        ["wake_up kv_cache", second, "sleep"],
        ["wake_up kv_cache weights", second, "sleep"],
    ]
