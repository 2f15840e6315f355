"""What a run and its rollout servers say to each other, and the weights that they hand over."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from longrl.config import ModelConfig
from longrl.evals.controls import shuffled, shuffled_by_key
from longrl.models import load_family
from longrl.parallel.ranks import ALONE
from longrl.policy import Policy
from longrl.rollout.weights import Outbox, fingerprint, learned, read_weights
from longrl.rollout.wire import Asked, Weights, explain
from longrl.types import Clip, MediaEmbeds

KEY = "0123456789abcdef" * 4
PROMPT = {"id": "q", "token_ids": [1, 2, 3], "position_ids": [[0, 1, 2]] * 3, "media": [], "seed": 7}
MEDIA = {"key": KEY, "clip": None, "slots": [[1, 3]]}
ROLLOUT = {"token_ids": [5], "logprobs": [-0.1], "text": "x", "finish_reason": "stop", "policy_version": 3}
ANSWER = {"rollouts": [[ROLLOUT, ROLLOUT]], "began_s": 1.0, "ended_s": 2.0}


def asked(**changes: Any) -> Asked:
    whole = {
        "model": "m",
        "weights": {"version": 3, "folder": "/w"},
        "sampling": {"group_size": 2, "max_new_tokens": 4, "temperature": 1.0, "greedy": False},
        "prompts": [PROMPT],
        **changes,
    }
    return Asked.model_validate_json(json.dumps(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": []}, r"token_ids: .*at least 2"),
        ({"token_ids": [1], "position_ids": [[0]] * 3}, r"token_ids: .*at least 2"),
        ({"token_ids": [1, -2, 3]}, r"token_ids\.1: .*greater than or equal to 0"),
        ({"token_ids": [1, 2.5, 3]}, r"token_ids\.1: .*integer"),
        ({"position_ids": [[0, 1]]}, "2 positions for 3 tokens, expected as many"),
        ({"position_ids": []}, "position_ids: .*at least 1"),
        ({"seed": "7"}, "seed: .*integer"),
        ({"pixels": [1]}, "pixels: Extra inputs"),
        ({"media": [{**MEDIA, "slots": [[1, 4]]}]}, "tokens 1 to 4 are not a part of 3 tokens"),
        ({"media": [{**MEDIA, "slots": [[2, 2]]}]}, "tokens 2 to 2 are not a part of 3 tokens"),
        ({"media": [{**MEDIA, "key": "../../etc/passwd"}]}, r"media\.0\.key: String should match pattern"),
        ({"media": [{**MEDIA, "clip": {"path": "a.mp4"}}]}, "set exactly one of fps"),
    ],
)
def test_a_malformed_prompt_is_explained_in_a_line(changes, message):
    asked(prompts=[{**PROMPT, "media": [MEDIA]}])
    with pytest.raises(ValidationError) as raised:
        asked(prompts=[{**PROMPT, **changes}])
    line = explain(raised.value)
    assert "\n" not in line
    assert re.search(message, line)


def test_a_prompt_of_200k_tokens_goes_through():
    """Three axes of positions, as of an hour of video: five megabytes, far under a second on any machine."""
    count = 200_000
    clip = {"path": "hour.mp4", "fps": 1.0}
    media = {"key": KEY, "clip": clip, "slots": [[5, count - 50]]}
    prompt = {
        "id": "q",
        "token_ids": [i % 150_000 for i in range(count)],
        "position_ids": [list(range(count))] * 3,
        "media": [media],
        "seed": 2**62,
    }
    began = time.perf_counter()
    one = asked(prompts=[prompt])
    body = one.model_dump_json().encode()
    assert Asked.model_validate_json(body) == one
    assert time.perf_counter() - began < 20
    assert len(body) < 8e6
    assert one.prompts[0].media[0].clip == Clip(path="hour.mp4", fps=1.0)


# weights


def policy_of(seed: int, **model: Any) -> Policy:
    config = ModelConfig.model_validate({"path": "tiny:qwen2_5_vl", **model})
    return Policy(load_family(config, seed))


def same(a: Policy, b: Policy) -> bool:
    mine, theirs = learned(a), learned(b)
    return mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "adapters"])
def test_weights_arrive_bit_for_bit_and_older_ones_go(tmp_path, lora, monkeypatch):
    monkeypatch.setattr("longrl.rollout.weights.PART_BYTES", 100_000)  # several files
    ours, theirs = policy_of(1, lora=lora), policy_of(1, lora=lora)
    with torch.no_grad():
        for parameter in learned(ours).values():
            parameter.add_(torch.randn_like(parameter))
    outbox = Outbox(tmp_path / "weights", ours, ALONE)
    first = outbox.current()
    assert outbox.current() is first  # once a version
    assert not same(ours, theirs)
    read_weights(theirs, first)
    assert same(ours, theirs)
    assert ("lora" in str([*learned(ours)])) == bool(lora)
    ours.version = 12
    with torch.no_grad():
        next(iter(learned(ours).values())).mul_(2)
    second = outbox.current()
    assert (second.version, second.folder == first.folder) == (12, False)
    assert [str(path) for path in (tmp_path / "weights").iterdir()] == [second.folder]
    assert outbox.of(12) == second
    assert outbox.of(0) is None
    read_weights(theirs, second)
    assert theirs.version == 12
    assert same(ours, theirs)
    outbox.clear()
    assert not (tmp_path / "weights").exists()


def test_weights_that_cannot_be_used_are_refused(tmp_path):
    ours = policy_of(1)
    weights = Outbox(tmp_path / "weights", ours, ALONE).current()
    with pytest.raises(ValueError, match=r"are of version 0, expected 5"):
        read_weights(ours, Weights(version=5, folder=weights.folder))
    with pytest.raises(ValueError, match=r"/nowhere of version 0 cannot be read .*storage that the run .* share"):
        read_weights(ours, Weights(version=0, folder="/nowhere"))
    with pytest.raises(ValueError, match=r"are not of the server's model: .* is None there, .* here \(and \d+ more\)"):
        read_weights(policy_of(1, lora={"rank": 2}), weights)
    [file] = Path(weights.folder).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(ours, weights)
    file.unlink()
    with pytest.raises(ValueError, match=r"lack .* \(and \d+ more\)"):
        read_weights(ours, weights)


def test_weights_that_cannot_be_written_leave_none(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path / "weights", policy_of(1), ALONE)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longrl.rollout.weights.save_file", full)
    with pytest.raises(OSError, match="No space"):
        outbox.current()
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_fingerprint_says_what_steps_do_not_change():
    def of(policy: Policy, **model: Any) -> str:
        return fingerprint(policy, ModelConfig.model_validate({"path": "anywhere", **model}))

    lora = {"rank": 2}
    whole, adapted = policy_of(1), policy_of(1, lora=lora)
    assert of(whole) == of(policy_of(2))  # all of it is learned, and comes before the first rollout
    assert of(adapted, lora=lora) == of(policy_of(1, lora=lora), lora=lora)
    assert of(adapted, lora=lora) == of(policy_of(1, lora=lora, dtype="bfloat16"), lora=lora)
    others = [
        of(policy_of(2, lora=lora), lora=lora),  # another base
        of(adapted, lora={"rank": 2, "alpha": 7.0}),
        of(whole, rope={"theta": 5e5}),
        of(Policy(load_family(ModelConfig(path="tiny:qwen2"), 1))),
    ]
    assert len({of(whole), of(adapted, lora=lora), *others}) == 6
    before = of(adapted, lora=lora)
    with torch.no_grad():
        for parameter in learned(adapted).values():
            parameter.add_(1)
    assert of(adapted, lora=lora) == before


def test_shuffled_frames_are_found_by_their_key():
    media = MediaEmbeds(
        embeds=torch.arange(12.0)[:, None],
        grid_thw=(6, 2, 2),
        seconds_per_grid=1.0,
        timestamps_s=torch.arange(6.0, dtype=torch.float64),
        key=KEY,
    )
    for names in ((0, 3), (-5, 12)):
        there = shuffled(media, *names)
        here = shuffled_by_key(there.key, lambda key: media if key == KEY else None)
        assert here is not None
        assert here.key == there.key
        assert torch.equal(here.embeds, there.embeds)
        assert not torch.equal(here.embeds, media.embeds)
    assert shuffled_by_key(KEY, lambda _: media) is media
    assert shuffled_by_key(f"{KEY}:shuffled:1:2", lambda _: None) is None
