"""vLLM in this process: started without weights, which then come from the policy, and asked for samples.

Under torchrun every process starts one, and those that share prompts are one engine (tensor parallel over sp).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrl.config import RlConfig, RolloutConfig
from longrl.parallel.ranks import Ranks
from longrl.policy import Policy
from longrl.rollout.vllm_inputs import engine_input
from longrl.rollout.vllm_rules import installed, lora_room, max_model_len, require_version
from longrl.rollout.vllm_weights import decoder_weights, save_adapters, untie
from longrl.types import Prompt

log = logging.getLogger(__name__)

BATCHED_TOKENS = 8192
"""Tokens that are prefilled at a time, at least."""
CPU_BLOCK_TOKENS = 32
"""Tokens of keys and values that are shared or not shared as one: what the CPU's kernels take."""


QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
"""Set in the environment, unless they are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A sampled response."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int
    """Of the weights."""


class Vllm:
    """An engine with a copy of the policy's weights."""

    def __init__(self, policy: Policy, config: RlConfig, ranks: Ranks) -> None:
        """
        Raises:
            RuntimeError: vLLM is not there, of another version, or does not start.
        """
        require_version(installed())
        family, text = policy.family, policy.family.model.config.get_text_config()
        self.model_type, self.width = family.model_type, text.hidden_size
        self.stop_ids, self.ranks, self.on_gpu = sorted(family.stop_ids), ranks, policy.trunk.device.type == "cuda"
        asked = config.rollout.vllm
        name = asked.dtype or config.model.compute_dtype or config.model.dtype
        self.dtype: torch.dtype = getattr(torch, name)
        self.sleeps = asked.sleep and self.on_gpu
        self.lora = config.model.lora is not None
        self.version: int | None = None
        """Of the weights; None: there are none yet."""
        self.folder = tempfile.TemporaryDirectory(prefix="longrl-vllm-")
        family.describe(Path(self.folder.name, "model"))
        untie(Path(self.folder.name, "model", "config.json"))
        self.llm = _start(self._arguments(config, name, policy))
        self.room: int = self.llm.llm_engine.model_config.max_model_len
        self.media_room: int = self.llm.llm_engine.input_processor.mm_encoder_cache_size
        """Rows of one clip; 0: it takes no media apart from the prompt."""
        self._asleep: set[str] = set()
        self._adapter, self._count, self._draws = None, 0, 0

    def _arguments(self, config: RlConfig, dtype: str, policy: Policy) -> dict[str, Any]:
        asked, lora = config.rollout.vllm, config.model.lora
        given: dict[str, Any] = {
            "model": str(Path(self.folder.name, "model")),
            "load_format": "dummy",  # the weights are handed over
            "dtype": dtype,
            "max_model_len": max_model_len(config),
            "max_num_seqs": config.rollout.max_streams,
            "gpu_memory_utilization": asked.gpu_memory_utilization,
            "enforce_eager": asked.enforce_eager or not self.on_gpu,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",  # of logits / temperature, as the trainer's
            "generation_config": "vllm",
            "seed": config.runtime.seed,
            "disable_log_stats": False,
            "enable_sleep_mode": self.sleeps,
        }
        if not self.on_gpu:
            # a seeded request whose prefill is cut would have its generator set back, which the CPU's cannot be
            given |= {"block_size": CPU_BLOCK_TOKENS, "enable_chunked_prefill": False}
        if policy.family.placeholders and policy.family.decoder_prefix:
            given["enable_prompt_embeds"] = True
        elif policy.family.placeholders:
            given |= {"enable_mm_embeds": True, "skip_mm_profiling": True, "mm_processor_cache_gb": 0}
            if self.on_gpu and (longest := config.data.max_prompt_tokens) is not None:
                given["max_num_batched_tokens"] = max(BATCHED_TOKENS, longest)  # then a clip of any length has room
        if lora:
            given |= {"enable_lora": True, "max_lora_rank": lora_room(lora.rank), "max_loras": 1}
        if self.ranks.size > 1:
            given |= {
                "distributed_executor_backend": "external_launcher",
                "tensor_parallel_size": self.ranks.sp_size,
            }
        return given

    def load(self, policy: Policy) -> None:
        """Takes over the policy's weights, of adapters the adapters alone after the first time. All ranks call it."""
        self._wake("weights")
        if self.version is None or not self.lora:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": decoder_weights(policy)})
        if self.lora:
            self._load_adapters(policy)
        engine = self.llm.llm_engine
        if not engine.reset_prefix_cache():
            raise RuntimeError("vLLM keeps keys and values of the old weights: some request has not ended")
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        self.version = policy.version

    def _load_adapters(self, policy: Policy) -> None:
        """Under a name of their own, as vLLM knows adapters by name."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        self._count += 1
        folder = Path(self.folder.name, f"adapters-{self._count}")
        save_adapters(policy, folder)  # each rank for itself: they need not share a disk
        if self._adapter is not None:
            self.llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path)
        self._adapter = LoRARequest(f"step-{self._count}", self._count, str(folder))

    def draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int | None]], config: RolloutConfig
    ) -> list[list[Drawn]]:
        """Samples from each prompt once for each of its seeds; None: always the likeliest token.

        Returns:
            Of each prompt, in the order of its seeds.

        Raises:
            RuntimeError: vLLM gave a response up.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        assert self.version is not None, "vLLM was asked before it had weights"
        self._wake("weights", "kv_cache")
        engine = self.llm.llm_engine
        self._draws += 1  # what an earlier call that failed has left in the engine has other names
        for i, (prompt, ones) in enumerate(zip(prompts, seeds, strict=True)):
            given = engine_input(prompt, self.model_type, self.width, self.dtype)  # one copy for the group
            for k, seed in enumerate(ones):
                sampling = SamplingParams(
                    temperature=0.0 if seed is None else config.temperature,
                    seed=seed,
                    max_tokens=config.max_new_tokens,
                    stop_token_ids=self.stop_ids,
                    ignore_eos=True,  # the stop tokens say it all
                    logprobs=0,
                    detokenize=False,
                )
                engine.add_request(f"{self._draws}/{i}/{k}", given, sampling, lora_request=self._adapter)
        found: dict[str, Drawn] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found[output.request_id] = _drawn(output.outputs[0], self.version)
        if self.sleeps:
            self.llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}
        return [[found[f"{self._draws}/{i}/{k}"] for k in range(len(ones))] for i, ones in enumerate(seeds)]

    def prefix_hits(self) -> tuple[int, int]:
        """Prompt tokens asked for so far, and those among them whose keys and values were there."""
        values = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        return int(values["vllm:prefix_cache_queries"]), int(values["vllm:prefix_cache_hits"])

    def close(self) -> None:
        if self.ranks.size == 1:  # else it would end the run's own process group, and ends with the process
            self.llm.llm_engine.engine_core.shutdown()
        self.folder.cleanup()

    def _wake(self, *parts: str) -> None:
        if waking := self._asleep.intersection(parts):
            self.llm.wake_up(tags=sorted(waking))
            self._asleep -= waking


def _start(arguments: dict[str, Any]) -> Any:
    """
    Raises:
        RuntimeError: it does not start.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over in memory
    set_num_threads = torch.set_num_threads
    try:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        return LLM(**arguments)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise RuntimeError(f"vLLM does not start: {' '.join(str(error).split())}") from error
    finally:
        torch.set_num_threads = set_num_threads  # which the CPU build takes away


def _drawn(output: Any, version: int) -> Drawn:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave a response up after {len(output.token_ids)} tokens: {output.finish_reason}")
    token_ids = tuple(output.token_ids)
    logprobs = tuple(at[token].logprob for at, token in zip(output.logprobs, token_ids, strict=True))
    return Drawn(token_ids=token_ids, logprobs=logprobs, finish_reason=output.finish_reason, version=version)
