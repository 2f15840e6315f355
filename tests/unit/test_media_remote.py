"""Media scored over HTTP: what goes over the wire, and services and judges that misbehave."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from longrl.flow_types import Media, MediaPrompt
from longrl.rewards.media import MediaRewards
from longrl.scorers_config import ScorersConfig
from tests.media_scoring import ScoringServer

SECRET = "sk-live-0123456789abcdef"
ROW = {"tag": "counting", "include": [{"class": "clock", "count": 2}]}
FAST = {"attempts": 3, "backoff_s": 0.01, "timeout_s": 0.5, "breaker_failures": 1000}


@pytest.fixture
def server() -> Iterator[ScoringServer]:
    with ScoringServer() as made:
        yield made


def media(levels: tuple[int, ...], frames: int = 1) -> Media:
    """Flat pictures, of so many grey levels."""
    pixels = np.array(levels, np.uint8)[:, None, None, None, None]
    pixels = np.broadcast_to(pixels, (len(levels), frames, 8, 8, 3)).copy()
    return Media(prompt=MediaPrompt(id="p7", text="two clocks", extra=ROW), pixels=pixels)


def service(server: ScoringServer, folder, **changes) -> MediaRewards:
    section = {"url": server.url, "dir": str(folder), "limits": FAST, **changes}
    return MediaRewards({"det": 1.0}, ScorersConfig.model_validate({"services": {"det": section}, "frames": 2}))


def level(picture: bytes) -> int:
    return round(float(np.asarray(Image.open(io.BytesIO(picture))).mean()))


def brightness(body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """A service of the json protocol: the mean level of the frames."""
    said = json.loads(body)
    assert said["id"] == "p7"
    assert (said["prompt"], said["metadata"]) == ("two clocks", ROW)
    levels = [level(base64.b64decode(frame)) for frame in said["frames"]]
    return 200, json.dumps({"score": sum(levels) / len(levels) / 100}).encode()


def test_a_json_service_is_asked_once_for_each_sample(server, tmp_path):
    server.behave = brightness
    scored = service(server, tmp_path)
    assert scored(media((0, 50, 250))).total == [0, 0.5, 2.5]  # 0 is a score
    assert server.asked == 3
    assert service(server, tmp_path)(media((50, 250, 0))).total == [0.5, 2.5, 0]  # in another run
    assert server.asked == 3
    assert scored(media((50,), frames=5)).total == [0.5]
    assert server.asked == 4
    counted = scored.take().sums
    assert (counted["det/requests"], counted["det/unanswered"]) == (4, 0)


def test_genevals_server_is_understood_and_not_trusted(server, tmp_path):
    def geneval(body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        said = pickle.loads(body)
        levels = [level(picture) for picture in said["images"]]
        assert said["meta_datas"] == [ROW | {"prompt": "two clocks"}] * len(levels)
        part = [x / 100 for x in levels]
        strict = [float(x > 1) for x in part]
        return 200, pickle.dumps({"scores": part, "strict_rewards": strict if said["only_strict"] else None})

    server.behave = geneval
    assert service(server, tmp_path, protocol="geneval")(media((50, 250), frames=3)).total == [0.5, 2.5]
    assert service(server, tmp_path, protocol="geneval", strict=True)(media((50, 250))).total == [0, 1]

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    server.behave = lambda body, headers: (200, pickle.dumps({"scores": [Evil()]}))
    assert service(server, tmp_path, protocol="geneval")(media((7,))).total == [None]
    assert not (tmp_path / "opened").exists()


BAD = [
    (200, b""),
    (200, b"0.5"),
    (200, b"[]"),
    (200, b'{"score": null}'),
    (200, b'{"score": "0.5"}'),
    (200, b'{"score": true}'),
    (200, b'{"score": NaN}'),
    (200, b'{"score": 1e999}'),
    (200, b"\xff\xfe"),
    (302, b'{"score": 1}'),
    (400, b"no"),
    (503, b"later"),
]


def test_a_failure_is_none_and_counted_and_nothing_bad_is_a_score(server, tmp_path, caplog):
    scored = service(server, tmp_path)
    for number, reply in enumerate(BAD):
        server.behave = lambda body, headers, reply=reply: reply
        assert scored(media((number,))).total == [None], reply
    assert scored.failures == {"det": len(BAD)}
    assert "reward det of sample 0 of prompt p7 failed: scorers.services.det: HTTP 400: no" in caplog.text
    server.behave = brightness
    assert scored(media((0, 100))).total == [0, 1]  # failures were not kept


def test_what_passes_is_tried_again_and_one_sample_fails_alone(server, tmp_path):
    tried: dict[int, int] = {}

    def flaky(body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        which = level(base64.b64decode(json.loads(body)["frames"][0]))
        tried[which] = tried.get(which, 0) + 1
        return brightness(body, headers) if which == 10 or (which == 20 and tried[which] == 3) else (500, b"oops")

    server.behave = flaky
    assert service(server, tmp_path)(media((10, 20, 30))).total == [0.1, 0.2, None]
    assert tried == {10: 1, 20: 3, 30: 3}


def test_a_service_that_is_not_there_is_found_at_the_start(server, tmp_path, monkeypatch):
    server.behave = brightness
    service(server, tmp_path).check(media((9,)))
    server.behave = lambda body, headers: (401, f"bad token {headers['authorization']}".encode())
    monkeypatch.setenv("DET_KEY", SECRET)
    keyed = service(server, tmp_path, key_env="DET_KEY")
    with pytest.raises(ValueError, match=r"det: HTTP 401: bad token Bearer \[key\]; asked at http://127"):
        keyed.check(media((9,)))
    server.behave = lambda body, headers: (200, json.dumps({"score": "x" * 55 + headers["authorization"]}).encode())
    with pytest.raises(RuntimeError, match=r"a score is x+Bearer \[key\], expected a finite number"):
        keyed.check(media((9,)))
    gone = service(server, tmp_path, url="http://127.0.0.1:9/score")
    with pytest.raises(RuntimeError, match=r"scorers\.services\.det: ConnectError.*asked at http://127\.0\.0\.1:9"):
        gone.check(media((9,)))
    monkeypatch.delenv("DET_KEY")
    with pytest.raises(ValueError, match=r"scorers\.services\.det: the environment variable DET_KEY is not set"):
        service(server, tmp_path, key_env="DET_KEY")
    config = ScorersConfig.model_validate({"services": {"det": {"url": "http://x", "dir": str(tmp_path)}}})
    with pytest.raises(ValueError, match=r"det\.limits\.concurrency is 8, but 9 processes divide it"):
        MediaRewards({"det": 1.0}, config, processes=9)


# Vision-language models


def test_a_vlm_sees_the_frames_and_the_prompt(server, tmp_path):
    seen = []

    def chat(body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        said = json.loads(body)
        system, user = (message["content"] for message in said["messages"])
        *pictures, text = user
        levels = [level(base64.b64decode(one["image_url"]["url"].partition("base64,")[2])) for one in pictures]
        mark = system.split()[-1]
        prompt = re.fullmatch(rf"\[PROMPT {mark}\]\n(.*)\n\[/PROMPT {mark}\]", text["text"])
        assert prompt is not None
        assert "The criterion is colour." in system
        assert '{"reason": "<one sentence>", "score": <0 to 10>}' in system
        seen.append((prompt[1], levels, said["model"]))
        score = {"mild": levels[0] // 10, "strict": 0, "broken": 11}[said["model"]]
        message = {"role": "assistant", "content": json.dumps({"reason": "so", "score": score})}
        usage = {"prompt_tokens": 500, "completion_tokens": 10, "total_tokens": 510}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        return 200, json.dumps(reply).encode()

    def vlm(*names: str, **changes) -> MediaRewards:
        url = f"{server.url}/v1"
        models = {name: {"base_url": url, "model": name, "key_env": None} for name in names}
        section = {"models": models, "dir": str(tmp_path), "criterion": "colour", "limits": FAST} | changes
        return MediaRewards({"vlm": 1.0}, ScorersConfig.model_validate({"vlm": section, "frames": 2}))

    server.behave = chat
    scored = vlm("mild")
    scored.check(media((0,)))
    assert scored(media((30, 100), frames=3)).total == [0.3, 1.0]
    assert ("two clocks", [30, 30], "mild") in seen
    asked = server.asked
    assert vlm("mild")(media((100, 30), frames=3)).total == [1.0, 0.3]
    assert server.asked == asked  # verdicts are kept
    assert scored.take().sums["vlm/tokens"] == 3 * 510
    assert vlm("mild", "strict", "broken")(media((60,))).total == [0.3]  # the median of those that deliver
    assert vlm("mild", "broken")(media((60,))).total == [None]
    one = {"base_url": f"{server.url}/v1", "model": "mild", "key_env": None, "input_usd_per_mtok": 1.0}
    poor = vlm(models={"one": one}, budget_usd=1e-3, image_tokens=1000)  # pictures count before the reply tells
    assert poor(media((70,), frames=3)).total == [None]
