"""The whole method on a laptop: long videos, cached embeddings, CoT-SFT, GRPO, held-out evaluation, a report."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from longrl.check import require_model
from longrl.config import DataConfig, QuickstartConfig, RlConfig, SftConfig, StageConfig
from longrl.data.examples import Skips, load_examples
from longrl.data.order import by_media
from longrl.data.prompts import PromptBuilder
from longrl.data.synthetic.dataset import Dataset, build_dataset
from longrl.data.synthetic.gallery import gallery
from longrl.evals.controls import shuffled_in_time, without_video
from longrl.evals.runner import Accuracy, EvalResult, evaluate
from longrl.files import write_whole
from longrl.models import load_family
from longrl.policy import Policy
from longrl.report.headline import checks
from longrl.report.html import write_report
from longrl.report.metrics import read_metrics
from longrl.rewards.compose import build_rewards
from longrl.runtime import peak_rss_bytes, rank_and_size, start_run
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from longrl.video.cache import EmbedCache
from longrl.video.cache_commands import fill
from longrl.video.probe import index_video

logger = logging.getLogger(__name__)

CAREFUL = "<think>the"
"""How every careful thought of the synthetic data begins, and no hasty one."""

OWN = ("sft", "rl", "eval", "gallery.png", "report.html", "usage.json", "summary.json")
"""What a run writes into its directory beside config.yaml; the last one says that it is complete."""


def run_quickstart(config: QuickstartConfig) -> Path:
    """Runs every stage and writes summary.json and report.html.

    A run that was interrupted is taken up where it stopped; a finished one is done again, but for the videos and the
    cache of embeddings.

    Returns:
        The report.

    Raises:
        ValueError: there is no such model, or there are several processes.
    """
    if rank_and_size()[1] > 1:
        raise ValueError("the quickstart is one process; torchrun is for longrl sft, rl and eval")
    require_model(config.model)
    rewards = build_rewards(config.rewards, config.scoring)
    run_dir = start_run(config)
    if (run_dir / "summary.json").exists():
        _start_over(run_dir)
    usage, results = Usage(run_dir / "usage.json"), dict[str, EvalResult]()
    with usage.time("videos"):
        data = build_dataset(config.videos)
        gallery([*data.videos[:2], *data.videos[-2:]], run_dir / "gallery.png")
    sft, rl = stages(config, data)
    skips = Skips(rl.data)
    with usage.time("embeddings"):
        facts = _embed_all(config, data, skips)
    held_out = load_examples(data.test, rl.data, rl.video, skips)

    def measure(stage: str, model: str | Path, **control: Any) -> None:
        with usage.time("evaluation"):
            policy = Policy(load_family(config.model.at(model), config.runtime.seed))
            results[stage] = evaluate(policy, held_out, config, skips, rewards, stage=stage, **control)
            results[stage].write(run_dir / "eval" / f"{stage}.json")
        choice = _accuracy(results[stage].by_kind, "choice")
        logger.info("%s: accuracy on choice questions %s", stage, "none" if choice is None else f"{choice:.3f}")

    measure("base", config.model.path)
    with usage.time("sft"):
        sft_model = train_sft(sft)
    measure("sft", sft_model)
    measure("sft_careful", sft_model, forced=CAREFUL)
    with usage.time("rl"):
        rl_model = train_rl(rl.model_copy(update={"model": rl.model.at(sft_model)}))
    measure("rl", rl_model)
    measure("rl_no_video", rl_model, change=without_video)
    measure("rl_shuffled", rl_model, change=shuffled_in_time)

    steps = read_metrics(run_dir / "rl" / "metrics.jsonl")
    summary = facts | _summary(results, steps) | usage.so_far() | {"seed": config.runtime.seed}
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    report = write_report(run_dir)
    _show(summary, report)
    return report


def _start_over(run_dir: Path) -> None:
    for path in (run_dir / name for name in OWN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Usage:
    """Seconds by part and the largest memory, added up over the processes that a run took: kept in a file.

    Of a process that was killed, the part that it was in is not counted.
    """

    def __init__(self, path: Path) -> None:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.path, self.began = path, time.perf_counter()
        self.peak: int = before.get("peak_rss_bytes", 0)
        self.parts: dict[str, float] = before.get("wall_s", {})
        self.total_before = self.parts.pop("total", 0.0)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - began
            write_whole(self.path, json.dumps(self.so_far()))

    def so_far(self) -> dict[str, Any]:
        total = self.total_before + time.perf_counter() - self.began
        return {"wall_s": {"total": total, **self.parts}, "peak_rss_bytes": max(self.peak, peak_rss_bytes())}


def stages(config: QuickstartConfig, data: Dataset) -> tuple[SftConfig, RlConfig]:
    """The configurations of the two training runs."""

    def common(name: str, stage: StageConfig, train: Path) -> dict[str, Any]:
        return {
            "run_dir": str(Path(config.run_dir) / name),
            "data": {"train": str(train), "eval": str(data.test), "share_media": stage.share_media},
            **config.model_dump(include={"model", "video", "cache", "runtime"}),
            **stage.model_dump(exclude={"share_media"}),
        }

    sampling = config.model_dump(include={"rollout", "rewards", "scoring", "eval"})
    return (
        SftConfig.model_validate(common("sft", config.sft, data.train_sft)),
        RlConfig.model_validate({**common("rl", config.rl, data.train_rl), **sampling}),
    )


def _embed_all(config: QuickstartConfig, data: Dataset, skips: Skips) -> dict[str, Any]:
    """Embeds every clip once; returns the share found in the cache, and the largest video and prompt."""
    examples = [
        example
        for path in (data.train_sft, data.train_rl, data.test)
        for example in load_examples(path, DataConfig(), config.video, skips)
    ]
    family = load_family(config.model, config.runtime.seed)
    cache = EmbedCache(config.cache.dir, int(config.cache.max_gib * 2**30))
    fill((clip for example in examples for clip in example.clips), family, cache, skips)
    build, frames, tokens = PromptBuilder(family, config.cache, skips), [0], [0]
    for members in by_media(examples):
        _, prompts = build([examples[i] for i in members])
        tokens += map(len, prompts)
        frames += (len(media.timestamps_s) for prompt in prompts for media in prompt.media)
    return {
        "video_seconds_max": max(index_video(str(path)).duration_s for path in data.videos),
        "frames_per_video": max(frames),
        "prompt_tokens": max(tokens),
        "cache_hit_rate": cache.hit_rate,
    }


def _accuracy(of: Mapping[str, Accuracy], name: str) -> float | None:
    """None: no such question was asked."""
    return of[name].accuracy if name in of else None


def _summary(results: Mapping[str, EvalResult], steps: list[dict[str, Any]]) -> dict[str, Any]:
    choice = {stage: _accuracy(result.by_kind, "choice") for stage, result in results.items()}
    order = {stage: _accuracy(result.by_category, "order") for stage, result in results.items()}
    compared = [step["sampling/logprob_diff"] for step in steps if step["sampling/logprob_diff"] is not None]
    by_kind = results["rl"].by_kind
    return {
        "questions": by_kind["choice"].num_questions if "choice" in by_kind else 0,
        "questions_total": results["rl"].overall.num_questions,
        "accuracy_base": choice["base"],
        "accuracy_sft": choice["sft"],
        "accuracy_rl": choice["rl"],
        "rl_steps": len(steps),
        "logprob_diff_max": max(compared, default=None),
        "controls": {
            "rl_without_video": choice["rl_no_video"],
            "rl_order": order["rl"],
            "rl_order_frames_shuffled": order["rl_shuffled"],
            "sft_forced_careful": choice["sft_careful"],
        },
    }


def _show(summary: dict[str, Any], report: Path) -> None:
    """Prints what was measured beside what is promised."""
    found = checks(summary)
    wide = max(len(check.what) for check in found)
    typer.echo(f"{'':{wide}}{'measured':>9}")
    for check in found:
        verdict = {True: "held", False: "NOT HELD", None: ""}[check.holds]
        typer.echo(f"{check.what:<{wide}}{check.value:>9}  {check.bound:<32}{verdict}".rstrip())
    typer.echo(f"report: {report}")
