"""`longrl check` of image and video generation. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longrl.data.media_prompts import load_prompts
from longrl.flow_config import FlowConfig, MediaConfig, Sides, require_multiples
from longrl.judge_config import key_problem
from longrl.models.media import pipeline_class
from longrl.registry import require_name
from longrl.rewards.media_checkpoints import require_files
from longrl.scorers_config import CLIPS, TOYS, ScorersConfig
from longrl.scoring_config import require_weights

TWINS: dict[str, dict[str, dict[str, Any]]] = {
    "sd3": {"transformer": {"patch_size": 2, "pos_embed_max_size": 32}, "vae": {"block_out_channels": [8, 16]}},
    "wan": {
        "transformer": {"patch_size": [1, 2, 2]},
        "vae": {"scale_factor_spatial": 2, "scale_factor_temporal": 2},
    },
}
"""Of models/tiny_diffusion.py: part -> what its config.json would say. What one leaves out has diffusers' default."""


def flow_rows(config: FlowConfig) -> Iterator[tuple[str, str, str | None]]:
    """(what, value, problem or None) of what a run needs and does."""
    model = config.model.path
    problem = _problem(pipeline_class, model)
    if find_spec("diffusers") is None:
        problem = "image and video generation needs the package diffusers: pip install 'longrl[flow]'"
    yield "model", f"{model} ({config.model.dtype})", problem
    for name, path in (("prompts", config.prompts.train), ("held out", config.prompts.eval)):
        if path is not None:
            problem = _problem(load_prompts, path)
            yield name, path if problem else f"{len(load_prompts(path))} of {path}", problem
    for name, weight in config.rewards.items():
        asked, problem = _scorer(name, config.scorers)
        yield "reward", f"{name}, weight {weight:g}" + (f": {asked}" if asked else ""), problem
    if problem := _problem(require_weights, config.rewards):
        yield "reward", "", problem
    media, sampling, flow = config.media, config.sampling, config.flow
    frames = f", {media.frames} frames" if media.frames > 1 else ""
    size = None if _problem(pipeline_class, model) else _problem(partial(require_size, media=media), model)
    yield "media", f"{media.width} x {media.height}{frames}", size
    yield "sampling", f"{sampling.steps} steps, guidance {sampling.guidance:g}", None
    window = "no" if flow.method == "nft" else "all" if flow.window is None else f"{flow.window_size(sampling.steps)}"
    yield "method", f"{flow.preset or flow.method}, stochastic steps: {window}, KL {flow.kl_coef:g}", None
    yield "steps", f"{config.steps}, each of {config.prompts_per_step} prompts x {flow.group_size} samples", None
    yield "plan", "memory and time of generators are not planned", None


def _scorer(name: str, config: ScorersConfig) -> tuple[str | None, str | None]:
    """What it asks or loads; what is missing of files, keys and packages. The run finds out whether services answer."""
    if name in CLIPS:
        return getattr(config, name).path, _problem(partial(require_files, config=config), name)
    if name == "ocr":
        return "rapidocr", _lacks("rapidocr", "scorers")
    if name == "vlm":
        assert config.vlm is not None
        models = config.vlm.models.values()
        keys = (key_problem(model.key_env) for model in models)
        return ", ".join(model.model for model in models), next(filter(None, keys), _lacks("openai", "judge"))
    if name in config.services:
        service = config.services[name]
        return service.url, key_problem(service.key_env) or _lacks("httpx2", "scorers")
    return None, _problem(partial(require_name, known={*TOYS, *config.names}, what="reward"), name)


def _lacks(package: str, extra: str) -> str | None:
    return None if find_spec(package) else f"the package {package} is not installed: pip install 'longrl[{extra}]'"


def _problem(look: Callable[[Any], object], what: Any) -> str | None:
    try:
        look(what)
    except ValueError as error:
        return str(error)
    return None


def require_size(path: str, media: MediaConfig) -> None:
    """Looks whether a pipeline can make media of this size, where its files say so, as the families' own `require_size`
    does once it is loaded: tests/unit/test_flow_check.py compares them.

    Args:
        path: a diffusers folder, or a twin.

    Raises:
        ValueError: it cannot, or there is no such pipeline.
    """
    name = pipeline_class(path)
    try:
        transformer, vae = (_part(path, part) for part in ("transformer", "vae"))
        limits = _image_limits if name == "StableDiffusion3Pipeline" else _video_limits
        sides, frames = limits(transformer, vae)
    except (OSError, KeyError, TypeError, ValueError):  # the run says what is wrong with the folder
        return
    require_multiples(media.height, media.width, media.frames, sides, frames)


def _image_limits(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[Sides, int | None]:
    unit = 2 ** (len(vae["block_out_channels"]) - 1) * _count(transformer.get("patch_size", 2))
    side = unit, _count(transformer.get("pos_embed_max_size", 96)) * unit
    return {"height": side, "width": side}, None


def _video_limits(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[Sides, int | None]:
    space = _count(vae.get("scale_factor_spatial", 8))
    _, height, width = map(_count, transformer.get("patch_size", (1, 2, 2)))
    # 16: the pipeline asks for it
    sides = {"height": (max(space * height, 16), None), "width": (max(space * width, 16), None)}
    return sides, _count(vae.get("scale_factor_temporal", 4))


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r}, expected a whole number, 1 or more")
    return value


def _part(path: str, part: str) -> dict[str, Any]:
    if path.startswith("tiny:"):
        return TWINS[path.removeprefix("tiny:").partition("@")[0]][part]
    found = json.loads((Path(path) / part / "config.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"{part}/config.json holds a {type(found).__name__}")
    return found
