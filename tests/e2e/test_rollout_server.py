"""Rollouts by a real server process: the run that one process makes, and one step off-policy."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longrl.config import RlConfig
from longrl.report.metrics import Metrics, read_metrics
from longrl.rollout import remote
from longrl.rollout.client import Server, ServerLostError, ServerRefusedError
from longrl.rollout.native import NativeEngine
from longrl.rollout.wire import TOKEN_ENV, About, Answer, Asked
from longrl.stopping import Stopped, listen
from longrl.train_rl import train_rl
from longrl.training import Training
from longrl.types import Group
from tests.e2e.conftest import rl_config
from tests.rollout_server import ServerProcess

EVEN = "tests.e2e.rewards:first_token_even"
LATE = "tests.e2e.rewards:late_for_some"
AHEAD = {"max_staleness": 1}
OFF_POLICY = {"rollout": AHEAD, "algo": {"correction": "truncate"}}


@pytest.fixture(scope="module")
def served(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with ServerProcess(rl_config(dataset, folder, cache={"dir": str(folder / "cache")}), folder / "server") as server:
        yield server, folder / "cache"


@pytest.fixture
def make(served, dataset, tmp_path):
    """(name of the run, changes) -> a configuration; of the server's rollouts, unless `alone`."""
    server, cache = served

    def config(name: str, *, alone: bool = False, url: str = server.url, **changes: Any) -> RlConfig:
        rollout = {"group_size": 4, "max_new_tokens": 6, **changes.pop("rollout", {})}
        if not alone:
            rollout["server"] = {"urls": [url], "retry_s": 1}
        common = {"run_dir": str(tmp_path / name), "cache": {"dir": str(cache)}, "rewards": {EVEN: 1.0}}
        return rl_config(dataset, tmp_path, **{**common, **changes, "rollout": rollout})

    return config


def lines(config: RlConfig) -> list[dict[str, Any]]:
    """What a run measured, but for times and the cache."""
    timed = ("wall_s", "time/", "cache/")
    return [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in read_metrics(Path(config.run_dir) / "metrics.jsonl")
    ]


def same_bits(ours: Path, theirs: Path) -> bool:
    a, b = (load_file(next(folder.glob("*model.safetensors"))) for folder in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ON_POLICY: dict[str, dict[str, Any]] = {
    "late rewards, two updates": {"rewards": {LATE: 1.0}, "algo": {"updates_per_batch": 2, "kl": "k3", "kl_coef": 0.1}},
    "greedy": {"algorithm": "remax", "algo": {"kl_coef": 0.01}},
    "shuffled, refills": {
        "algorithm": "t_grpo",
        "algo": {"accuracy": EVEN, "shuffled_rollouts": 2, "max_refills": 2},
        "rollout": {"group_size": 2, "max_new_tokens": 2},
    },
}


@pytest.mark.parametrize("changes", ON_POLICY.values(), ids=ON_POLICY)
def test_a_server_gives_the_run_of_one_process(make, changes):
    """To the last bit: the same engine, the same noise, and weights that arrive whole. In one process the prefix of the
    rollout is that of the update; here the update computes it again, from the same numbers."""
    ours, theirs = (make(name, alone=name == "alone", steps=2, **changes) for name in ("served", "alone"))
    assert same_bits(train_rl(ours), train_rl(theirs))
    assert lines(ours) == lines(theirs)
    assert not (Path(ours.run_dir) / "weights").exists()


def test_a_share_is_dealt_out_to_several_servers(make, served, monkeypatch):
    """Here twice to one, which answers requests that wait together at once."""
    watched, (server, _) = Watched(monkeypatch), served
    rows = {"data": {"train": make("run").data.train, "share_media": 1}, "steps": 2}
    config, theirs = make("both", **rows), make("alone", alone=True, **rows)
    assert config.rollout.server is not None
    twice = config.rollout.server.model_copy(update={"urls": (server.url, server.url)})
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": twice})})
    assert same_bits(train_rl(config), train_rl(theirs))
    assert [version for version, *_ in watched.drawn] == [0, 0, 1, 1]


def test_adapters_alone_go_to_the_server_and_a_token_keeps_others_out(make, dataset, tmp_path, served, monkeypatch):
    lora = {"model": {"path": "tiny:qwen2_5_vl", "lora": {"rank": 4}}, "steps": 2}
    sizes, draw = [], Server.draw

    async def measured(self: Server, asked: Any) -> Answer:
        sizes.append(sum(path.stat().st_size for path in Path(asked.weights.folder).glob("*.safetensors")))
        return await draw(self, asked)

    monkeypatch.setattr(Server, "draw", measured)
    config = rl_config(dataset, tmp_path, cache={"dir": str(served[1])}, **lora)
    with ServerProcess(config, tmp_path / "server", **{TOKEN_ENV: "secret"}) as server:
        assert post(server.url, b"{}")[0] == 401
        assert post(server.url, b"{}", Authorization="Bearer secre")[0] == 401
        assert post(server.url, b"{}", Authorization="Bearer secret")[0] == 422
        with pytest.raises(ValueError, match=f"not authorised: set {TOKEN_ENV}"):
            train_rl(make("without", url=server.url, **lora))
        monkeypatch.setenv(TOKEN_ENV, "secret")
        ours, theirs = make("served", url=server.url, **lora), make("alone", alone=True, **lora)
        folder = train_rl(ours)
    assert same_bits(folder, train_rl(theirs))
    assert lines(ours) == lines(theirs)
    saved = next(folder.glob("adapter_model*")).stat().st_size
    assert len(sizes) == 2
    assert all(0.9 * saved < size < 1.1 * saved for size in sizes)


class Watched:
    """When servers drew, and when the trainer updated, on one clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[tuple[int, float, float]] = []
        """Version, from, to."""
        self.updates: list[tuple[float, float]] = []
        draw, timed = Server.draw, Metrics.time

        async def noted(server: Server, asked: Any) -> Answer:
            answer = await draw(server, asked)
            self.drawn.append((asked.weights.version, answer.began_s, answer.ended_s))
            return answer

        @contextmanager
        def noted_time(metrics: Metrics, part: str) -> Iterator[None]:
            began = time.time()
            with timed(metrics, part):
                yield
            if part == "update":
                self.updates.append((began, time.time()))

        monkeypatch.setattr(Server, "draw", noted)
        monkeypatch.setattr(Metrics, "time", noted_time)

    def overlapping(self) -> int:
        """Requests that were worked on while the trainer updated."""
        return sum(any(began < to and start < ended for start, to in self.updates) for _, began, ended in self.drawn)


def test_one_step_off_policy_learns_while_the_server_draws(make, monkeypatch):
    """As test_training's on-policy run: half of all first tokens are even; after 20 steps nearly all are."""
    watched = Watched(monkeypatch)
    config = make(
        "run",
        steps=20,
        prompts_per_step=8,
        optim={"lr": 3e-3},
        rollout={**AHEAD, "group_size": 16, "max_new_tokens": 1},
        algo={"correction": "truncate"},
    )
    train_rl(config)
    assert [version for version, *_ in watched.drawn] == [0, *range(19)]
    # which of them depends on the machine; on-policy, below, none does
    assert watched.overlapping() >= 3
    found = lines(config)
    reward = [line["reward/mean"] for line in found]
    assert 0.3 < reward[0] < 0.7
    assert sum(reward[-3:]) / 3 > 0.9
    assert found[0]["sampling/logprob_diff"] < 1e-5
    later = [line for line in found[1:] if line["groups/informative"]]
    assert all(line["sampling/logprob_diff"] is None for line in later)
    assert max(line["sampling/stale_logprob_diff"] for line in later) > 1e-3
    assert all(line["correction"] != 1 for line in later[:5])


def test_on_policy_the_two_take_turns(make, monkeypatch):
    watched = Watched(monkeypatch)
    train_rl(make("run"))
    assert [version for version, *_ in watched.drawn] == [0, 1, 2]
    assert watched.overlapping() == 0


def test_an_off_policy_run_is_taken_up_bit_for_bit(make, monkeypatch):
    """Stopped by a signal in step 2 and by Ctrl-C in step 5, after a checkpoint in step 3: each keeps what was drawn
    ahead of it."""
    common = {**OFF_POLICY, "steps": 6, "checkpoint": {"every_steps": 3}}
    whole = train_rl(make("whole", **common))
    update, config = Training.update, make("run", **common)
    listen()

    def interrupted(self: Training, step: int, *rest: Any) -> Any:
        if step == 2 and not self.done:
            signal.raise_signal(signal.SIGUSR1)
        if step == 5:
            raise KeyboardInterrupt
        return update(self, step, *rest)

    monkeypatch.setattr(Training, "update", interrupted)
    with pytest.raises(Stopped, match="stopped after step 2 of 6 and saved"):
        train_rl(config)
    with pytest.raises(KeyboardInterrupt):
        train_rl(config)
    monkeypatch.setattr(Training, "update", update)
    assert same_bits(train_rl(config), whole)
    assert lines(config) == lines(make("whole", **common))


def test_a_lost_server_stops_the_run_which_goes_on_when_it_is_back(make, dataset, tmp_path, served, monkeypatch):
    """Lost in step 3, for good: the run is saved. Lost in step 5, and back in time: it is not noticed."""
    common = {**OFF_POLICY, "steps": 6}
    whole = train_rl(make("whole", **common))
    config = rl_config(dataset, tmp_path, cache={"dir": str(served[1])})
    with ServerProcess(config, tmp_path / "server") as server:
        config, update = make("run", url=server.url, **common), Training.update

        def lost(self: Training, step: int, *rest: Any) -> Any:
            if step in (3, 5):
                server.kill()
            if step == 5:
                server.start()
            return update(self, step, *rest)

        monkeypatch.setattr(Training, "update", lost)
        with pytest.raises(
            Stopped, match=r"is away .* start it .*; stopped after step [34] of 6 and saved; start it again"
        ):
            train_rl(config)
        with pytest.raises(ServerLostError, match="is away"):
            train_rl(config)  # still away: before anything is done
        server.start()
        assert config.rollout.server is not None
        patient = config.rollout.server.model_copy(update={"retry_s": 100.0})
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": patient})})
        assert same_bits(train_rl(config), whole)
        assert lines(config) == lines(make("whole", **common))


def test_a_refusal_ends_a_run_that_is_saved(make, monkeypatch):
    config, draw = make("run"), Server.draw

    async def refused(self: Server, asked: Asked) -> Answer:
        if asked.weights.version == 2:
            raise ServerRefusedError("a prompt is too long")
        return await draw(self, asked)

    monkeypatch.setattr(Server, "draw", refused)
    with pytest.raises(ServerRefusedError, match="a prompt is too long"):
        train_rl(config)
    assert [path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step_000002"]


def test_a_run_that_is_to_stop_does_not_wait_for_long(make, monkeypatch, caplog):
    """The rollouts are drawn again, from the weights that drew them, which the run's directory still has."""
    whole = train_rl(make("whole", **OFF_POLICY))
    config, draw, update = make("run", **OFF_POLICY), Server.draw, Training.update
    listen()

    async def slow(self: Server, asked: Asked) -> Answer:
        await asyncio.sleep(60 if asked.weights.version == 1 else 0)
        return await draw(self, asked)

    def stopped(self: Training, step: int, *rest: Any) -> Any:
        if step == 2:
            signal.raise_signal(signal.SIGUSR1)
        return update(self, step, *rest)

    monkeypatch.setattr("longrl.rollout.ahead.STOPPING_S", 0.1)
    monkeypatch.setattr(Server, "draw", slow)
    monkeypatch.setattr(Training, "update", stopped)
    with pytest.raises(Stopped, match="stopped after step 2 of 3 and saved"):
        train_rl(config)
    assert "the rollouts of step 3 are not there 0.1 s after it was to stop: not saved" in caplog.text
    monkeypatch.setattr(Server, "draw", draw)
    monkeypatch.setattr(Training, "update", update)
    assert same_bits(train_rl(config), whole)


def test_rollouts_that_are_too_old_stop_the_run(make, monkeypatch):
    class Older(NativeEngine):
        def _make_group(self, *args: Any) -> Group:
            group = super()._make_group(*args)
            old = tuple(replace(one, policy_version=one.policy_version - 1) for one in group.rollouts)
            return replace(group, rollouts=old)

    monkeypatch.setattr("longrl.rollout.engine.NativeEngine", Older)
    with pytest.raises(RuntimeError, match=r"weights version -1, the policy's is 0, and rollout.max_staleness 0"):
        train_rl(make("run", alone=True))


def test_a_prompt_that_a_server_has_no_room_for_is_left_out(make, dataset, monkeypatch, tmp_path):
    row = json.loads(dataset.train_rl.read_text().splitlines()[0])
    row["video"] = str(dataset.train_rl.parent / row["video"])
    long = row | {"id": "long", "question": "Why? " * 999}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(long)}\n")
    about = Server.about

    async def cramped(self: Server) -> About:
        return (await about(self)).model_copy(update={"room": 1000})

    monkeypatch.setattr(Server, "about", cramped)
    rows = {"train": str(tmp_path / "rows.jsonl"), "on_error": "skip"}
    config = make("run", steps=2, prompts_per_step=1, data=rows)
    train_rl(config)
    assert lines(config)[-1]["data/skipped"] == 1


# what does not go together


def test_another_model_is_refused_before_the_first_step(make):
    for model in ({"path": "tiny:qwen2"}, {"path": "tiny:qwen2_5_vl", "lora": {"rank": 4}}):
        with pytest.raises(
            ValueError, match=r"has another model \(fingerprint \w{12}, the run's is \w{12}\): start it"
        ):
            train_rl(make(model["path"] + str(len(model)), model=model))


def test_an_entry_that_the_servers_cache_lacks_is_named(make, tmp_path):
    config = make("run", cache={"dir": str(tmp_path / "cache of its own")}, video={"fps": 0.7})
    with pytest.raises(
        ValueError, match=r"embedding cache /.*cache has no entry [0-9a-f]{64}; cache.dir must be a folder"
    ):
        train_rl(config)


def test_weights_that_the_server_does_not_see_are_named(make, monkeypatch):
    current = remote.Outbox.current

    def elsewhere(self: remote.Outbox) -> Any:
        return current(self).model_copy(update={"folder": "/another/machine"})

    monkeypatch.setattr(remote.Outbox, "current", elsewhere)
    with pytest.raises(ValueError, match=r"weights /another/machine of version 0 cannot be read .*share"):
        train_rl(make("run"))


def post(url: str, body: bytes, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"{url}/rollouts", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_malformed_request_gets_a_line_and_hurts_nobody(make, served, monkeypatch):
    server, _ = served
    bodies = []
    draw = Server.draw

    async def kept(self: Server, asked: Any) -> Answer:
        bodies.append(asked)
        return await draw(self, asked)

    monkeypatch.setattr(Server, "draw", kept)
    train_rl(make("run", steps=1))
    [good] = bodies
    prompt = good.prompts[0]
    wrong = {
        b"": "malformed request: Invalid JSON",
        b"{}": "malformed request: model: Field required",
        b"\xff\xfe": "malformed request: Invalid JSON",
        good.model_copy(update={"model": "x" * 64}): "the request is for another model",
        good.model_copy(
            update={"prompts": (prompt.model_copy(update={"token_ids": (10**6, *prompt.token_ids[1:])}),)}
        ): ("token 1000000 is none of the"),
        good.model_copy(
            update={
                "prompts": (
                    prompt.model_copy(update={"media": (prompt.media[0].model_copy(update={"slots": ((0, 3),)}),)}),
                )
            }
        ): "embeddings for 3 tokens",
    }
    for body, message in wrong.items():
        status, line = post(server.url, body if isinstance(body, bytes) else body.model_dump_json().encode())
        assert status in (409, 422)
        assert line.startswith(message) or message in line
        assert "\n" not in line
    # what it was asked before it is still asked: weights of a run that is over are gone, and it says so
    status, line = post(server.url, good.model_dump_json().encode())
    assert (status, "cannot be read" in line) == (200, False) or (status == 422 and "cannot be read" in line)
    assert server.process.poll() is None
