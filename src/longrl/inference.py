"""A model to ask: `generate_content` and `score`.

Media are decoded and encoded once (the cache). The keys and values of all up to the end of the last media stay, so that
a further question with the same beginning reads only its own words: put the video first, the question after it. What
comes after other words has other keys and values, as every token attends to all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longrl.config import CacheConfig, RolloutConfig
from longrl.config_files import build_section
from longrl.data.prompts import response_ids
from longrl.models.family import Family
from longrl.models.streams import make_streams
from longrl.policy import Policy
from longrl.rewards.format import parse_answer, parse_thought
from longrl.rollout.native import NativeEngine
from longrl.types import Clip, Example, Message, Prefix, Prompt
from longrl.video.cache import EmbedCache
from longrl.video.encode import embed

THINKING = (
    "You are a helpful assistant. The user asks a question, and then you solves it.\n\nPlease first think deeply about "
    "the question based on the given video, and then provide the final answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think> <answer> answer here </answer>.\n\n Question: {question}"
)
"""What LongVILA-R1 was trained with, letter by letter: a part of its interface. Reference: its model card."""

Parts = str | Clip | Sequence[str | Clip]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One sampled response."""

    text: str
    thought: str | None
    """What stands in the think tags."""
    answer: str | None
    """What stands in the answer tags."""
    finish_reason: str
    """stop | length"""
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A given response as the model reads it."""

    token_ids: tuple[int, ...]
    """[R], the end of the turn included."""
    logprobs: tuple[float, ...]
    """[R]"""
    prompt_tokens: int


class Model:
    """Inference with one model, in this process."""

    def __init__(self, family: Family, cache: CacheConfig) -> None:
        self.policy = Policy(family)
        self.cache = EmbedCache(cache.dir, int(cache.max_gib * 2**30))
        self._kept: tuple[tuple, Prefix] | None = None
        """The last media's: by their keys and the tokens up to their end."""
        self.prefilled = 0
        """Tokens that prefixes have been computed of."""

    def generate_content(self, parts: Parts, *, think: bool = False, seed: int = 0, **sampling) -> Reply:
        """Asks once. All else is as in `generate_contents`.

        Args:
            parts: Text, videos, images, sound, in reading order.
            think: Put the text into the prompt that asks for a thought before the answer.
        """
        return self.generate_contents(parts, n=1, think=think, seed=seed, **sampling)[0]

    def generate_contents(
        self,
        parts: Parts,
        *,
        n: int,
        think: bool = False,
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
        **sampling,
    ) -> list[Reply]:
        """Asks n times.

        Args:
            parts: Text, videos, images, sound, in reading order.
            think: Put the text into the prompt that asks for a thought before the answer.
            on_text: Called with the number of a reply and its next piece of text, as it is written.
            sampling: Other fields of config.RolloutConfig: max_new_tokens (512), temperature, top_k, top_p.

        Raises:
            MediaError: A file cannot be used.
            ValueError: The model does not take such media, there is no text, or a text is the name of a file.
        """
        config = build_section(RolloutConfig, {"max_new_tokens": 512, **sampling, "group_size": n}, "generate_contents")
        prompt = self._prompt(parts, think)
        pieces = None if on_text is None else _Pieces(self.policy.family, on_text)
        with torch.no_grad():
            engine = NativeEngine(self.policy, config, on_tokens=pieces)
            (rollouts,) = engine.continue_prefix(self._prefix(prompt), [prompt], [seed])
        if pieces is not None:
            pieces.finish()
        return [
            Reply(
                text=one.text,
                thought=parse_thought(one.text),
                answer=parse_answer(one.text),
                finish_reason=one.finish_reason,
                prompt_tokens=len(prompt),
            )
            for one in rollouts
        ]

    def score(self, parts: Parts, response: str, *, think: bool = False) -> Score:
        """The log-probs of a response that is given, and of the end of the turn after it.

        Raises:
            MediaError, ValueError: As `generate_contents`; or the response is empty.
        """
        if not isinstance(response, str) or not response:
            raise ValueError(f"response: got {response!r:.80}, expected the text that is to be scored")
        prompt, ids = self._prompt(parts, think), response_ids(self.policy.family, response)
        prefix = self._prefix(prompt)
        streams = make_streams([prompt], [ids], prefix.length)
        logprobs, _ = self.policy.logprobs(prefix, streams)
        return Score(token_ids=tuple(ids), logprobs=tuple(logprobs[streams.mask].tolist()), prompt_tokens=len(prompt))

    def _prompt(self, parts: Parts, think: bool) -> Prompt:
        content = tuple(parts) if isinstance(parts, Sequence) and not isinstance(parts, str) else (parts,)
        for part in content:
            if not isinstance(part, str | Clip):
                raise ValueError(f"parts: got {part!r:.80}, expected text, Video, Image or Audio, or a list of those")
            if isinstance(part, str) and _names_a_file(part):
                raise ValueError(
                    f"parts: the text {part!r:.80} is the name of a file; to show it write longrl.Video({part!r:.80}), "
                    "Image or Audio"
                )
        if not any(isinstance(part, str) and part.strip() for part in content):
            raise ValueError("the prompt is empty; write the question")
        if think:
            before, after = THINKING.split("{question}")
            first = next(i for i, part in enumerate(content) if isinstance(part, str))
            content = (*content[:first], before, *content[first:], after)
        example = Example(id="prompt", messages=(Message(role="user", content=content),), answer=None, kind="open")
        family = self.policy.family
        family.count_tokens(example, [0] * len(example.clips))  # what the model does not take is known at once
        return family.prompt(example, tuple(embed(clip, family, self.cache) for clip in example.clips))

    @torch.no_grad()
    def _prefix(self, prompt: Prompt) -> Prefix:
        """Of the tokens up to the end of the media, kept; without media of all but the last, not kept."""
        end = prompt.media_end
        if end == 0:
            self.prefilled += len(prompt) - 1
            return self.policy.prefix([prompt])
        key = (tuple(media.key for media in prompt.media), tuple(prompt.token_ids[:end].tolist()))
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next one needs room
            self._kept = key, self.policy.trunk("prefix", prompt, end, self.policy.version)
            self.prefilled += end
        return self._kept[1]


def _names_a_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a name can be; a zero in it
        return False


class _Pieces:
    """Tokens as they are drawn -> pieces of text, cut where characters are whole."""

    def __init__(self, family: Family, on_text: Callable[[int, str], None]) -> None:
        self.family, self.on_text = family, on_text
        self._ids: dict[int, list[int]] = {}
        self._said: dict[int, str] = {}

    def __call__(self, stream: int, token: int) -> None:
        if token in self.family.stop_ids:
            return
        self._ids.setdefault(stream, []).append(token)
        text = self._text(stream)
        if not text.endswith("\ufffd"):
            self._say(stream, text)

    def finish(self) -> None:
        """What was held back, as nothing completes it any more."""
        for stream in self._ids:
            self._say(stream, self._text(stream))

    def _text(self, stream: int) -> str:
        return str(self.family.tokenizer.decode(self._ids[stream], skip_special_tokens=False))

    def _say(self, stream: int, text: str) -> None:
        said = self._said.get(stream, "")
        if text != said and text.startswith(said):
            self._said[stream] = text
            self.on_text(stream, text[len(said) :])
