"""`longrl check` of image and video generation. Imports no torch, and so cannot ask the autoencoder about sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

from longrl.data.media_prompts import load_prompts
from longrl.flow_config import FlowConfig
from longrl.models.media import pipeline_class
from longrl.rewards.media_checkpoints import require_files
from longrl.scorers_config import CLIPS, ScorersConfig


def flow_rows(config: FlowConfig) -> Iterator[tuple[str, str, str | None]]:
    """(what, value, problem or None) of what a run needs and does."""
    yield "model", f"{config.model.path} ({config.model.dtype})", _problem(pipeline_class, config.model.path)
    for name, path in (("prompts", config.prompts.train), ("held out", config.prompts.eval)):
        if path is not None:
            problem = _problem(load_prompts, path)
            yield name, path if problem else f"{len(load_prompts(path))} of {path}", problem
    for name in sorted(config.scorers.names & set(config.rewards)):
        yield name, *_scorer(name, config.scorers)
    media, sampling, flow = config.media, config.sampling, config.flow
    frames = f", {media.frames} frames" if media.frames > 1 else ""
    yield "media", f"{media.width} x {media.height}{frames}", None
    yield "sampling", f"{sampling.steps} steps, guidance {sampling.guidance:g}", None
    window = "no" if flow.method == "nft" else "all" if flow.window is None else f"{flow.window_size(sampling.steps)}"
    yield "method", f"{flow.preset or flow.method}, stochastic steps: {window}, KL {flow.kl_coef:g}", None
    yield "steps", f"{config.steps}, each of {config.prompts_per_step} prompts x {flow.group_size} samples", None


def _scorer(name: str, config: ScorersConfig) -> tuple[str, str | None]:
    """Files and packages; whether a service answers, the run itself finds out."""
    if name in CLIPS:
        return getattr(config, name).path, _problem(partial(require_files, config=config), name)
    if name == "ocr":
        missing = importlib.util.find_spec("rapidocr") is None
        return "rapidocr", "rapidocr is not installed: pip install 'longrl[scorers]'" if missing else None
    if name == "vlm":
        assert config.vlm is not None
        return ", ".join(model.model for model in config.vlm.models.values()), None
    return config.services[name].url, None


def _problem(look, path: str) -> str | None:
    try:
        look(path)
    except ValueError as error:
        return str(error)
    return None
