"""Which questions a model can learn from: `longrl filter`. While training, `algo.max_refills` does the same online."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrl.algo.shaping import RIGHT
from longrl.config import EvalRunConfig
from longrl.data.examples import media_folder, parse
from longrl.data.rows import read_rows
from longrl.evals.runner import EvalResult, run_eval
from longrl.files import write_whole
from longrl.parallel.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

KEPT = "sometimes right"


def difficulty(responses: Sequence[dict[str, Any]]) -> str:
    """sometimes right | always right | always wrong | unscored: none of the responses could be judged.

    Sometimes right: the scores differ, so that there is something to learn; if not, right is what is above RIGHT.
    Responses that could not be judged count neither way.

    Args:
        responses: of one question, as in `EvalResult.examples`.
    """
    scores = {one["score"] for one in responses} - {None}
    if not scores:
        return "unscored"
    return KEPT if len(scores) > 1 else "always right" if min(scores) > RIGHT else "always wrong"


def by_difficulty(result: EvalResult) -> dict[str, list[str]]:
    """Ids of the questions of an evaluation, by what `difficulty` says; those without usable media: skipped."""
    found: dict[str, list[str]] = {name: [] for name in (KEPT, "always right", "always wrong", "unscored", "skipped")}
    for example in result.examples:
        name = "skipped" if example["id"] in result.skipped else difficulty(example["responses"])
        found[name].append(example["id"])
    return found


def filter_command(config: EvalRunConfig, out: Path, ranks: Ranks = ALONE) -> dict[str, list[str]]:
    """Asks each question of `data.eval` `eval.samples` times; writes the rows of those that are right sometimes.

    Also writes filter.json, the ids by difficulty, into the run directory. Every rank calls it.

    Reference: the difficulty filter of LongVideo-Reason (Long-RL, arXiv 2507.07966, section 3: ten answers each).

    Args:
        out: the JSONL file to write, where relative paths in the rows start: beside `data.eval`, unless
            `data.media_dir` says where, or it is a dataset of the hub.

    Raises:
        ValueError: it is elsewhere or exists, rows hold bytes, or no question is left; and as `run_eval`.
    """
    if out.exists():
        raise ValueError(f"--out {out}: there is such a file; remove it, or name another")
    source = config.data.eval
    lines = {} if source is None else _lines(source, config, out)
    result = run_eval(config, ranks)
    found = by_difficulty(result)
    counts = ", ".join(f"{len(ids)} {name}" for name, ids in found.items() if ids)
    if not found[KEPT]:
        raise ValueError(f"{source}: no question is left: {counts}; ask more often (eval.samples), or an other model")
    if ranks.is_main:
        write_whole(out, "".join(lines[name] + "\n" for name in found[KEPT]))
        write_whole(Path(config.run_dir) / "filter.json", json.dumps(found, indent=1) + "\n")
        logger.info("%s: %s, asked %d times each", out, counts, config.eval.samples)
    return found


def _lines(source: str, config: EvalRunConfig, out: Path) -> dict[str, str]:
    """Example id -> its row, of whatever format, as a line of JSON."""
    folder, rows = read_rows(source)
    if folder is not None and config.data.media_dir is None and out.resolve().parent != folder.resolve():
        raise ValueError(f"--out {out}: expected a file in {folder}, where relative paths in the rows start")
    examples = parse(source, config.data, config.video, media_folder(config.cache))
    try:
        return {
            one.id: json.dumps(columns, ensure_ascii=False)
            for (_, _, columns), one in zip(rows, examples, strict=True)
            if one.id is not None
        }
    except TypeError as error:
        raise ValueError(
            f"{source}: rows that hold more than JSON can ({error}); write their media to files"
        ) from error
