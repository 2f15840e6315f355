"""The planner, where vLLM or servers draw the rollouts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from longrl.config import RlConfig
from longrl.plan.devices import GPUS
from longrl.plan.plan import Plan, make_plan, max_prompt_tokens
from longrl.plan.text import plan_lines, refusal

TOTAL = GPUS["H200"].memory_bytes
LEAN: dict[str, Any] = {
    "run_dir": "run",
    "steps": 1,
    "model": {"path": "models/Qwen2.5-VL-7B-Instruct", "dtype": "bfloat16", "lora": {}},
    "memory": {"recompute": "layer", "mlp_tile_tokens": 4096},
}


def config(frames: int = 2400, **rollout: Any) -> RlConfig:
    video = {"fps": None, "num_frames": frames, "max_pixels": 142 * 784}
    return RlConfig.model_validate(LEAN | {"video": video, "rollout": {"max_new_tokens": 512} | rollout})


def plan(**rollout: Any) -> Plan:
    return make_plan(config(**rollout), "H200", 1)


def test_vllm_takes_its_share_while_it_draws_and_sleeps_in_host_memory():
    native, vllm = plan(), plan(engine="vllm")
    steady = {part: size for part, size in native.memory.phases["optimizer"].items() if part != "AdamW's denominators"}
    drawing = {"decode": steady | {"vLLM": int(0.4 * TOTAL)}}
    assert vllm.memory.phases == native.memory.phases | drawing
    assert vllm.fits
    weights = 2 * (vllm.shape.trunk_parameters + vllm.shape.tower_parameters)
    assert vllm.memory.host == {"vLLM's weights": weights}
    assert any("pinned: vLLM's weights" in line for line in plan_lines(vllm))


def test_vllm_that_does_not_sleep_takes_it_all_the_time_and_sleep_is_what_is_offered():
    asleep, awake = plan(engine="vllm"), plan(engine="vllm", vllm={"sleep": False})
    for name, parts in asleep.memory.phases.items():
        assert awake.memory.phases[name] == parts | {"vLLM": int(0.4 * TOTAL)}
    assert not awake.memory.host
    assert (asleep.fits, awake.fits) == (True, False)
    assert refusal(awake).endswith(" with rollout.vllm.sleep=true")
    most = [max_prompt_tokens(config(engine="vllm", vllm={"sleep": sleep}), 1, TOTAL) for sleep in (True, False)]
    assert most[0] > 1.2 * most[1]


def test_less_is_offered_where_it_is_too_much_if_vllm_starts_with_it():
    much = plan(engine="vllm", vllm={"gpu_memory_utilization": 0.9})
    assert not much.fits
    assert refusal(much).endswith(" with rollout.vllm.gpu_memory_utilization=0.45")
    # half of this would be less than its weights
    full = config(16, engine="vllm", vllm={"gpu_memory_utilization": 0.19})
    full = make_plan(full.model_copy(update={"model": full.model.model_copy(update={"lora": None})}), "A100-80G", 1)
    assert not full.fits
    assert full.change is not None
    assert "rollout.vllm.gpu_memory_utilization" not in full.change[0]


@pytest.mark.parametrize("share", [0.05, 0.13])  # less than the weights; than them and one response
def test_a_share_that_cannot_hold_its_weights_and_a_response_is_refused(share):
    little = plan(engine="vllm", vllm={"gpu_memory_utilization": share})
    assert not little.fits
    assert little.memory.peak_bytes < little.device.planned_bytes
    more = 0.2 if share == 0.05 else 0.26
    said = (
        rf"vLLM's weights and one response need .* with rollout.vllm.gpu_memory_utilization {share} it has .*={more}$"
    )
    assert re.match(said, refusal(little))


def test_tied_weights_have_a_head_of_their_own_there():
    tied = LEAN | {"model": LEAN["model"] | {"path": "models/Qwen2.5-VL-3B-Instruct"}, "rollout": {"engine": "vllm"}}
    made = make_plan(RlConfig.model_validate(tied), "H200", 1)
    assert made.shape.tied
    head = made.shape.vocabulary * made.shape.width
    whole = made.shape.trunk_parameters + made.shape.tower_parameters + head
    assert made.memory.host["vLLM's weights"] == 2 * whole


@pytest.mark.parametrize("other", [{"engine": "vllm"}, {"server": {"urls": ["http://node1:8100"]}}])
def test_evaluation_is_the_built_in_engines_whatever_draws_the_rollouts(other):
    """So its prompts in flight count, and vLLM has been given the new weights by then."""
    evaluated = {"data": {"eval": "rows.jsonl"}, "eval_every_steps": 5}
    one, many = (
        make_plan(RlConfig.model_validate(config(**other, prompts_in_flight=n).model_dump() | evaluated), "H200", 1)
        for n in (1, 16)
    )
    assert one.fits
    assert not many.fits
    assert many.memory.peak_phase == "evaluation"
    parts = one.memory.phases["evaluation"], many.memory.phases["evaluation"]
    assert parts[1]["prefix KV"] == 16 * parts[0]["prefix KV"]
    assert ("vLLM's weights" in parts[0]) == ("engine" in other)
    assert many.change is not None
    assert many.change[0]["rollout.prompts_in_flight"] == "1"
    # the update holds one prompt
    assert one.memory.phases["suffix"] == many.memory.phases["suffix"]


def test_servers_take_nothing_here():
    served = plan(server={"urls": ["http://node1:8100"]}, engine="vllm", prompts_in_flight=4)
    native = plan()
    assert served.memory.phases == {name: parts for name, parts in native.memory.phases.items() if name != "decode"}
    assert served.memory.host == native.memory.host
    assert "decode" not in served.cost.seconds


@pytest.mark.parametrize(
    ("algo", "passes", "decoded"),
    [
        ({}, 4, 8),
        ({"algorithm": "grpo"}, 5, 8),
        ({"algorithm": "reinforce_pp"}, 6, 8),  # the prompt again, once the batch is scored
        ({"algorithm": "remax"}, 5, 9),  # the likeliest response beside the others
        ({"algorithm": "t_grpo", "algo": {"accuracy": "answer"}}, 6, 8 + 4),  # of the shuffled video four
        ({"algorithm": "dapo"}, 8, 5 * 8),  # at most, with four refills
        ({"rewards": {"judge": 1.0}, "judge": {"models": {"one": {"model": "m", "base_url": "http://j/v1"}}}}, 5, 8),
        ({"rollout": {"engine": "vllm"}}, 5, 8),  # which reads the prompt for itself
        ({"algorithm": "reinforce_pp", "rollout": {"engine": "vllm"}}, 6, 8),
        ({"algorithm": "dapo", "rollout": {"server": {"urls": ["http://node1:8100"]}}}, 4, 0),
    ],
)
def test_passes_and_streams_are_those_of_the_algorithm_and_the_engine(algo, passes, decoded):
    """With recomputation; tests/e2e/test_passes.py counts those that are run."""
    given = RlConfig.model_validate(config().model_dump(exclude_unset=True) | algo)
    made = make_plan(given, "H200", 1)
    work = made.work
    assert made.cost.passes == passes
    assert work.draws * work.rollout * (work.group_size + work.greedy_streams + work.shuffled_streams) == decoded
    lines = [line for line in plan_lines(made) if line.startswith(("passes", "time"))]
    assert all(("at most" in line) == (given.algo.max_refills > 0) for line in lines)


def test_more_streams_take_longer_and_more_room():
    plain, remax, shuffled = (
        make_plan(RlConfig.model_validate(config().model_dump(exclude_unset=True) | algo), "H200", 1)
        for algo in ({}, {"algo": {"advantage": "remax"}}, {"algo": {"shuffled_rollouts": 8}})
    )
    buffers = [one.memory.phases["decode"]["decode buffers"] for one in (plain, remax, shuffled)]
    assert buffers[1] == pytest.approx(9 / 8 * buffers[0])
    assert buffers[2] == buffers[0]
    assert shuffled.cost.seconds["decode"] == pytest.approx(2 * plain.cost.seconds["decode"])
    assert shuffled.cost.seconds["prefill"] == pytest.approx(2 * plain.cost.seconds["prefill"])


@pytest.mark.parametrize("engine", ["native", "auto"])
def test_vllm_that_does_not_draw_takes_nothing(engine):
    assert plan(engine=engine).memory == plan().memory
