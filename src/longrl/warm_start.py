"""The recipe of the shipped warm start: supervised pre-training of the tiny twin on painted stories.

    python -m longrl.warm_start --out DIR --steps N

It plays the part of a real model's pre-training: the model learns to see, to describe and to answer at once, without
chains of thought and without reinforcement. Stories are drawn from the seed and painted straight to the tower's input
(no mp4 in between), so that no story is seen often; all have seeds that `data/synthetic/dataset.py` never uses.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longrl.data.synthetic.paint import look_at, paint
from longrl.data.synthetic.questions import ask, captions
from longrl.data.synthetic.world import Story, make_story
from longrl.models import load_family
from longrl.models.streams import make_streams
from longrl.config import ModelConfig
from longrl.policy import Policy
from longrl.types import Clip, Example, Frames, MediaEmbeds, Message

FIRST_SEED = 1 << 32
log = logging.getLogger(__name__)


@dataclass
class Painted:
    """A story's distinct looks as the tower reads them, and which look each second pair shows."""

    story: Story
    pixels: np.ndarray  # uint8 [U, 2, h, w, 3] resized frames pairs
    combo_of: list  # list of (start_s, end_s, [unique indices])


SIZE = (28, 28)
PAIRS = 6


def paint_story(seed: int, duration: float, rng: np.random.Generator) -> Painted:
    story = make_story(seed, duration)
    cuts = sorted({0.0, duration, *(e.start_s for e in story.events), *(e.end_s for e in story.events), *(s.start_s for s in story.scenes)})
    frames, segments = [], []
    for a, b in zip(cuts, cuts[1:]):
        ids = []
        for _ in range(PAIRS if b - a > 30 else 3):
            t = a + rng.random() * max(b - a - 1.0, 0)
            ids.append(len(frames))
            frames.append((paint(story, t, 120, 160), paint(story, min(t + 1, b - 1e-3), 120, 160)))
        segments.append((a, b, ids))
    x = torch.from_numpy(np.array(frames)).flatten(0, 1).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, SIZE, mode="bicubic", antialias=True)
    x = x.permute(0, 2, 3, 1).numpy().reshape(len(frames), 2, *SIZE, 3)
    return Painted(story, x, segments)


def tasks(story: Story, seed: int, num: int, rng: np.random.Generator):
    """(task, user text, response)"""
    out = [("caption", "describe the video.", captions(story)), ("list", "list the colours.", ", ".join(e.colour for e in story.events))]
    for q in ask(story, seed, num):
        text = q.text + "".join(f"\n{l}. {o}" for l, o in zip("ABCD", q.options))
        if rng.random() < 0.5:
            out.append(("direct", text + "\nanswer at once.", q.answer))
        else:
            out.append(("explain " + q.category, text + "\nexplain.", q.careful))
    return out


def sub_tasks(events, rng):
    out = [("sub caption", "describe the video.", ", ".join(f"{e.name} {e.place}" for e in events)), ("sub list", "list the colours.", ", ".join(e.colour for e in events))]
    for e in events:
        out.append(("sub where", f"where is the {e.name}?", e.place))
        out.append(("sub where c", f"where is the {e.colour} object?", e.place))
    for a, b in zip(events, events[1:]):
        out.append(("sub after", f"what comes right after the {a.name}?", b.name))
        out.append(("sub before", f"what comes right before the {b.name}?", a.name))
    return out


def run(args):
    torch.set_num_threads(args.threads)
    family = load_family(ModelConfig(path=args.init or "tiny:qwen2_5_vl"), seed=args.seed)
    if not args.init:
        with torch.no_grad():
            family.model.model.visual.merger.mlp[2].weight.mul_(1)
    policy = Policy(family)
    log.info("parameters %d vocab %d", sum(p.numel() for p in family.model.parameters()), len(family.tokenizer))
    rng = np.random.default_rng(args.seed)
    opt = torch.optim.AdamW(family.model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    pool: list[Painted] = []
    stats: dict[str, list[float]] = {}
    start = time.time()
    step = 0
    while step < args.steps and time.time() - start < args.seconds:
        step += 1
        frac = max(step / args.steps, (time.time() - start) / args.seconds)
        lr = args.lr * min(1, step / 100) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * frac)))
        for g in opt.param_groups:
            pass
            g["lr"] = lr
        tokens = 0
        for _ in range(args.stories):
            if len(pool) < args.pool and (len(pool) < 32 or rng.random() < 0.5):
                duration = float(rng.integers(3600, 3781)) if rng.random() < 0.6 else float(int(np.exp(rng.uniform(np.log(120), np.log(3600)))))
                pool.append(paint_story(FIRST_SEED + len(pool), duration, rng))
                item = pool[-1]
            else:
                item = pool[rng.integers(len(pool))]
            story = item.story
            dense = rng.random() < args.dense and frac > args.sparse_until
            low, high = (8, 40) if frac < args.sparse_until else (16, 300)
            V = int(story.duration_s / 2) if dense else int(np.exp(rng.uniform(np.log(low), np.log(high))))
            V = min(V, int(story.duration_s / 2))
            a0, b0, todo = 0.0, story.duration_s, None
            if rng.random() < max(0.1, 1 - frac / args.sub_until):
                k = int(rng.integers(1, 1 + max(1, round(min(1, frac / args.sub_until + 0.15) * len(story.events)))))
                i = int(rng.integers(0, len(story.events) - k + 1))
                part = story.events[i : i + k]
                a0, b0 = part[0].start_s, part[-1].end_s
                V = int(rng.integers(2 * k, 8 * k + 1))
                todo = sub_tasks(part, rng)
            times = a0 + (np.arange(V) + 0.5) * (b0 - a0) / V
            index = np.empty(V, dtype=int)
            for a, b, ids in item.combo_of:
                m = (times >= a) & (times < b)
                index[m] = rng.choice(ids, m.sum())
            used, inverse = np.unique(index, return_inverse=True)
            pixels = item.pixels[used].reshape(-1, *SIZE, 3).astype(np.int16)
            pixels = np.clip(pixels + rng.normal(0, 3, pixels.shape).astype(np.int16), 0, 255).astype(np.uint8)
            embeds, _ = family.encode_frames([Frames(pixels=pixels, timestamps_s=np.zeros(len(pixels)))])
            media = MediaEmbeds(embeds=embeds[torch.from_numpy(inverse)], grid_thw=(V, 2, 2), seconds_per_grid=(b0 - a0) / V,
                                timestamps_s=torch.zeros(2 * V, dtype=torch.float64), key="x")
            clip = Clip(path="x", fps=1.0)
            todo = todo or tasks(story, int(rng.integers(1 << 30)), args.questions, rng)
            prompts = [family.prompt(Example(id="x", messages=(Message(role="user", content=(clip, text)),), answer=None, kind="open"), (media,)) for _, text, _ in todo]
            responses = [family.tokenizer(r, add_special_tokens=False)["input_ids"] + [family.tokenizer.eos_token_id] for _, _, r in todo]
            prefix = policy.prefix(prompts)
            streams = make_streams(prompts, responses, prefix.length)
            def loss(logp, ent, rows):
                for n in range(len(todo)):
                    lp = logp[n][streams.mask[n]].detach()
                    # probability of the whole response, and of the answer letter
                    name = todo[n][0]
                    val = float(lp.mean())
                    stats.setdefault(("D " if V > 900 else "s ") + name, []).append(val)
                return -logp.sum() / 300
            policy.backward(prefix, streams, loss)
            tokens += V
        torch.nn.utils.clip_grad_norm_(family.model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if step % args.log == 0:
            log.info("step %d %.0fs lr %.1e pool %d | %s", step, time.time() - start, lr, len(pool), "  ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(stats.items())))
            stats.clear()
        if step % (args.log * 10) == 0:
            family.save(Path(args.out))
    family.save(Path(args.out))


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--init")
    p.add_argument("--steps", type=int, default=100000)
    p.add_argument("--seconds", type=float, default=600)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--stories", type=int, default=2)
    p.add_argument("--questions", type=int, default=10)
    p.add_argument("--dense", type=float, default=0.25)
    p.add_argument("--sparse-until", type=float, default=0.3)
    p.add_argument("--sub-until", type=float, default=0.3)
    p.add_argument("--pool", type=int, default=4000)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log", type=int, default=50)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(p.parse_args())
