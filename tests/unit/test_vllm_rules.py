"""What vLLM is refused for, which releases of it, when it is chosen, and what it is asked: without vLLM."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longrl.config import RlConfig
from longrl.models import load_family
from longrl.models.qwen_vl import Qwen25VL
from longrl.models.vila import Vila
from longrl.parallel.ranks import ALONE, Ranks
from longrl.parallel.shard import each_whole
from longrl.plan.plan import max_prompt_tokens
from longrl.plan.shapes import shape_of
from longrl.policy import Policy
from longrl.rollout import vllm_rules
from longrl.rollout.engine import settle_engine
from longrl.rollout.vllm_core import _drawn
from longrl.rollout.vllm_inputs import media_items, media_rows
from longrl.rollout.vllm_rules import (
    choose_engine,
    lora_room,
    max_model_len,
    refusal,
    require_media_room,
    require_room,
    require_version,
)
from longrl.rollout.vllm_weights import decoder_weights, save_adapters
from longrl.train_rl import train_rl
from tests.parity.test_shared_prefix import make_prompts


def config(engine: str = "vllm", path: str = "tiny:qwen2", **changes: Any) -> RlConfig:
    rollout = {"engine": engine, **changes.pop("rollout", {})}
    given = {"run_dir": "run", "model": {"path": path}, "steps": 1, "prompts_per_step": 4, "rollout": rollout}
    return RlConfig.model_validate(given | changes)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cu130", "0.32.0rc1"])
def test_releases_that_are_tested_are_taken(found):
    require_version(found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "vLLM is not installed"),
        ("0.17.1", "vLLM is 0.17.1"),
        ("0.31.9", "vLLM is 0.31.9"),
        ("0.33.0", "vLLM is 0.33.0"),
        ("1.0", "vLLM is 1.0"),
    ],
)
def test_other_releases_are_refused_with_what_to_install(found, message):
    with pytest.raises(
        RuntimeError, match=rf"{message}, expected at least 0\.32 .* 0\.33: pip install 'longrl\[vllm\]'"
    ):
        require_version(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "tiny:qwen2_5_omni"}, "the model hears"),
        ({"parallel": {"sp": "auto"}}, "parallel.sp is auto"),
        ({"model": {"path": "tiny:qwen2", "dtype": "float64"}}, "model.dtype is float64"),
        ({"model": {"path": "tiny:qwen2", "lora": {"rank": 513}}}, "model.lora.rank is 513, expected at most 512"),
        (
            {"rollout": {"max_new_tokens": 9, "vllm": {"max_model_len": 9}}},
            "rollout.vllm.max_model_len is 9, expected m",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_and_left_to_the_built_in_engine(changes, message, monkeypatch):
    monkeypatch.setattr(vllm_rules, "installed", lambda: "0.32.0")
    with pytest.raises(ValueError, match=f"rollout.engine is vllm, but {message}"):
        choose_engine(config(**changes), 1)
    name, why = choose_engine(config("auto", **changes), 1)
    assert name == "native"
    assert message in why


def test_a_run_that_vllm_cannot_serve_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_rules, "installed", lambda: None)
    for path, message in (("tiny:qwen2", "vLLM is not installed"), ("tiny:qwen2_5_omni", "the model hears")):
        with pytest.raises((RuntimeError, ValueError), match=message):
            train_rl(config(path=path, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_rule_takes_vllm_for_short_prompts_and_many_turns(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    found = {}
    for version in ("0.32.0", None):
        monkeypatch.setattr(vllm_rules, "installed", lambda version=version: version)
        for words, in_flight in ((10, 1), (10, 2), (5000, 1)):
            rows.write_text(json.dumps({"problem": "one " * words, "answer": "1"}) + "\n")
            cfg = config("auto", data={"train": str(rows)}, rollout={"prompts_in_flight": in_flight})
            found[version, words, in_flight] = choose_engine(cfg, 1)
    assert [name for name, _ in found.values()] == ["vllm", "native", "native", "native", "native", "native"]
    assert "vllm up to 1,024 prompt tokens and from 4 turns of the built-in" in found["0.32.0", 10, 2][1]
    assert "vLLM is not installed" in found[None, 10, 1][1]
    assert choose_engine(config("native"), 1)[0] == "native"


def test_auto_is_settled_by_the_main_rank_and_rows_are_not_read_again(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "one", "answer": "1"}) + "\n")
    monkeypatch.setattr(vllm_rules, "installed", lambda: "0.32.0")
    asked = config("auto", data={"train": str(rows)})

    class NotMain(Ranks):
        def from_main(self, make, *args, **kwargs):
            return "native", "as the main rank says"

    assert settle_engine(asked, ALONE).rollout.engine == "vllm"
    assert settle_engine(asked, NotMain()).rollout.engine == "native"
    settled = settle_engine(asked, ALONE)
    rows.unlink()
    assert settle_engine(settled, ALONE) is settled
    assert max_prompt_tokens(settled, 1, None)
    assert asked.rollout.engine == "auto"


def test_groups_of_processes_divide_the_turns(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "one", "answer": "1"}) + "\n")
    monkeypatch.setattr(vllm_rules, "installed", lambda: "0.32.0")
    for sp, processes, turns, name in ((1, 1, 4, "vllm"), (1, 2, 2, "native"), (2, 2, 4, "vllm"), (2, 8, 1, "native")):
        cfg = config("auto", data={"train": str(rows)}, parallel={"sp": sp})
        found, why = choose_engine(cfg, processes)
        assert found == name
        assert why.endswith(f" and {turns}")


def test_room_is_computed_or_refused_with_arithmetic():
    assert max_model_len(config()) == -1
    bounded = {"data": {"max_prompt_tokens": 1000}, "rollout": {"max_new_tokens": 24}}
    assert max_model_len(config(**bounded)) == 1024
    bounded["rollout"]["vllm"] = {"max_model_len": 99}
    assert max_model_len(config(**bounded)) == 99
    require_room("q", 75, 24, 99)
    with pytest.raises(
        ValueError, match=r"example q: 76 prompt tokens \+ 24 new ones .* = 100, but vLLM has room for 99"
    ):
        require_room("q", 76, 24, 99)


def test_a_clip_for_which_there_is_no_room_is_refused():
    require_media_room("q", [5, 9], 9)
    require_media_room("q", [5, 9], 0)  # VILA's stand in the prompt
    require_media_room("q", [], 9)
    with pytest.raises(
        ValueError, match=r"example q: a clip of 10 embeddings, but vLLM has room for 9; set data.max_p"
    ):
        require_media_room("q", [5, 10], 9)


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_a_response_that_vllm_gave_up_is_not_taken_for_a_short_one(reason):
    output = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-0.5)}], finish_reason="length")
    assert _drawn(output, 3).logprobs == (-0.5,)
    output.finish_reason = reason
    with pytest.raises(RuntimeError, match=f"vLLM gave a response up after 1 tokens: {reason}"):
        _drawn(output, 3)


def test_adapters_get_the_least_room_that_holds_them():
    assert [lora_room(rank) for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]


def test_only_the_model_that_hears_is_refused():
    names = ("qwen2", "qwen3", "vila", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni")
    refused = [name for name in names if refusal(config(path=f"tiny:{name}"), shape_of(f"tiny:{name}"))]
    assert refused == ["qwen2_5_omni"]


def test_media_stand_where_their_placeholders_are():
    [prompt] = make_prompts(Qwen25VL.tiny(0, torch.float32), 24, ["what comes first?"])
    [item] = media_items(prompt, "qwen2_5_vl")
    [media], [[(start, end)]] = prompt.media, prompt.media_slots
    assert (item.modality, item.offset, item.key) == ("video", start, media.key)
    assert item.is_embed.tolist() == [True] * (end - start)
    assert torch.equal(item.fields["video_embeds"], media.embeds)
    assert item.fields["video_grid_thw"].tolist() == list(media.grid_thw)
    assert item.fields["second_per_grid_ts"].item() == media.seconds_per_grid


def test_frames_with_text_between_begin_at_the_mark_before_the_first():
    """Their deepstack features stand beside them."""
    family = load_family(config(path="tiny:qwen3_vl").model)
    embeds = torch.randn(3, 128)
    [prompt] = make_prompts(Qwen25VL.tiny(0, torch.float32), 3, ["what?"])
    [media] = prompt.media
    media = type(media)(
        embeds=embeds,
        grid_thw=(3, 2, 2),
        seconds_per_grid=2.0,
        timestamps_s=torch.arange(6.0, dtype=torch.float64),
        key="k",
        deepstack=torch.stack([embeds + 1, embeds + 2]),
    )
    from longrl.types import Clip, Example, Message

    clip = Clip(path="v.mp4", fps=1.0)
    example = Example(id="q", messages=(Message(role="user", content=(clip, "what?")),), answer=None, kind="open")
    prompt = family.prompt(example, (media,))
    [item] = media_items(prompt, "qwen3_vl")
    first = prompt.media_slots[0][0][0]
    assert item.offset == first - 1
    assert int(prompt.token_ids[item.offset]) == family.model.config.vision_start_token_id
    there = item.offset + item.is_embed.nonzero()[:, 0]
    assert torch.equal(there, prompt.slot(0))
    assert torch.equal(item.fields["video_embeds"], torch.cat([embeds, embeds + 1, embeds + 2], -1))


def test_rows_fill_placeholders_and_the_model_looks_up_the_rest():
    [prompt] = make_prompts(Qwen25VL.tiny(0, torch.float32), 24, ["what comes first?"])
    rows, is_token = media_rows(prompt, 128, torch.bfloat16)
    where = prompt.slot(0)
    assert torch.equal(rows[where], prompt.media[0].embeds.bfloat16())
    assert set((~is_token).nonzero()[:, 0].tolist()) == set(where.tolist())
    assert not rows[is_token].any()


def test_weights_are_the_decoders_under_hugging_face_names():
    for family, first in ((Vila.tiny(0, torch.float32), "model."), (Qwen25VL.tiny(0, torch.float32), "model.language")):
        given = dict(decoder_weights(Policy(family)))
        head = given.pop("lm_head.weight")  # which is the embedding
        assert all(name.startswith(first) for name in given)
        assert len(given) == len(list(Policy(family).trunk.parameters()))
        assert any(head.data_ptr() == x.data_ptr() for x in given.values())
        assert all(x.requires_grad is False for x in given.values())


def test_adapters_leave_their_base_its_names_and_go_by_themselves(tmp_path):
    from safetensors.torch import load_file

    lora = {"model": {"path": "tiny:vila", "lora": {"rank": 4, "targets": ["q_proj"]}}}
    policy = Policy(load_family(config(**lora).model))
    names = [name for name, _ in decoder_weights(policy)]
    plain = [name for name, _ in decoder_weights(Policy(load_family(config(path="tiny:vila").model)))]
    assert sorted(names) == sorted(plain)
    save_adapters(policy, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
        for layer in range(4)
        for part in "AB"
    }


def test_tied_weights_are_handed_over_once():
    x = torch.ones(2)
    assert [name for name, _ in each_whole({"a": x, "b": x, "c": torch.ones(2)})] == ["a", "c"]


def test_the_folder_it_starts_from_has_no_weights(tmp_path):
    for family, architecture in (
        (Vila.tiny(0, torch.float32), "Qwen2ForCausalLM"),
        (Qwen25VL.tiny(0, torch.float32), "Qwen2_5_VLForConditionalGeneration"),
    ):
        folder = tmp_path / family.model_type
        family.describe(folder)
        content = json.loads((folder / "config.json").read_text())
        assert content["architectures"] == [architecture]
        assert not list(folder.glob("*.safetensors"))
        assert (folder / "tokenizer.json").exists()
