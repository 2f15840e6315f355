"""The ear of Qwen2.5-Omni: sound -> embeddings, 25 a second, in windows of two seconds that attend to themselves alone.

Reference: Qwen2.5-Omni (arXiv 2503.20215), section 2.1; log-mel features as Whisper's (arXiv 2212.04356).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from longrl.models.encoder_id import EncoderId, config_of
from longrl.types import Clip, MediaEmbeds, MediaError, MediaSize

PREPROCESSING = 2
"""Raise it when features change: cached embeddings are then made again."""
RATE, HOP, FFT = 16000, 160, 400
"""Samples a second, a feature and a feature's window."""
CHUNK_WINDOWS, BACKWARD_WINDOWS = 64, 16
"""Windows that the tower sees at a time; and with gradients."""


class OmniAudio:
    """Differs: transformers' feature extractor cuts sound off after 300 seconds; here it goes on, by the same rule."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.window = tower, 2 * tower.config.n_window
        """Features of a window."""
        filters = WhisperFeatureExtractor(feature_size=tower.config.num_mel_bins).mel_filters
        self.filters = torch.from_numpy(filters).float()
        self._encoder_id = EncoderId(self._about, lambda: self.tower.state_dict(keep_vars=True))

    @property
    def encoder_id(self) -> str:
        return self._encoder_id()

    def _about(self) -> dict[str, Any]:
        return {
            "preprocessing": PREPROCESSING,
            "dtype": str(self.tower.dtype),
            "audio_config": config_of(self.tower.config),
        }

    def measure(self, clip: Clip) -> MediaSize:
        from longrl.video.audio import count_samples

        features = self._count_features(clip, count_samples(clip.path, clip.start_s, clip.end_s, RATE))
        tokens, windows, width = count_tokens(features), -(-features // self.window), self.tower.config.output_dim
        return MediaSize(
            num_frames=windows,
            num_tokens=tokens,
            prompt_tokens=tokens,
            num_bytes=tokens * width * self.tower.dtype.itemsize + 8 * windows,
            chunk_frames=CHUNK_WINDOWS,
            chunk_tokens=CHUNK_WINDOWS * count_tokens(self.window),
        )

    def encode(self, clip: Clip, chunks: range | None = None) -> Iterator[MediaEmbeds]:
        """See models/family.py. A "frame" is a window; each rank decodes all of the sound, which is little."""
        sound, ceiling = self._read(clip)
        windows = -(-self._count_features(clip, len(sound)) // self.window)
        every = range(0, windows, CHUNK_WINDOWS)
        starts = every if chunks is None else every[chunks.start : chunks.stop]
        return map(partial(self._encode_chunk, clip, sound, ceiling, CHUNK_WINDOWS), starts)

    @torch.no_grad()
    def _encode_chunk(self, clip: Clip, sound: Tensor, ceiling: float, count: int, first: int) -> MediaEmbeds:
        embeds = self._embed(clip, sound, ceiling, first, count).cpu()
        each = count_tokens(self.window)
        windows = -(-len(embeds) // each)
        return MediaEmbeds(
            embeds=embeds,
            grid_thw=(windows, 1, each),
            seconds_per_grid=self.window * HOP / RATE,
            timestamps_s=clip.start_s + (first + torch.arange(windows, dtype=torch.float64)) * self.window * HOP / RATE,
            key="",
        )

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        named = self.tower.named_parameters()
        return [p for name, p in named if name.startswith("proj.") == (part == "projector")]

    def backward(self, media: MediaEmbeds, span: slice, grads: Tensor) -> None:
        """See Family.encode_backward."""
        assert media.clip, f"media {media.key} comes from no clip"
        sound, ceiling = self._read(media.clip)
        each = count_tokens(self.window)
        first = span.start // each
        while first * each < span.stop:
            embeds = self._embed(media.clip, sound, ceiling, first, BACKWARD_WINDOWS)
            here = slice(max(span.start, first * each), min(span.stop, first * each + len(embeds)))
            rows = embeds[here.start - first * each : here.stop - first * each]
            rows.backward(grads[here.start - span.start : here.stop - span.start].to(rows))
            first += BACKWARD_WINDOWS

    def _embed(self, clip: Clip, sound: Tensor, ceiling: float, first: int, count: int) -> Tensor:
        """[tokens, D] of so many windows from the first on."""
        last = min((first + count) * self.window, self._count_features(clip, len(sound)))
        mel = scaled(self.log_mel(sound, first * self.window, last), ceiling)
        lengths = torch.tensor([mel.shape[1]], device=self.tower.device)
        return self.tower(mel.to(self.tower.device, self.tower.dtype), feature_lens=lengths).last_hidden_state

    def _read(self, clip: Clip) -> tuple[Tensor, float]:
        """The samples, and the largest feature of all of them, which the scale of each depends on."""
        from longrl.video.audio import read_audio

        sound = torch.from_numpy(read_audio(clip.path, clip.start_s, clip.end_s, RATE))
        features = -(-len(sound) // HOP)
        step = CHUNK_WINDOWS * self.window
        largest = [self.log_mel(sound, i, min(i + step, features)).max() for i in range(0, features, step)]
        return sound, float(torch.stack(largest).max())

    def _count_features(self, clip: Clip, samples: int) -> int:
        """Without those of a last window that is too short for a token."""
        features = -(-samples // HOP)
        rest = features % self.window
        features -= rest if rest and count_tokens(rest) < 1 else 0
        if features == 0:
            raise MediaError(f"{clip.path}: {samples / RATE:.3f} s of sound are too short; give at least 0.04 s")
        return features

    def log_mel(self, sound: Tensor, first: int, last: int) -> Tensor:
        """float32 [mel, last - first]: features of 25 ms around every 10 ms; mirrored before the start, silent after
        the end."""
        start, stop = first * HOP - FFT // 2, (last - 1) * HOP + FFT // 2
        piece = sound[max(0, start) : stop]
        piece = torch.nn.functional.pad(piece, (0, stop - max(0, start) - len(piece)))
        if start < 0:
            piece = torch.cat([piece[1 : 1 - start].flip(0), piece])
        window = torch.hann_window(FFT)
        spectrum = torch.stft(piece, FFT, HOP, window=window, center=False, return_complex=True)
        return (self.filters.T @ (spectrum.abs() ** 2).contiguous()).clamp(min=1e-10).log10()


def scaled(log_mel: Tensor, ceiling: float) -> Tensor:
    """At most 80 dB below the loudest, around zero."""
    return (log_mel.clamp(min=ceiling - 8.0) + 4.0) / 4.0


def count_tokens(features: int) -> int:
    """A convolution and a pooling halve what comes in, each."""
    return max(0, ((features - 1) // 2 + 1 - 2) // 2 + 1)


def time_chunks(times: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Cuts ascending position numbers where they pass multiples of `length`; one cut a token at most, as Qwen2.5-Omni
    was trained."""
    starts = [0]
    for i, time in enumerate(times.tolist()):
        if time >= len(starts) * length:
            starts.append(i)
    return list(zip(starts, [*starts[1:], len(times)], strict=True))
