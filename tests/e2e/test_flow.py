"""`longrl flow` on a twin: it learns, resumes bit for bit, reports, and what it exports is what it evaluated."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from longrl.checkpoint import Checkpoints
from longrl.config import ModelConfig
from longrl.config_files import load_config
from longrl.export import export_command
from longrl.flow_config import FlowConfig
from longrl.flow_training import FlowTraining
from longrl.models.media import load_media_family
from longrl.parallel import tensor_files
from longrl.report.media import write_media_report
from longrl.report.metrics import read_metrics
from longrl.stopping import Stopped
from longrl.train_flow import train_flow

QUICK = (
    "steps=2",
    "warm_up_steps=0",
    "sampling.steps=4",
    "flow.group_size=2",
    "held_out.steps=3",
    "held_out.samples=2",
    "runtime.tensorboard=false",
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "colours.txt"
    path.write_text("a red picture\na green picture\na blue picture\n")
    return path


def config(root, prompts, run_dir, *changes, twin="sd3") -> FlowConfig:
    given = [f"run_dir={run_dir}", f"prompts.train={prompts}", f"model.path=tiny:{twin}", "prompts_per_step=3"]
    given += [*QUICK, *changes]
    loaded = load_config([root / "configs" / "tiny" / f"{twin}.yaml"], given)
    assert isinstance(loaded, FlowConfig)
    return loaded


@pytest.fixture(scope="module")
def learned(root, prompts, tmp_path_factory):
    """A short run that learns: the sample of `make flow-seeds` that the tests have time for."""
    run_dir = tmp_path_factory.mktemp("flow") / "run"
    changes = ("steps=12", "warm_up_steps=120", "flow.group_size=12", "held_out.samples=12", "held_out.steps=6")
    train_flow(config(root, prompts, run_dir, *changes, "sampling.steps=5", "optim.lr=4e-3"))
    return run_dir


def test_it_learns_what_the_prompt_asks_for(learned):
    summary = json.loads((learned / "summary.json").read_text())
    assert summary["pairs"] == 36
    assert summary["gain"] > 3 * summary["gain_standard_error"] > 0
    assert summary["swapped_gain"] < 2 * summary["swapped_gain_standard_error"]
    records = read_metrics(learned / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert max(record["sampling/logprob_diff"] for record in records) < 1e-5
    assert records[-1]["reward/mean"] > records[0]["reward/mean"]


def test_the_shipped_twin_of_wan_is_the_recipes(root):
    shipped, twin = (
        load_media_family(ModelConfig(path=path)).pipe for path in (str(root / "assets/wan_twin"), "tiny:wan")
    )
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (shipped, twin))
        assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    assert torch.equal(shipped.text_encoder.shared.weight, twin.text_encoder.shared.weight)  # which is not warmed up
    loaded = load_config([root / "configs/tiny/wan.yaml"], [])
    assert isinstance(loaded, FlowConfig)
    assert root / loaded.model.path == root / "assets/wan_twin"


def test_a_run_that_has_not_ended_has_a_report_too(learned, tmp_path):
    shutil.copytree(learned, tmp_path / "run")
    for name in ("summary.json", "report.html", "held_out/after.json"):
        (tmp_path / "run" / name).unlink()
    page = write_media_report(tmp_path / "run").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "before training, which has not ended" in page
    assert "<figcaption>Reward</figcaption>" in page
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_report_shows_samples_before_and_after(learned):
    page = (learned / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 6
    assert "a green picture" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for stage in ("before", "after"):
        content = json.loads((learned / "held_out" / f"{stage}.json").read_text())
        assert [len(one["rewards"]) for one in content["prompts"]] == [12, 12, 12]
        assert len(list((learned / "held_out" / stage).glob("*.png"))) == 3


def test_text_is_encoded_once(learned):
    assert len(list((learned / "text_embeds").glob("*.safetensors"))) == 3 + 1  # and the negative prompt


def test_an_export_is_a_pipeline_that_makes_what_was_evaluated(learned, tmp_path, capsys):
    from diffusers import StableDiffusion3Pipeline

    export_command(learned, None, tmp_path / "out")
    whole = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    adapted = StableDiffusion3Pipeline.from_pretrained(learned / "base")
    latest = Checkpoints(learned / "checkpoints", keep=1).latest()
    assert latest is not None
    plain = _make(adapted)
    adapted.load_lora_weights(latest.model_path)
    assert torch.allclose(_make(whole), _make(adapted), atol=1e-5)
    assert (_make(whole) - plain).abs().max() > 0.01


def _make(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red picture", negative_prompt="", height=16, width=16, num_inference_steps=3, guidance_scale=2.0,
        max_sequence_length=24, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize("changes", [("flow.ema_decay=0.9",), ("flow.preset=diffusion_nft", "sampling.guidance=1")])
def test_resuming_changes_nothing(changes, root, prompts, tmp_path, monkeypatch):
    at_once = config(root, prompts, tmp_path / "once", "steps=3", "checkpoint.every_steps=1", *changes)
    train_flow(at_once)
    broken = config(root, prompts, tmp_path / "twice", "steps=3", "checkpoint.every_steps=1", *changes)

    def stop(self, step):
        if step == 2:
            raise KeyboardInterrupt

    follow = FlowTraining.follow
    monkeypatch.setattr(FlowTraining, "follow", lambda self, step: (stop(self, step), follow(self, step)))
    with pytest.raises(KeyboardInterrupt):
        train_flow(broken)
    monkeypatch.setattr(FlowTraining, "follow", follow)
    train_flow(broken)
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("twice", "once"))
    kept = ("step", "loss", "reward/mean", "grad_norm", "lr")
    assert [[r[name] for name in kept] for r in ours] == [[r[name] for name in kept] for r in theirs]
    path = "checkpoints/step_000003/model/pytorch_lora_weights.safetensors"
    ours, theirs = (load_file(tmp_path / name / path) for name in ("twice", "once"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = tensor_files.read(tmp_path / "twice" / "checkpoints" / "step_000003" / "trainer" / "weights")
    which = {"average" if "flow.ema_decay=0.9" in changes else "weight"}  # what is evaluated, for others to load
    equal = []
    for name, x in theirs.items():
        lora = name.removeprefix("transformer.").replace(".weight", ".default.weight")
        equal.append({copy for copy in ("average", "weight") if torch.equal(kept.get(f"{copy}.{lora}", x + 1), x)})
    assert all(which <= copies for copies in equal)  # both, where a weight had no gradient
    assert which in equal
    assert (tmp_path / "twice" / "held_out" / "after.json").read_text() == (
        tmp_path / "once" / "held_out" / "after.json"
    ).read_text()


@pytest.mark.parametrize("preset", ["flow_grpo_fast", "mix_grpo", "dance_grpo"])
def test_every_preset_runs_on_videos_too(preset, root, prompts, tmp_path):
    changes = (f"flow.preset={preset}", "sampling.steps=6", "steps=1", "flow.updates_per_batch=2")
    train_flow(config(root, prompts, tmp_path / "run", *changes, twin="wan"))
    [record] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["sampling/logprob_diff"] < 1e-5
    assert record["grad_norm"] > 0
    assert (tmp_path / "run" / "report.html").read_text().count("data:video/mp4;base64,") == 6


@pytest.mark.parametrize("twin", ["sd3", "wan"])
def test_all_weights_learn_against_a_reference(twin, root, prompts, tmp_path, capsys):
    changes = ("model.lora=null", "flow.kl_coef=0.1", "optim.lr=1e-3", "gradient_checkpointing=true")
    folder = train_flow(config(root, prompts, tmp_path / "run", *changes, twin=twin))
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["kl"] == 0
    assert second["kl"] > 0
    export_command(tmp_path / "run", None, tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == {"sd3": "StableDiffusion3Pipeline", "wan": "WanPipeline"}[twin]
    trained = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x, trained[name]) for name, x in pipe.transformer.state_dict().items())
    assert not torch.equal(
        *(p.transformer.proj_out.weight for p in (pipe, load_media_family(ModelConfig(path=f"tiny:{twin}")).pipe))
    )


def test_a_run_that_is_asked_to_stop_is_saved_and_goes_on(root, prompts, tmp_path):
    asked = config(root, prompts, tmp_path / "run")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(Stopped, match="stopped after step 1 of 2 and saved"):
        train_flow(asked)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    train_flow(asked)
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_what_cannot_be_run_is_said_before_anything_is_written(root, prompts, tmp_path):
    long, silent = tmp_path / "long.txt", tmp_path / "silent.txt"
    long.write_text("a red picture\n" + "very " * 20 + "red\n")
    silent.write_text("\n \n")
    for changes, words in (
        (("media.height=18",), "media.height is 18, expected a multiple of 4"),
        (("media.frames=5",), "media.frames is 5, but the model makes images"),
        (("model.path=tiny:flux",), "model.path tiny:flux: no such twin; known: tiny:sd3, tiny:wan"),
        (("model.path=nowhere",), "model.path nowhere: not a diffusers folder"),
        (("rewards={hue: 1.0}",), "unknown reward 'hue'"),
        (("prompts.train=nowhere.txt",), "nowhere.txt: No such file or directory"),
        ((f"prompts.train={silent}",), "silent.txt: no prompts; expected one a line"),
        (
            (f"prompts.train={long}",),
            "prompt 2 ('very very very very very very very very '...) has 85 tokens, tokenizer ",
        ),
        ((f"prompts.negative={'ugly ' * 20}",), "prompts.negative has 82 tokens, tokenizer takes 32; shorten it, or"),
        (  # guidance does not read it, but the twin's warm-up does
            (f"prompts.negative={'ugly ' * 20}", "sampling.guidance=1", "warm_up_steps=1"),
            "prompts.negative has 82 tokens, tokenizer takes 32; shorten it, or",
        ),
        (("rewards={ocr: 1.0}",), "reward ocr: prompt 1 has no text in double quotes"),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            train_flow(config(root, prompts, tmp_path / "run", *changes))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("too_long", "count"), [("skip", 3), ("cut", 4)])
def test_all_that_is_too_long_is_counted_and_named(too_long, count, root, prompts, tmp_path, caplog):
    """Of training, of evaluation, and the negative prompt, which cannot be skipped."""
    train, shown = tmp_path / "train.txt", tmp_path / "shown.txt"
    train.write_text(prompts.read_text() + "very " * 20 + "red\n")
    shown.write_text("very " * 20 + "red\na red picture\n" + "very " * 20 + "blue\n")
    changes = [f"prompts.train={train}", f"prompts.eval={shown}", f"prompts.too_long={too_long}", "steps=1"]
    changes += [f"prompts.negative={'ugly ' * 20}"] if too_long == "cut" else []
    train_flow(config(root, prompts, tmp_path / "run", *changes))
    [record] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert record["data/too_long"] == count
    how = {"skip": "skipped", "cut": "cut there"}[too_long]
    for where in (f"{train}: prompt 4", f"{shown}: prompt 1", f"{shown}: prompt 3"):
        assert re.search(rf"{where} \(.* has \d+ tokens, tokenizer takes 32: {how}", caplog.text)
    assert ("prompts.negative has 82 tokens, tokenizer takes 32: cut there" in caplog.text) == (too_long == "cut")
    made = json.loads((tmp_path / "run" / "held_out" / "after.json").read_text())["prompts"]
    assert [one["id"] for one in made] == (["2"] if too_long == "skip" else ["1", "2", "3"])
