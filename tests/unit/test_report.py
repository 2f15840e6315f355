"""The report: a realistic run directory is made here, rendered, and taken apart; then files go missing."""

import html.parser
import json
import math
import random
import re
from pathlib import Path

import pytest

from longrl.data.synthetic.gallery import gallery
from longrl.data.synthetic.questions import Question, ask, response
from longrl.data.synthetic.render import render
from longrl.data.synthetic.world import make_story
from longrl.report.headline import standard_error
from longrl.report.html import _guess, write_report
from longrl.report.plots import Series, area_chart, bar_chart, line_chart, moving_mean

STAGE_ACCURACY = {"base": 0.27, "sft": 0.61, "rl": 0.86}


@pytest.mark.parametrize(
    ("options", "kinds", "chance"),
    [
        ((4, 4), "choice", 0.25),
        ((2,), "choice", 0.5),
        ((4, 2), "choice", None),
        ((0,), "choice", None),
        ((4,), "open", None),
    ],
)
def test_a_guess_is_drawn_where_all_have_as_many_options(options, kinds, chance):
    asked = [
        {"kind": kinds, "question": "Is it A. or B.?" + "".join(f"\n{x}. it" for x in "ABCD"[:n])} for n in options
    ]
    assert _guess(asked) == chance


def make_run(run_dir: Path, seconds: float, num_videos: int = 2, rl_steps: int = 60) -> Path:
    """Everything a quickstart run leaves, with invented numbers, real videos and real questions about them."""
    chance = random.Random(0)
    videos = []
    questions: list[tuple[str, Path, Question]] = []
    for seed in range(num_videos):
        story = make_story(seed, seconds)
        videos.append(run_dir / "data" / "videos" / f"test-{seed:03d}.mp4")
        videos[-1].parent.mkdir(parents=True, exist_ok=True)
        render(story, videos[-1], fps=2, width=160, height=120)
        questions += [
            (f"test-{seed:03d}-{i:02d}", videos[-1], question) for i, question in enumerate(ask(story, seed, 8))
        ]
    gallery(videos, run_dir / "gallery.png")
    for stage, accuracy in STAGE_ACCURACY.items():
        write_json(run_dir / "eval" / f"{stage}.json", evaluation(stage, accuracy, questions, run_dir, chance))
    write_lines(run_dir / "sft" / "metrics.jsonl", (sft_line(step, chance) for step in range(1, 121)))
    write_lines(run_dir / "rl" / "metrics.jsonl", (rl_line(step, rl_steps, chance) for step in range(1, rl_steps + 1)))
    write_json(run_dir / "summary.json", summary(seconds, rl_steps))
    (run_dir / "config.yaml").write_text("kind: quickstart\nrl:\n  algo:\n    loss: clip\n    kl: 'off'\n")
    return run_dir


def summary(seconds: float, rl_steps: int) -> dict:
    return {
        "video_seconds_max": seconds * 1.041,
        "frames_per_video": int(seconds),
        "prompt_tokens": int(seconds) // 2 + 61,
        **{f"accuracy_{stage}": accuracy for stage, accuracy in STAGE_ACCURACY.items()},
        "rl_steps": rl_steps,
        "cache_hit_rate": 0.983,
        "wall_s": {
            "videos": 31.2,
            "embed": 12.9,
            "sft": 74.0,
            "rl": 148.3,
            "eval": 41.1,
            "report": 3.4,
            "total": 317.0,
        },
        "peak_rss_bytes": 1_910_000_000,
        "logprob_diff_max": 3.1e-6,
        "controls": {
            "rl_without_video": 0.291,
            "rl_order": 0.889,
            "rl_order_frames_shuffled": 0.402,
            "sft_forced_careful": 0.715,
        },
        "seed": 0,
    }


def evaluation(stage: str, accuracy: float, questions: list, run_dir: Path, chance: random.Random) -> dict:
    def part(**counts: int) -> dict:
        return {
            name: {"accuracy": min(max(accuracy + chance.uniform(-0.05, 0.05), 0), 1), "num_questions": num}
            for name, num in counts.items()
        }

    return {
        "stage": stage,
        "accuracy": accuracy,
        "num_questions": 240,
        "samples_per_question": 4,
        "mean_response_tokens": 30.0 if stage == "rl" else 17.5,
        "by_category": part(order=60, spatial=60, counting=60, plot=60),
        "by_kind": part(choice=200, open=40),
        "examples": [
            {
                "id": id_,
                "category": question.category,
                "kind": question.kind,
                "video": str(video.relative_to(run_dir)),
                "question": "\n".join([question.text, *(f"{'ABCD'[i]}. {x}" for i, x in enumerate(question.options))]),
                "answer": question.answer,
                "responses": [answered(stage, accuracy, question, chance) for _ in range(4)],
            }
            for id_, video, question in questions
        ],
    }


def answered(stage: str, accuracy: float, question: Question, chance: random.Random) -> dict:
    if stage == "base":
        return {"text": "red blue <answer> the the <script>alert(1)</script>", "reward": 0.0, "correct": False}
    if chance.random() < accuracy:
        return {"text": response(question.careful, question.answer), "reward": 1.0, "correct": True}
    correct = question.hasty_answer == question.answer
    text = response(question.hasty, question.hasty_answer)
    return {"text": text, "reward": 1.0 if correct else 0.1, "correct": correct}


def sft_line(step: int, chance: random.Random) -> dict:
    loss = 2.4 * math.exp(-step / 30) + 0.35 + chance.gauss(0, 0.03)
    seconds = chance.uniform(0.5, 0.7)
    times = {"time/forward": seconds * 0.45, "time/backward": seconds * 0.5}
    return {"step": step, "wall_s": seconds, "loss": loss, "grad_norm": 1 + loss, "lr": 1e-3, **times}


def rl_line(step: int, num_steps: int, chance: random.Random) -> dict:
    done = step / num_steps
    accuracy = 0.6 + 0.27 * (1 - math.exp(-4 * done)) + chance.gauss(0, 0.05)
    parts = {"prefill": chance.uniform(0.5, 0.6), "decode": 0.5 + 0.4 * done + chance.uniform(0, 0.1), "update": 0.9}
    return {
        "step": step,
        "wall_s": sum(parts.values()) + 0.12,
        "loss": chance.gauss(0, 0.02),
        "reward/mean": 0.1 + 0.9 * accuracy,
        "reward/format": min(0.97 + 0.03 * done, 1),
        "reward/answer": accuracy,
        "response/tokens": 17 + 13 * (1 - math.exp(-5 * done)) + chance.gauss(0, 0.6),
        "grad_norm": 0.4 + chance.random() * 0.3,
        "lr": 3e-4 * (1 - 0.9 * done),
        "entropy": 0.6 - 0.35 * done + chance.gauss(0, 0.01) if step != 7 else None,
        "sampling/logprob_diff": 10 ** chance.uniform(-6.6, -5.6),
        "clip/high": 0.0,
        **{f"time/{name}": seconds for name, seconds in parts.items()},
    }


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("quickstart"), seconds=240)


@pytest.fixture(scope="module")
def page(run_dir) -> str:
    return write_report(run_dir).read_text()


class Elements(html.parser.HTMLParser):
    """Collects every attribute, and checks that elements close in order."""

    VOID = frozenset(("meta", "img", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_well_formed_and_self_contained(page):
    elements = Elements(page)
    assert elements.open == []
    assert not {"script", "link", "iframe", "object"} & set(elements.tags)
    for tag, name, value in elements.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}> leaves the page"
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_small_enough_for_a_mail(page):
    assert len(page) < 3_000_000


def test_numbers_stand_beside_their_bounds(page):
    text = re.sub(r"<[^>]+>", " ", page)
    text = re.sub(r"\s+", " ", text)
    for expected in (
        "86.0% &plusmn; 2.5",  # sqrt(0.86 * 0.14 / 200)
        "61.0% &plusmn; 3.4",
        "order questions 0.402 at most 0.689 = 0.889 - 0.2 holds",
        "Gain of RL over SFT 0.250 at least 0.150 holds",
        "without the video 0.291 at most 0.350 holds",
        "log-prob difference, engine to trainer 3.1e-06 at most 1.0e-05 holds",
        "SFT model, made to answer in its careful format 0.715 for comparison",
        "Peak memory, GB 1.91 at most 4.00 holds",
        "embeddings there beforehand 98%",
        "longest video 4:10",
    ):
        assert expected in text


def test_a_bound_that_does_not_hold_is_said(run_dir, tmp_path):
    content = json.loads((run_dir / "summary.json").read_text())
    content["controls"]["rl_without_video"] = 0.5
    write_json(tmp_path / "summary.json", content)
    text = re.sub(r"<[^>]+>", " ", write_report(tmp_path).read_text())
    assert re.search(r"without the video\s+0\.500\s+at most 0\.350\s+does not hold", text)


def test_samples_show_frames_and_both_stages(page):
    assert page.count('<article class="sample">') >= 4  # one for each category, perhaps a failure
    assert page.count('alt="frame at ') == 8 * page.count('<article class="sample">')
    assert page.count("<h3>after RL</h3>") == page.count('<article class="sample">')
    assert 'alt="frame at 0:15"' in page  # the middle of the first of 8 parts of 240 s


def test_responses_cannot_inject_markup(run_dir, tmp_path):
    content = json.loads((run_dir / "eval" / "rl.json").read_text())
    evil = '<img src=x onerror="alert(1)">'
    content["examples"] = content["examples"][:1]
    content["examples"][0] |= {"id": evil, "question": evil, "answer": evil, "video": evil}
    content["examples"][0]["responses"] = [
        {"text": evil, "reward": None, "correct": False},
        {"text": f"<think>{evil}</think><answer>{evil}</answer>", "reward": 1.0, "correct": True},
    ]
    write_json(tmp_path / "eval" / "rl.json", content)
    page = write_report(tmp_path).read_text()
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") >= 5
    assert "not scored" in page


FILES = (
    "summary.json",
    "gallery.png",
    "config.yaml",
    "sft/metrics.jsonl",
    "rl/metrics.jsonl",
    "eval/sft.json",
    "eval/rl.json",
)


def test_an_empty_run_still_gives_a_page(tmp_path):
    page = write_report(tmp_path).read_text()
    Elements(page)
    for name in FILES:
        assert re.search(f"<code>{name}</code> is missing", page), name


@pytest.mark.parametrize("name", ["summary.json", "eval/sft.json", "eval/rl.json", "rl/metrics.jsonl"])
def test_a_broken_file_is_named(tmp_path, run_dir, name):
    for other in FILES:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes((run_dir / other).read_bytes())
    (tmp_path / name).write_bytes(b'{"step": 1, \xff')
    page = write_report(tmp_path).read_text()
    Elements(page)
    assert f"<code>{name}</code> " in page


def test_a_missing_video_is_named_and_the_rest_stands(tmp_path, run_dir):
    write_json(tmp_path / "eval" / "rl.json", json.loads((run_dir / "eval" / "rl.json").read_text()))
    page = write_report(tmp_path).read_text()
    assert "No frames:" in page
    assert "test-000.mp4" in page
    assert page.count('class="thought"') > 4


def test_a_question_without_a_video(tmp_path, run_dir):
    content = json.loads((run_dir / "eval" / "rl.json").read_text())
    content["examples"] = [content["examples"][0] | {"video": None}]
    write_json(tmp_path / "eval" / "rl.json", content)
    assert "A question without a video." in write_report(tmp_path).read_text()


def test_the_same_run_gives_the_same_bytes(run_dir, page):
    assert write_report(run_dir).read_text() == page


def test_thousands_of_steps_stay_small(tmp_path):
    chance = random.Random(1)
    write_lines(tmp_path / "rl" / "metrics.jsonl", (rl_line(step, 5000, chance) for step in range(1, 5001)))
    assert len(write_report(tmp_path).read_text()) < 600_000


def test_charts_use_the_page_colours():
    one = Series(label="a", colour="rl", ys=[0.1, math.nan, 0.9], errors=[0.05, 0, 0.02])
    for svg in (
        line_chart([1, 2, 3], [one], "A & B", bound=0.5),
        bar_chart(["x", "y", "z"], [one], "A & B", chance=[0.25, None, 0.25]),
        area_chart([1, 2, 3], [Series(label="a", colour="rl", ys=[1, 2, 3])], "A & B"),
    ):
        assert svg.startswith('<svg viewBox="0 0 ')
        assert 'aria-label="A &amp; B"' in svg
        assert "var(--rl)" in svg
        assert "#fe00" not in svg  # every stand-in was replaced
        assert "font-family" not in svg
    assert ">10</text>" in bar_chart(["x"], [Series(label="a", colour="rl", ys=[0.1], errors=[0])], "")


def test_moving_mean():
    assert moving_mean([1, 2, 3, 7], 3) == [1.5, 2, 4, 5]
    assert moving_mean([1, 2, 3, 7], 1) == [1, 2, 3, 7]
    assert moving_mean([1, math.nan, 3], 3) == [1, 2, 3]


def test_standard_error_by_hand():
    assert standard_error(0.5, 100) == 0.05
    assert standard_error(1.0, 10) == 0.0


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_a_training_run_has_a_report(tmp_path, longrl, kind):
    chance, line = (
        random.Random(1),
        {"rl": lambda step: rl_line(step, 40, chance), "sft": lambda step: sft_line(step, chance)},
    )
    run_dir = tmp_path / "lectures"
    write_lines(run_dir / "metrics.jsonl", (line[kind](step) for step in range(1, 41)))
    (run_dir / "config.yaml").write_text(
        f"kind: {kind}\nsteps: 200\nmodel: {{path: '<m>'}}\ndata: {{train: a.jsonl}}\n"
    )
    done = longrl("report", run_dir)
    assert (done.returncode, done.stdout) == (0, f"{run_dir}/report.html\n")
    page = (run_dir / "report.html").read_text()
    assert Elements(page).open == []
    assert "<h1>lectures</h1>" in page
    assert "<dd>40 of 200</dd>" in page
    assert "<code>&lt;m&gt;</code>" in page
    assert f"{kind.upper()} step: " in page
    assert ("Response length, tokens" in page) == (kind == "rl")
    assert "Nothing to show" not in page
    assert "Accuracy on held-out videos" not in page


def test_a_training_run_before_its_first_step(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: rl\nsteps: 3\n")
    page = write_report(tmp_path).read_text()
    assert "<dd>0 of 3</dd>" in page
    assert "Nothing to show: <code>metrics.jsonl</code> is missing" in page


def test_no_report_of_other_folders(tmp_path, longrl):
    assert "no run directory (no config.yaml)" in longrl("report", tmp_path).stderr
    for kind, why in (("eval", "a run of kind 'eval' has no such report"), ("flow", "no samples yet")):
        (tmp_path / "config.yaml").write_text(f"kind: {kind}\n")
        done = longrl("report", tmp_path)
        assert (done.returncode, why in done.stderr) == (2, True)
