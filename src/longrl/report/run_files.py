"""The files of a run that its report is made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from longrl.config_files import read_yaml
from longrl.report.metrics import read_metrics

T = TypeVar("T")

STAGES = {"base": "before SFT", "sft": "after SFT", "rl": "after RL"}
"""Name of an evaluation -> how the page calls it."""
LOOPS = {"rl": "Reinforcement learning", "sft": "Supervised fine-tuning"}
"""Kind of a training run, or stage of a quickstart -> how the page calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run left behind. A missing file is an empty record and an entry in `problems`."""

    run_dir: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    evals: Mapping[str, Mapping[str, Any]]
    """Stage -> content of eval/STAGE.json; base, sft, rl first."""
    metrics: Mapping[str, list[dict[str, Any]]]
    """sft | rl -> lines."""
    problems: Mapping[str, str]
    """File -> what is wrong with it."""

    def missing(self, *files: str) -> str:
        """A paragraph that says why something cannot be shown."""
        said = "; ".join(
            f"<code>{escape(file)}</code> {escape(self.problems[file])}" for file in files if file in self.problems
        )
        return f'<p class="missing">Nothing to show: {said or "the run recorded nothing of this"}.</p>'


def read_run(run_dir: Path) -> RunFiles:
    """Read what there is; never fails on what is missing or broken."""
    problems: dict[str, str] = {}

    def parsed(name: str, parse: Callable[[Path], T], empty: T) -> T:
        try:
            return parse(run_dir / name)
        except FileNotFoundError:
            problems[name] = "is missing"
        except (OSError, ValueError) as error:
            problems[name] = f"cannot be read ({error})"
        return empty

    config = parsed("config.yaml", read_yaml, {})
    kinds = [kind] if (kind := config.get("kind")) in LOOPS else [*LOOPS]
    found = sorted(path.stem for path in (run_dir / "eval").glob("*.json"))
    stages = [*STAGES, *(stage for stage in found if stage not in STAGES)]
    evals = {stage: parsed(f"eval/{stage}.json", _read_json, {}) for stage in stages}
    return RunFiles(
        run_dir=run_dir,
        config=config,
        summary=parsed("summary.json", _read_json, {}),
        evals={stage: content for stage, content in evals.items() if content},
        metrics={kind: parsed(metrics_file(config, kind), _read_lines, []) for kind in kinds},
        problems=problems,
    )


def metrics_file(config: Mapping[str, Any], kind: str) -> str:
    """Of a training run, or of that stage of a quickstart."""
    return "metrics.jsonl" if config.get("kind") == kind else f"{kind}/metrics.jsonl"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    records = read_metrics(path)
    if not records:
        raise ValueError("it has no complete line")
    return records


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
