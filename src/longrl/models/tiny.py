"""The tokenizer of the tiny twins: byte-level BPE over a small vocabulary, so that any text can be written with it."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longrl.data.synthetic.questions import ask
from longrl.data.synthetic.world import PLACES, make_story

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = (
    *("<think>", "</think>", "<answer>", "</answer>"),
    *(f"\n{letter}." for letter in "ABCD"),
    *(f" ({letter})" for letter in "ABCD"),
    *(f" {place}" for place in PLACES),
)
"""Ordinary text that is one token each: what a large vocabulary has anyway, and a few layers need."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the synthetic questions' own sentences: the same every time."""

    def sentences():
        for seed in range(60):
            story = make_story(seed, 3600.0)
            for q in ask(story, seed, 12):
                yield from (q.text, *(f"\n{letter}. {option}" for letter, option in zip("ABCD", q.options)))  # noqa: B905
                yield from (q.careful, q.hasty, f"{q.answer}")
        yield from ("user\n", "assistant\n", "system\n", " ".join(str(n) for n in range(60)))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(WORDS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.add_special_tokens(
        {"additional_special_tokens": [t for t in SPECIAL if t not in ("<|im_end|>", "<|endoftext|>")]}
    )
    fast.add_tokens(list(WORDS))
    return fast
