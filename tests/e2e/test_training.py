"""The training programs on real files and the tiny twin: they learn, resume exactly, and write what others can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from longrl.config import ModelConfig, RlConfig
from longrl.models import load_family
from longrl.parallel import attend, tensor_files
from longrl.plan.plan import max_prompt_tokens
from longrl.report.metrics import read_metrics
from longrl.rollout.native import NativeEngine
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from longrl.types import MediaError
from tests.e2e import rewards
from tests.e2e.conftest import rl_config, sft_config

EVEN = {"tests.e2e.rewards:first_token_even": 1.0}
INTERRUPTED = {"tests.e2e.rewards:interrupted": 1.0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sft_lowers_the_loss(dataset, tmp_path):
    train_sft(sft_config(dataset, tmp_path, steps=12))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("model", ["tiny:qwen2_5_vl", "tiny:vila"])
def test_rl_raises_the_reward(dataset, tmp_path, model):
    """Half of all first tokens are even; after 18 steps of 128 one-token rollouts nearly all are."""
    config = rl_config(
        dataset,
        tmp_path,
        model={"path": model},
        steps=18,
        prompts_per_step=8,
        rewards=EVEN,
        optim={"lr": 3e-3},
        rollout={"group_size": 16, "max_new_tokens": 1},
    )
    train_rl(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0.3 < lines[0]["reward/mean"] < 0.7
    assert sum(line["reward/mean"] for line in lines[-3:]) / 3 > 0.9
    compared = [line["sampling/logprob_diff"] for line in lines if line["groups/informative"]]
    assert max(compared) < 1e-5
    assert {"time/media", "time/prefill", "time/decode", "time/update", "time/optimizer"} <= lines[0].keys()
    assert lines[-1]["cache/hit_rate"] > lines[0]["cache/hit_rate"] - 1e-9


@pytest.mark.parametrize(
    "algo",
    [{}, {"kl": "k3", "kl_coef": 0.1}, {"normalise": "sequence", "advantage": "rloo"}, {"updates_per_batch": 2}],
)
def test_resume_is_bit_identical(dataset, tmp_path, algo):
    """Ctrl-C in the middle of step 4 of 5, checkpoints every 2 steps."""
    common = {"steps": 5, "checkpoint": {"every_steps": 2}, "algo": algo, "rewards": INTERRUPTED}
    rewards.calls["until_interrupt"] = -1
    whole = train_rl(rl_config(dataset, tmp_path, **common, run_dir=str(tmp_path / "whole")))
    config = rl_config(dataset, tmp_path, **common)
    rewards.calls["until_interrupt"] = 3 * 16 + 5
    with pytest.raises(KeyboardInterrupt):
        train_rl(config)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    resumed = train_rl(config)
    assert same_bits(weights(whole), weights(resumed))
    assert same_bits(*(tensor_files.read(folder / "../trainer") for folder in (whole, resumed)))

    def values(run: str) -> list[dict]:
        timed = ("wall_s", "time/", "cache/")
        lines = read_metrics(tmp_path / run / "metrics.jsonl")
        return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]

    assert values("run") == values("whole")


def test_a_reference_in_host_memory_is_the_same_reference(dataset, tmp_path):
    found = []
    for offload in (False, True):
        algo = {"kl": "k3", "kl_coef": 0.1, "offload_reference": offload}
        run = {"run_dir": str(tmp_path / f"{offload}"), "algo": algo, "rewards": EVEN, "steps": 2}
        found.append(weights(train_rl(rl_config(dataset, tmp_path, **run))))
    assert same_bits(*found)


def test_sft_resume_is_bit_identical(dataset, tmp_path):
    whole = train_sft(sft_config(dataset, tmp_path, steps=4, run_dir=str(tmp_path / "whole")))
    config = sft_config(dataset, tmp_path, steps=4, checkpoint={"every_steps": 2, "keep": 9})
    train_sft(config)
    last = tmp_path / "run" / "checkpoints" / "step_000004"
    (last / "model" / "model.safetensors").write_bytes(b"cut short")
    assert same_bits(weights(whole), weights(train_sft(config)))


def test_checkpoint_loads_in_transformers_with_equal_logits(dataset, tmp_path):
    folder = train_sft(sft_config(dataset, tmp_path, steps=1))
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    ours = load_family(ModelConfig(path=str(folder)))
    ids = AutoTokenizer.from_pretrained(folder)("what comes first?", return_tensors="pt").input_ids
    ours.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, ours.model(input_ids=ids).logits)


def test_unscored_rollouts_are_not_trained(dataset, tmp_path):
    train_rl(rl_config(dataset, tmp_path, rewards={"tests.e2e.rewards:sometimes_unknown": 1.0}))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < line["reward/unscored"] < 1 for line in lines)


def test_later_updates_of_a_batch_are_clipped_and_the_optimizer_counts_them(dataset, tmp_path):
    """With 1e9 for bounds nothing is. Means that are logged are over all updates, of which the first has ratio 1."""
    ends = []
    for run, bounds in (("run", {}), ("unclipped", {"clip_low": 1e9, "clip_high": 1e9})):
        algo = {"updates_per_batch": 3, "loss": "clip", **bounds}
        config = rl_config(dataset, tmp_path, rewards=EVEN, steps=2, algo=algo, run_dir=str(tmp_path / run))
        folder = train_rl(config)
        ends.append(weights(folder))
        line = read_metrics(tmp_path / run / "metrics.jsonl")[0]
        clipped = line["clip/low"] + line["clip/high"]
        assert 0 < clipped < 2 / 3 if run == "run" else clipped == 0
        assert line["approx_kl"] > 1e-3
        assert abs(line["ratio"] - 1) > 1e-6
        assert line["sampling/logprob_diff"] < 1e-5  # compared under the weights that sampled, only
        trainer = tensor_files.read(folder / "../trainer")
        assert {int(value) for name, value in trainer.items() if name.endswith("step")} == {6}
    assert not same_bits(*ends)


def test_group_without_signal_costs_no_update(dataset, tmp_path):
    """Every rollout gets the same reward: nothing is trained, the weights do not move."""
    before = load_family(ModelConfig(path="tiny:qwen2_5_vl"), 0).model.state_dict()
    folder = train_rl(rl_config(dataset, tmp_path, rewards={"format": 1.0}, steps=1))
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["groups/informative"] == 0
    assert line["grad_norm"] == line["loss"] == 0
    assert line["sampling/logprob_diff"] is None  # nothing was compared
    after = load_family(ModelConfig(path=str(folder))).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logprob_mismatch_stops_the_run(dataset, tmp_path, monkeypatch):
    own = attend._attend_own  # the engine reads other keys
    monkeypatch.setattr(attend, "_attend_own", lambda q, k, *rest: own(q, k * 1.01, *rest))
    config = rl_config(dataset, tmp_path, rewards=EVEN, algo={"max_logprob_diff": 1e-6})
    with pytest.raises(RuntimeError, match="log-probs differ by"):
        train_rl(config)


def with_unusable(rows_path: Path, out: Path) -> Path:
    """The rows of a data set, and four whose videos are no videos, and one whose video is missing."""
    out.with_suffix(".mp4").write_bytes(b"not a video")
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    for row in rows:
        row["video"] = str(rows_path.parent / row["video"])
    rows += [{**rows[0], "id": f"broken{i}", "video": str(out.with_suffix(".mp4"))} for i in range(4)]
    rows.append({**rows[0], "id": "gone", "video": "gone.mp4"})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_unusable_video_is_raised_or_counted(dataset, tmp_path):
    rows = with_unusable(dataset.train_rl, tmp_path / "rows.jsonl")

    def config(run: str, **data) -> RlConfig:
        data = {"train": str(rows), "share_media": 3, **data}
        return rl_config(dataset, tmp_path, data=data, steps=4, rewards=EVEN, run_dir=str(tmp_path / run))

    with pytest.raises(ValueError, match=r"gone\.mp4"):
        train_rl(config("run"))
    train_rl(config("skipping", on_error="skip"))
    assert read_metrics(tmp_path / "skipping" / "metrics.jsonl")[-1]["data/skipped"] == 5
    with pytest.raises(ValueError, match="max_skips allows only 1"):
        train_rl(config("capped", on_error="skip", max_skips=1))


def test_resumed_run_counts_skips_as_an_uninterrupted_one(dataset, tmp_path):
    rows = with_unusable(dataset.train_sft, tmp_path / "rows.jsonl")
    data = {"train": str(rows), "on_error": "skip"}
    train_sft(sft_config(dataset, tmp_path, steps=5, data=data, checkpoint={"every_steps": 4}))
    whole = [line["data/skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert whole[3] > 1  # the missing file and something that came up before step 5
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000005")
    train_sft(sft_config(dataset, tmp_path, steps=5, data=data, checkpoint={"every_steps": 4}))
    assert [line["data/skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == whole


@pytest.mark.parametrize(
    "typo",
    [
        {"data": {"train": "typo.jsonl"}},
        {"model": {"path": "tiny:typo"}},
        {"algo": {"advantage": "typo"}},
        {"algo": {"loss": "typo"}},
        {"rewards": {"typo": 1.0}},
        {"eval_every_steps": 1, "data": {"eval": None}},
    ],
    ids=lambda typo: "+".join(typo),
)
def test_a_typo_leaves_no_run_behind(dataset, tmp_path, typo):
    config = rl_config(dataset, tmp_path)
    wrong = config.model_dump() | {
        name: {**(config.model_dump()[name] if name in ("data", "model", "algo") else {}), **value}
        if isinstance(value, dict)
        else value
        for name, value in typo.items()
    }
    with pytest.raises(ValueError, match=r"typo|data\.eval"):
        train_rl(RlConfig.model_validate(wrong))
    assert not Path(config.run_dir).exists()


def test_rl_evaluates_when_due_and_at_the_end(dataset, tmp_path):
    train_rl(rl_config(dataset, tmp_path, steps=3, eval_every_steps=2, eval={"samples": 1}))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["eval/accuracy" in line for line in lines] == [False, True, True]


def test_what_is_over_the_memory_plan_is_refused_before_it_is_decoded(dataset, tmp_path, monkeypatch):
    """A prompt, on a machine with room for a few tokens; with a mebibyte less, the run."""
    config = rl_config(dataset, tmp_path, cache={"dir": str(tmp_path / "cache")})
    decoded = []
    monkeypatch.setattr("longrl.video.decode.Selection.read", lambda *args: decoded.append(args))

    def room(mebibytes: int) -> int | None:
        monkeypatch.setattr("longrl.plan.devices._machine_bytes", lambda: mebibytes * 2**20)
        return max_prompt_tokens(config, 1, None)

    least = next(mebibytes for mebibytes in range(300, 900) if room(mebibytes))
    with pytest.raises(MediaError, match=r"its prompt would have \d+ tokens, .* the memory plan .* allows \d+;"):
        train_rl(config)
    assert room(least - 1) == 0
    with pytest.raises(ValueError, match=r"no room for a prompt of any length .*; longrl check names a change"):
        train_rl(config)
    assert not decoded


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("longest_prompt", r"its prompt would have \d+ tokens, .* vLLM's room beside .* allows 20;"),
        ("longest_clip", r"a clip of \d+ embeddings, but the engine has room for 20;"),
    ],
)
def test_what_is_over_the_engines_room_is_refused_before_it_is_decoded(dataset, tmp_path, monkeypatch, bound, message):
    """Of an engine that has less than the memory plan."""

    class Small(NativeEngine):
        pass

    setattr(Small, bound, property(lambda self: 20))

    def build(config, policy, time, ranks, *, greedy):
        return Small(policy, config.rollout, time, greedy=greedy)

    decoded = []
    monkeypatch.setattr("longrl.video.decode.Selection.read", lambda *args: decoded.append(args))
    monkeypatch.setattr("longrl.train_rl.build_engine", build)
    with pytest.raises(MediaError, match=message):
        train_rl(rl_config(dataset, tmp_path, cache={"dir": str(tmp_path / "cache")}))
    assert not decoded
