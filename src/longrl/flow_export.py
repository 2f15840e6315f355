"""A flow run's checkpoint as a whole diffusers folder."""

from __future__ import annotations

from pathlib import Path

from longrl.config_files import load_config
from longrl.flow_config import FlowConfig
from longrl.flow_training import BASE
from longrl.models.media import load_media_family, quiet
from longrl.runtime import CONFIG_NAME


def write_pipeline(run: Path, model: Path, out: Path) -> Path:
    """Writes the pipeline that a run began with, its adapters merged or its denoiser put in place.

    Args:
        run: the run directory.
        model: of a checkpoint: what `Denoiser.save` wrote.
        out: to be made; the stock pipeline's `from_pretrained` loads it.

    Raises:
        ValueError: the pipeline that the run began with is not where it was.
    """
    config = load_config([run / CONFIG_NAME])
    assert isinstance(config, FlowConfig)
    base = run / BASE if config.warm_up_steps else config.model.path
    pipe = load_media_family(config.model.at(base).model_copy(update={"device": "cpu"}), config.runtime.seed).pipe
    with quiet():
        if config.model.lora:
            pipe.load_lora_weights(model)
            pipe.fuse_lora(components=["transformer"])
            pipe.unload_lora_weights()
        else:
            pipe.transformer = type(pipe.transformer).from_pretrained(model, dtype=pipe.transformer.dtype)
        pipe.save_pretrained(out)
    return out
