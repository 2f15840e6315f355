"""The whole method on a laptop: long videos, cached embeddings, CoT-SFT, GRPO, held-out evaluation, a report."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longrl.config import QuickstartConfig, RunConfig
from longrl.data.examples import load_examples
from longrl.data.prompts import PromptBuilder
from longrl.data.synthetic.dataset import Dataset, build_dataset
from longrl.data.synthetic.gallery import gallery
from longrl.evals.controls import shuffled_in_time, without_video
from longrl.evals.runner import EvalResult, evaluate
from longrl.models import load_family
from longrl.policy import Policy
from longrl.report.html import write_report
from longrl.report.metrics import read_metrics
from longrl.runtime import start_run
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from longrl.types import Example

logger = logging.getLogger(__name__)

CAREFUL = "<think>the"
"""How every careful thought of the synthetic data begins, and no hasty one."""


def run_quickstart(config: QuickstartConfig) -> Path:
    """Runs every stage and writes summary.json and report.html.

    A run that was interrupted is taken up where it stopped; a finished one is done again, but for the videos and the
    cache of embeddings.

    Returns:
        The report.
    """
    run_dir = Path(config.run_dir)
    if (run_dir / "summary.json").exists():
        shutil.rmtree(run_dir)
    start_run(config, config.sft.runtime)
    clock = Clock()
    with clock.time("videos"):
        data = build_dataset(config.videos)
        gallery(list(data.videos), run_dir / "gallery.png")
    sft, rl = _wire(config, data)
    with clock.time("embeddings"):
        hit_rate, shape = _embed_all(sft, data)
    held_out = load_examples(data.test, sft.data, sft.video)

    results: dict[str, EvalResult] = {}

    def measure(stage: str, model: str | Path, **control: Any) -> None:
        with clock.time("evaluation"):
            results[stage] = _evaluate(stage, model, rl, held_out, **control)
            results[stage].write(run_dir / "eval" / f"{stage}.json")
        logger.info("%s: accuracy %.3f", stage, results[stage].overall.accuracy)

    measure("base", config.sft.model.path)
    with clock.time("sft"):
        sft_model = train_sft(sft)
    measure("sft", sft_model)
    measure("sft_careful", sft_model, forced=CAREFUL)
    with clock.time("rl"):
        rl_model = train_rl(rl.model_copy(update={"model": rl.model.at(sft_model)}))
    measure("rl", rl_model)
    measure("rl_no_video", rl_model, change=without_video)
    measure("rl_shuffled", rl_model, change=shuffled_in_time)

    summary = _summary(config, results, shape, hit_rate, read_metrics(run_dir / "rl" / "metrics.jsonl"), clock)
    _write_json(run_dir / "summary.json", summary)
    report = write_report(run_dir)
    logger.info("report: %s", report)
    return report


class Clock:
    """Seconds by part, and since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        return {"total": time.perf_counter() - self.began, **self.parts}


def _wire(config: QuickstartConfig, data: Dataset):
    """The stages' configurations with the data and directories of this run."""
    run_dir = Path(config.run_dir)

    def placed(stage: Any, name: str, train: Path) -> Any:
        rows = stage.data.model_copy(update={"train": str(train), "eval": str(data.test)})
        return stage.model_copy(update={"run_dir": str(run_dir / name), "data": rows})

    return placed(config.sft, "sft", data.train_sft), placed(config.rl, "rl", data.train_rl)


def _embed_all(config: RunConfig, data: Dataset) -> tuple[float, dict[str, Any]]:
    """Embeds every clip once; returns the hit rate and what the longest prompt is made of."""
    build = PromptBuilder(load_family(config.model, config.runtime.seed), config)
    frames, seconds, tokens = 0, 0.0, 0
    for path in (data.train_sft, data.test):
        by_clip: dict[Any, Example] = {
            example.clips: example for example in load_examples(path, config.data, config.video)
        }
        for example in by_clip.values():
            _, (prompt,) = build([example])
            times = prompt.media[0].timestamps_s
            frames, seconds = max(frames, len(times)), max(seconds, float(times[-1]))
            tokens = max(tokens, len(prompt))
    return build.cache.hit_rate, {"frames_per_video": frames, "video_seconds_max": seconds, "prompt_tokens": tokens}


def _evaluate(stage: str, model: str | Path, config: RunConfig, examples: list[Example], **control: Any) -> EvalResult:
    policy = Policy(load_family(config.model.at(model), config.runtime.seed))
    return evaluate(policy, examples, config, stage=stage, **control)


def _summary(
    config: QuickstartConfig,
    results: dict[str, EvalResult],
    shape: dict[str, Any],
    hit_rate: float,
    steps: list[dict[str, Any]],
    clock: Clock,
) -> dict[str, Any]:
    choice = {stage: result.by_kind["choice"].accuracy for stage, result in results.items()}
    order = {stage: result.by_category["order"].accuracy for stage, result in results.items()}
    return {
        **shape,
        "questions": results["rl"].overall.num_questions,
        "accuracy_base": choice["base"],
        "accuracy_sft": choice["sft"],
        "accuracy_rl": choice["rl"],
        "rl_steps": len(steps),
        "cache_hit_rate": hit_rate,
        "wall_s": clock.seconds(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "logprob_diff_max": max(step["sampling/logprob_diff"] for step in steps),
        "controls": {
            "rl_without_video": choice["rl_no_video"],
            "rl_order": order["rl"],
            "rl_order_frames_shuffled": order["rl_shuffled"],
            "sft_forced_careful": choice["sft_careful"],
        },
        "seed": config.rl.runtime.seed,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)
