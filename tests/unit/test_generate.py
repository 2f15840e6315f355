"""`longrl generate` on a real video and a saved tiny model."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from media import render
from PIL import Image

import longrl as longrl_package
from longrl.cli import app
from longrl.errors import run_guarded
from longrl.models.qwen_vl import Qwen25VL
from longrl.video import decode
from tests.parity.test_shared_prefix import sequence_logprobs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    """A ten-second video and a model folder."""
    folder = tmp_path_factory.mktemp("generate")
    Qwen25VL.tiny(0, torch.float32).save(folder / "model")
    return render(folder / "clip.mp4", [i / 5 for i in range(50)]), folder / "model"


@pytest.fixture
def generate(world, capfd):
    """Runs the command as `longrl` does, but in this process: status, output, errors."""
    video, model = world
    cache = model.parent / "cache"
    before = signal.getsignal(signal.SIGTERM)

    def run(
        *options: object, command: str = "generate", video: object = video, model: object = model
    ) -> tuple[int, str, str]:
        given = ["--prompt", "what?", "--model", model, *([] if video is None else ["--video", video]), *options]
        given += ["--cache", cache]
        status = run_guarded(lambda: app([*map(str, [command, *given])], prog_name="longrl"), False)
        return status, *capfd.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


def test_default_arguments(longrl, world):
    video, model = world
    done = longrl("generate", "--prompt", "what?", "--model", model, "--video", video, "--max-new-tokens", 8)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")


def test_several_answers_as_json(generate):
    status, out, err = generate("--n", 3, "--json", "--max-new-tokens", 8)
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert [set(one) for one in said["responses"]] == [{"text", "thought", "answer", "finish_reason"}] * 3
    assert {one["finish_reason"] for one in said["responses"]} <= {"stop", "length"}
    assert len({one["text"] for one in said["responses"]}) == 3
    _, text, _ = generate("--n", 3, "--max-new-tokens", 8)
    assert text == "".join(one["text"] + "\n" for one in said["responses"])


def test_a_seed_decides_and_temperature_zero_ignores_it(generate):
    def texts(*options: object) -> str:
        return generate("--max-new-tokens", 12, *options)[1]

    assert texts("--seed", 1) == texts("--seed", 1) != texts("--seed", 2)
    assert texts("--temperature", 0, "--seed", 1) == texts("--temperature", 0, "--seed", 2)
    assert texts("--temperature", 0, "--n", 3) == 3 * texts("--temperature", 0)


def test_top_k_and_top_p_narrow_the_draw(generate):
    """From one token it is the likeliest, whatever the seed; from all the seed decides."""

    def texts(*options: object) -> str:
        return generate("--max-new-tokens", 12, *options)[1]

    likeliest = texts("--temperature", 0)
    assert texts("--top-k", 1) == texts("--top-p", 1e-6, "--seed", 7) == likeliest
    assert texts("--top-k", 4000, "--top-p", 1) == texts() != likeliest
    status, out, err = generate("--top-p", 0)
    assert (status, out) == (2, "")
    assert "--top-p is 0, expected more than 0" in err


def test_the_span_and_sampling_decide_what_is_seen(generate):
    """One token for every two frames of 28 x 28 pixels."""

    def tokens(*options: object, **changes: object) -> int:
        return json.loads(generate("--json", "--max-new-tokens", 1, *options, **changes)[1])["prompt_tokens"]

    text = tokens(video=None)
    bare = tokens() - 5  # ten frames, at one a second
    assert bare == text + 2  # and what encloses a video
    assert tokens("--fps", 2) == bare + 10
    assert tokens("--num-frames", 7) == bare + 4
    assert tokens("--start", 2, "--end", "0:06") == bare + 2


@pytest.mark.parametrize(
    ("options", "changes", "line"),
    [
        ([], {"video": "gone.mp4"}, "gone.mp4: no such file"),
        ([], {"video": __file__}, "test_generate.py"),
        ([], {"model": "gone"}, "model.path: gone is not a Hugging Face folder"),
        ([], {"model": "tiny:gone"}, "no model family 'gone'; known: qwen2, qwen3, "),
        (["--dtype", "fp16"], {}, "longrl.load: dtype: got \"fp16\", expected 'float32', 'bfloat16' or 'float64'"),
        (["--start", 5, "--end", 2], {}, "the span 5.0 s to 2.0 s is empty"),
        (["--start", 50], {}, "is not within the video"),
        (["--start", "soon"], {}, "--start: got 'soon'"),
        (["--fps", 1, "--num-frames", 3], {}, "exactly one of fps (got 1.0) and num_frames (got 3)"),
        (["--num-frames", 9000], {}, "num_frames must be 1 to 8192"),
        (["--fps", 1], {"video": None}, "give --video too"),
        (["--max-pixels", 0], {}, "clip.mp4: max_pixels must be a whole number, 1 or more, got 0"),
        (["--max-pixels", 1000], {"video": None}, "give --video or --image too"),
        (["--start", 1], {"video": None}, "give --video or --audio too"),
        (["--image", "gone.png"], {}, "gone.png: cannot read the image: No such file"),
        (["--image", __file__], {}, "not an image that can be read"),
        (["--with-audio"], {}, "clip.mp4: has no audio track"),
        (["--with-audio"], {"video": None}, "--with-audio means a video's own sound"),
        (["--stream", "--n", 2], {}, "--stream shows one response"),
        (["--image", "gone.png"], {"video": None, "model": "tiny:qwen2"}, "gone.png"),
    ],
)
def test_an_error_is_one_line(generate, options, changes, line):
    status, out, err = generate(*options, **changes)
    assert (status, out) == (2, "")
    assert err.startswith("longrl: error: ")
    assert err.count("\n") == 1
    assert line in err


def test_wrong_arguments_are_one_line(world):
    with pytest.raises(ValueError, match=r"^longrl\.load: unknown key 'precision'[^\n]*$"):
        longrl_package.load(str(world[1]), precision="float32")
    model = longrl_package.load("tiny:qwen2")
    with pytest.raises(ValueError, match=r"^generate_contents: unknown key 'max_tokens'[^\n]*max_new_tokens[^\n]*$"):
        model.generate_content("what?", max_tokens=3)
    for parts, shown in ((["what?", 3], "3"), ({"text": "what?"}, "{'text'"), (["x", None], "None")):
        with pytest.raises(ValueError, match=rf"^parts: got {shown}.*, expected text, Video, Image or Audio"):
            model.generate_content(parts)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=rf"^parts: the text {str(world[0])!r} is the name of a file; .*Video\("):
        model.generate_content([str(world[0]), "what?"])
    with pytest.raises(ValueError, match="response: got 5, expected the text"):
        model.score("what?", 5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"gone\.png: cannot read the file: No such file"):
        longrl_package.load(world[1]).generate_content(["what?", longrl_package.Image(Path("gone.png"))])
    with pytest.raises(ValueError, match=r"^generate_contents: group_size: got 0, expected greater[^\n]*$"):
        model.generate_contents("what?", n=0)


def test_an_empty_question(capfd, world):
    assert run_guarded(lambda: app(["generate", "--prompt", " ", "--model", str(world[1])]), False) == 2
    assert capfd.readouterr().err == "longrl: error: the prompt is empty; write the question\n"


# ---- images, text, several at once


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 84, 3), dtype=np.uint8)).save(path)
    return path


def test_images_and_videos_together(generate, picture):
    def tokens(*options: object, **changes: object) -> int:
        return json.loads(generate("--json", "--max-new-tokens", 1, *options, **changes)[1])["prompt_tokens"]

    image = tokens("--image", picture, video=None) - tokens(video=None)
    assert image == 4 * 3 + 2
    assert tokens("--image", picture, "--image", picture) == tokens() + 2 * image


def test_pictures_are_shown_no_larger_than_asked(generate, picture, world, tmp_path):
    """As with max_pixels in rows and in Python. The twin shows frames of videos as small as may be anyway, this one in
    2 x 3 tokens a pair."""
    larger = tmp_path / "larger"
    shutil.copytree(world[1], larger)
    about = larger / "video_preprocessor_config.json"
    size = {"shortest_edge": 784, "longest_edge": 100 * 784}
    about.write_text(json.dumps(json.loads(about.read_text()) | {"size": size}))

    def tokens(*options: object, **changes: object) -> int:
        said = generate("--json", "--max-new-tokens", 1, *options, **({"model": larger} | changes))
        return json.loads(said[1])["prompt_tokens"]

    text = tokens(video=None)
    assert tokens() == text + 2 + 5 * 6
    assert tokens("--max-pixels", 784) == text + 2 + 5
    assert tokens("--image", picture, video=None) == text + 2 + 4 * 3
    assert tokens("--image", picture, "--max-pixels", 4 * 784, video=None) == text + 2 + 2


def test_text_models_take_text_alone(generate, picture):
    assert generate("--max-new-tokens", 4, video=None, model="tiny:qwen3")[0] == 0
    status, _, err = generate("--image", picture, video=None, model="tiny:qwen3")
    assert status == 2
    assert "qwen3 takes text, not image" in err


def test_a_stream_shows_the_same_text(generate):
    whole = generate("--max-new-tokens", 24)
    assert generate("--max-new-tokens", 24, "--stream") == whole


def test_a_stream_is_whole_to_its_end():
    """Random bytes: many responses end in the middle of a character, which nothing completes."""
    model, cut = longrl_package.load("tiny:qwen2"), 0
    for seed in range(30):
        said: dict[int, str] = {}

        def hear(number: int, piece: str, said: dict[int, str] = said) -> None:
            said[number] = said.get(number, "") + piece

        replies = model.generate_contents("what?", n=3, seed=seed, max_new_tokens=6, on_text=hear)
        assert [said.get(number, "") for number in range(3)] == [reply.text for reply in replies]
        cut += sum(reply.text.endswith("\ufffd") for reply in replies)
    assert cut > 5


def test_thinking_changes_the_prompt_and_nothing_else(generate):
    plain, think = (json.loads(generate("--json", "--max-new-tokens", 1, *o)[1]) for o in ([], ["--think"]))
    assert think["prompt_tokens"] > plain["prompt_tokens"] + 20
    assert json.loads(generate("--json", "--max-new-tokens", 1, "--no-think")[1]) == plain


def test_the_thinking_prompt_is_the_original(world, tmp_path):
    """Word for word as on LongVILA-R1's model card, slips included: its model was trained with it."""
    model = longrl_package.load(world[1], cache_dir=str(tmp_path))
    prompt = model._prompt([longrl_package.Video(world[0], num_frames=2), "Who won?"], think=True)
    assert model.policy.family.tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "You are a helpful assistant. The user asks a question, and then you solves it.\n\n"
        "Please first think deeply about the question based on the given video, and then provide the final answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n\n"
        " Question: Who won?<|im_end|>\n<|im_start|>assistant\n"
    )


# ---- scores, and what a second question costs


def test_scores_are_those_of_transformers(generate, world, tmp_path):
    """Stock transformers on [prompt, response]; 1e-5 as everywhere in fp32."""
    status, out, _ = generate("--response", "the red one", "--json", command="score")
    said = json.loads(out)
    assert status == 0
    assert said["logprob"] == pytest.approx(sum(said["logprobs"]))
    assert said["token_ids"][-1] in Qwen25VL.tiny(0, torch.float32).stop_ids
    model = longrl_package.load(str(world[1]), cache_dir=str(tmp_path))
    prompt = model._prompt([longrl_package.Video(str(world[0])), "what?"], think=False)
    stock = sequence_logprobs(model.policy.family, prompt, said["token_ids"])
    assert said["logprobs"] == pytest.approx(stock.tolist(), abs=1e-5)
    lines = generate("--response", "the red one", command="score")[1].splitlines()
    assert len(lines) == len(said["token_ids"]) + 1
    assert generate("--response", "", command="score")[0] == 2


def test_times_are_seconds():
    with pytest.raises(ValueError, match=r"clip a\.mp4: start_s must be a number of seconds, got '0:10'"):
        longrl_package.Video("a.mp4", start_s="0:10")  # pyright: ignore[reportArgumentType]


def test_a_second_question_pays_for_its_own_words(world, tmp_path, monkeypatch):
    """No decoding, no encoding, no prefill of the video; the same answer as of a model that was asked nothing else."""
    video, path = world
    clip = longrl_package.Video(str(video))
    model = longrl_package.load(str(path), cache_dir=str(tmp_path))
    model.generate_content([clip, "what?"], max_new_tokens=4)
    before = model.prefilled
    monkeypatch.setattr(decode, "select_frames", None)
    monkeypatch.setattr(model.policy.family.vision, "encode_frames", None)
    answer = model.generate_content([clip, "who was there?"], max_new_tokens=8)
    score = model.score([clip, "who was there?"], answer.text)
    assert model.prefilled == before
    fresh = longrl_package.load(str(path), cache_dir=str(tmp_path))
    again = fresh.generate_content([clip, "who was there?"], max_new_tokens=8)
    assert again == answer
    assert fresh.score([clip, "who was there?"], answer.text).logprobs == pytest.approx(score.logprobs, abs=1e-5)
    assert fresh.prefilled == before
    model.generate_content("hello", max_new_tokens=1)
    assert model.prefilled > before


def test_words_before_the_video_are_shared_where_they_are_the_same(world, tmp_path):
    """And only there: what comes after other words has other keys and values."""
    model = longrl_package.load(str(world[1]), cache_dir=str(tmp_path))
    clip = longrl_package.Video(str(world[0]))

    def prefilled(*parts: str | longrl_package.Clip) -> int:
        before = model.prefilled
        model.generate_content(parts, max_new_tokens=1)
        return model.prefilled - before

    assert prefilled("look:", clip, "what?") > 5
    assert prefilled("look:", clip, "who was there?") == 0
    assert prefilled("look again:", clip, "who was there?") > 5
