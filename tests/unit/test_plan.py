"""The planner: sizes of models and prompts, layouts, the largest prompt, the change that makes a plan fit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from longrl.config import ModelConfig, RlConfig
from longrl.models import load_family
from longrl.plan.choose import choose_layout, fastest_change, fits, largest_prompt, layouts, smallest_change
from longrl.plan.cost import plan_cost
from longrl.plan.devices import GIB, GPUS, _gpus_here, find_device
from longrl.plan.memory import plan_memory
from longrl.plan.plan import degree_rule, make_plan, max_prompt_tokens
from longrl.plan.prompt import _clip_size
from longrl.plan.shapes import SHAPES, read_shape, shape_of
from longrl.plan.work import Setup, Work
from longrl.types import Clip
from tests.unit.media import render

B3, B7 = (SHAPES[f"Qwen/Qwen2.5-VL-{size}-Instruct"] for size in ("3B", "7B"))
H100, H200 = GPUS["H100"], GPUS["H200"]
HOUR = Work(prompt_tokens=256_000, group_size=8, response_tokens=512, prefixes=8)
BF16 = Setup(weight_bytes=2, compute_bytes=2, recompute="layer", lora_rank=16, lora_targets=tuple(B7.linears))


def config(tmp_path, **keys) -> RlConfig:
    base = {"run_dir": "run", "steps": 1, "model": {"path": "tiny:qwen2_5_vl"}, "data": {"train": None}}
    return RlConfig.model_validate(base | keys)


@pytest.mark.parametrize(
    ("name", "published"),
    [("3B", 3_754_622_976), ("7B", 8_292_166_656), ("32B", 33_452_718_336), ("72B", 73_410_777_344)],
)
def test_table_has_the_published_numbers_of_parameters(name, published):
    shape = SHAPES[f"Qwen/Qwen2.5-VL-{name}-Instruct"]
    assert shape.trunk_parameters + shape.tower_parameters == published


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "vila"])
def test_tiny_shape_is_that_of_its_twin(tmp_path, name):
    twin = load_family(ModelConfig(path=f"tiny:{name}"))
    twin.save(tmp_path)
    shape = SHAPES[f"tiny:{name}"]
    found = shape_of(str(tmp_path))
    assert found is not None
    if name == "vila":  # tokens are what its settings say; pixels are not asked for
        assert found.vision is not None
        assert shape.vision is not None
        found = replace(found, vision=replace(found.vision, image_limits=shape.vision.image_limits))
    assert found == shape == shape_of(f"tiny:{name}@3")
    tower, projector = (sum(p.numel() for p in twin.encoder_parameters(part)) for part in ("tower", "projector"))
    total = sum(p.numel() for p in twin.model.parameters())
    assert shape.trunk_parameters + shape.tower_parameters == total
    assert shape.projector_parameters == projector
    if name != "vila":  # which leaves the layers behind the chosen one out
        assert shape.tower_parameters == tower + projector
    layer = twin.parts().layers[0]
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters())
    products = {name.rpartition(".")[2]: x for name, x in layer.named_modules() if isinstance(x, torch.nn.Linear)}
    assert shape.linears == {name: (x.in_features, x.out_features) for name, x in products.items()}
    if name == "qwen2_5_omni":  # a folder of the whole model
        whole = {"model_type": name, "thinker_config": json.loads((tmp_path / "config.json").read_text())}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        assert shape_of(str(tmp_path)) == shape


def test_shapes_of_folders(tmp_path):
    flat = {"model_type": "qwen3", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    flat |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": True}
    shape = read_shape(flat)
    assert (shape.head_dim, shape.qk_norm, shape.qkv_bias, shape.vision) == (32, True, False, None)
    assert shape.layer_parameters == 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 96 + 2 * 64 + 2 * 32
    assert shape_of("models/Qwen2.5-VL-3B-Instruct") is B3
    assert shape_of("elsewhere") is None
    (tmp_path / "config.json").write_text(json.dumps(flat | {"num_key_value_heads": None}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"config\.json does not say the sizes of a decoder"):
        shape_of(str(tmp_path))


def test_prompt_of_the_data_is_measured_else_bounded(tmp_path):
    render(tmp_path / "long.mp4", [i / 2 for i in range(240)])  # 120 s of 96 x 64 pixels
    render(tmp_path / "short.mp4", [i / 2 for i in range(20)])
    rows = [{"id": str(i), "video": name, "question": "what?" * 9, "answer": "x"} for i, name in
            enumerate(["short.mp4", "long.mp4", "gone.mp4"])]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    path = "models/Qwen2.5-VL-3B-Instruct"
    measured = make_plan(config(tmp_path, model={"path": path}, data={"train": str(data)}), "H200", 1).prompt
    # 60 pairs of frames, each of 2 x 3 tokens of 28 x 28 pixels
    assert (measured.frames, measured.video_tokens) == (120, 60 * 2 * 3)
    assert 45 < measured.text_tokens < 200
    assert "longest of 2 videos" in measured.source
    video = {"fps": None, "num_frames": 3600, "max_pixels": 142 * 784}
    bound = make_plan(config(tmp_path, model={"path": path}, video=video), "H200", 1).prompt
    assert (bound.frames, bound.video_tokens) == (3600, 1800 * 142)
    assert bound.source.endswith("the data are not there")
    wide = make_plan(config(tmp_path, model={"path": path}, video={"fps": 1.0}), "H200", 1).prompt
    assert wide.source.endswith("of one hour; video.max_pixels is null, so frames are as large as the model takes")
    often = {"fps": 4.0, "max_pixels": 784}  # of files with 2 frames a second
    often = make_plan(config(tmp_path, model={"path": path}, data={"train": str(data)}, video=often), "H200", 1).prompt
    assert (often.frames, often.source.rpartition("; ")[2]) == (
        479,
        "239 of its frames are repeated ones, as it has fewer",
    )


def test_clips_are_sized_as_they_are_encoded(tmp_path):
    path, image = str(render(tmp_path / "video.mp4")), str(tmp_path / "image.png")
    Image.new("RGB", (301, 97)).save(image)
    clips = [
        Clip(path=path, fps=1.7, start_s=0.55, end_s=2.4),
        Clip(path=path, num_frames=9, max_pixels=12 * 28 * 28),
        Clip(path=image, kind="image"),
    ]
    sound = str(render(tmp_path / "sound.mp4", sound=np.zeros(5 * 16000, np.float32)))
    heard = Clip(path=sound, kind="audio", start_s=1.0, end_s=3.5)
    for name in ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni"):
        family = load_family(ModelConfig(path=f"tiny:{name}"))
        family.save(tmp_path / name)
        shape = shape_of(str(tmp_path / name))
        assert shape
        assert shape.vision
        for clip in [*clips, *([heard] if shape.audio else [])]:
            size, (frames, seen, beside, again) = family.measure(clip), _clip_size(clip, shape.vision)
            if clip.kind == "audio":
                assert (frames, seen, beside, again) == (0, 0, size.num_tokens + 1, 0)  # a half is counted
                continue
            assert (frames, seen, again) == (size.num_frames, size.num_tokens, 0)
            times = size.prompt_tokens - size.num_tokens
            assert times <= beside <= 1.4 * times


def test_rows_of_text_are_read_for_models_of_text(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"id": "1", "question": "why? " * 400, "answer": "x"}))
    prompt = make_plan(config(tmp_path, model={"path": "tiny:qwen3"}, data={"train": str(data)}), "H200", 1).prompt
    assert prompt.video_tokens == 0
    assert 2000 <= prompt.text_tokens < 2200
    assert "questions" in prompt.source


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "vila"])
def test_every_family_has_a_plan(tmp_path, name):
    """Its encoder too, where it has one."""
    model: dict = {"path": f"tiny:{name}"}
    frozen = make_plan(config(tmp_path, model=model), "H200", 1)
    assert frozen.memory.peak_bytes > 0
    if SHAPES[f"tiny:{name}"].vision:
        model["train"] = ["language", "projector", "tower"]
        learns = make_plan(config(tmp_path, model=model), "H200", 1)
        assert learns.memory.phases["encoder"]["encoder"] > 0
        assert learns.memory.parts["gradients"] > frozen.memory.parts["gradients"]


def test_layouts_are_those_that_processes_and_heads_allow():
    assert layouts(B7, 8) == [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8)]
    assert {u for u, _ in layouts(B3, 6)} == {1, 2, 6}  # 2 KV heads: not 3


@pytest.mark.parametrize(
    ("tokens", "device", "processes", "expected"),
    [
        (8_000, H100, 8, (1, 1)),
        (256_000, H200, 8, (2, 1)),
        (256_000, H100, 8, (4, 1)),
        (1_000_000, H200, 16, (4, 2)),  # (8, 1) fits too, but pads 7 query heads to 8
        (16_000_000, H100, 16, None),
    ],
)
def test_layout_is_the_cheapest_that_fits(tokens, device, processes, expected):
    work = replace(HOUR, prompt_tokens=tokens)
    assert choose_layout(B7, work, BF16, device, processes) == expected
    seconds = {}
    for ulysses, ring in layouts(B7, processes):
        setup = replace(BF16, ulysses=ulysses, ring=ring)
        if fits(B7, work, setup, device):
            seconds[ulysses, ring] = setup.sp * plan_cost(B7, work, setup, device).total_s
    if expected is None:
        assert not seconds
    else:
        assert expected == (1, 1) or seconds[expected] <= min(seconds.values()) / 0.95
        assert all(ulysses * ring >= expected[0] * expected[1] for ulysses, ring in seconds)


def test_ring_serves_where_repeated_keys_do_not_fit():
    work, setup = replace(HOUR, prompt_tokens=3_000_000), replace(BF16, recompute="layer", offload=True)
    assert not fits(B3, work, replace(setup, ulysses=16), H100)  # 2 KV heads are 16: each rank has all positions
    assert fits(B3, work, replace(setup, ulysses=2, ring=8), H100)


@pytest.mark.parametrize("shape", [B3, B7], ids=["3B", "7B"])
@pytest.mark.parametrize("setup", [BF16, replace(BF16, ulysses=8, offload=True, mlp_tile_tokens=4096)])
def test_largest_prompt_is_the_last_that_fits(shape, setup):
    tokens = largest_prompt(shape, HOUR, setup, H200)
    assert 50_000 < tokens < 5_000_000
    assert fits(shape, replace(HOUR, prompt_tokens=tokens), setup, H200)
    assert not fits(shape, replace(HOUR, prompt_tokens=tokens + 1), setup, H200)


def test_largest_prompt_of_a_configuration(tmp_path):
    keys = {"model": {"path": "models/Qwen2.5-VL-3B-Instruct"}, "rollout": {"max_new_tokens": 256}}
    small = config(tmp_path, **keys)
    assert max_prompt_tokens(small, 1, 8 * GIB) == 0  # weights and optimizer alone are more
    lean = config(tmp_path, memory={"recompute": "layer", "mlp_tile_tokens": 4096}, **keys)
    assert 0 < max_prompt_tokens(small, 1, 139 * GIB) < max_prompt_tokens(lean, 1, 139 * GIB)
    most = max_prompt_tokens(config(tmp_path, parallel={"sp": "auto"}, **keys), 8, 139 * GIB)
    assert most > 4 * max_prompt_tokens(small, 8, 139 * GIB)
    assert max_prompt_tokens(config(tmp_path, model={"path": "nowhere"}), 1, GIB) is None
    beside = config(tmp_path, **keys | {"model": keys["model"] | {"device": "cpu"}})  # a GPU that it does not use
    assert max_prompt_tokens(beside, 1, 80 * GIB, 64 * GIB) == max_prompt_tokens(beside, 1, None, 64 * GIB)
    assert max_prompt_tokens(beside, 1, None, 64 * GIB) < max_prompt_tokens(beside, 1, None, 128 * GIB)


def test_degree_grows_with_the_prompt(tmp_path):
    path = "models/Qwen2.5-VL-3B-Instruct"
    lean = {"recompute": "layer", "offload": True, "mlp_tile_tokens": 4096}
    degree = degree_rule(config(tmp_path, model={"path": path}, memory=lean, parallel={"sp": "auto"}), 8, 80 * GIB)
    degrees = [degree(tokens) for tokens in (1, 4_000, 64_000, 256_000)]
    shared_by = [heads * ring for heads, ring in degrees]
    assert degrees[:2] == [(1, 1), (1, 1)]
    assert shared_by == sorted(shared_by)
    assert shared_by[-1] > 1
    with pytest.raises(ValueError, match="a prompt of 10000000 tokens fits no layout of 8 processes") as refusal:
        degree(10_000_000)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("device", "processes"), [(H200, 1), (H200, 8), (H100, 8)])
def test_change_makes_it_fit_and_no_part_of_it_can_be_left_out(device, processes):
    setup = replace(BF16, recompute="none")
    assert not fits(B7, HOUR, setup, device)
    found = smallest_change(B7, HOUR, setup, device, processes)
    assert found is not None
    keys, work, other = found
    assert work == HOUR  # the same frames
    assert other.lora_rank == setup.lora_rank
    assert fits(B7, HOUR, other, device)
    fields = {"memory.recompute": "recompute", "memory.offload": "offload", "memory.mlp_tile_tokens": "mlp_tile_tokens"}
    for key in keys:
        names = ["ulysses", "ring", "sharded"] if key.startswith("parallel") else [fields[key]]
        without = replace(other, **{name: getattr(setup, name) for name in names})
        if not (without.offload and without.recompute == "none"):
            assert not fits(B7, HOUR, without, device), key


def test_fewer_frames_are_offered_last_and_nothing_where_nothing_helps():
    found = smallest_change(B7, replace(HOUR, prompt_tokens=1_000_000), BF16, H200, 1)
    assert found is not None
    assert found[0]["processes"] == "4"  # what changes no result comes first
    assert "frames" not in found[0]
    found = smallest_change(B7, replace(HOUR, prompt_tokens=4_000_000), BF16, H200, 1)
    assert found is not None
    assert "frames" in found[0]
    vast = replace(HOUR, prompt_tokens=80_000_000)
    assert smallest_change(SHAPES["Qwen/Qwen2.5-VL-72B-Instruct"], vast, BF16, H100, 1) is None


def test_memory_does_not_depend_on_how_many_prompts_or_rollouts():
    peak = plan_memory(B7, HOUR, BF16, H200).peak_bytes
    assert plan_memory(B7, replace(HOUR, prefixes=64), BF16, H200).peak_bytes == peak
    assert plan_memory(B7, replace(HOUR, group_size=16), BF16, H200).peak_bytes == pytest.approx(peak, rel=0.15)


def test_layouts_divide_what_a_prompt_takes():
    one = plan_memory(B3, HOUR, BF16, H200).phases["prefill"]
    for ulysses, ring, kv in ((2, 1, 2), (8, 1, 2), (2, 4, 8), (1, 8, 8)):
        setup = replace(BF16, ulysses=ulysses, ring=ring)
        parts = plan_memory(B3, HOUR, setup, H200).phases["prefill"]
        assert parts["layer inputs"] == pytest.approx(one["layer inputs"] / setup.sp, rel=1e-3)
        assert parts["prefix KV"] == pytest.approx(one["prefix KV"] / kv, rel=1e-3)  # with 2 KV heads, 8 have 1 each
        assert parts["weights"] == one["weights"]
    shared = plan_memory(B3, HOUR, replace(BF16, ulysses=8, sharded=True, lora_rank=0), H200)
    whole = plan_memory(B3, HOUR, replace(BF16, ulysses=8, lora_rank=0), H200)
    assert shared.parts["optimizer"] == pytest.approx(whole.parts["optimizer"] / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("recompute", "reference", "expected"),
    [("none", False, 3), ("layer", False, 4), ("none", True, 4), ("layer", True, 5)],
)
def test_passes_are_those_of_the_design(recompute, reference, expected):
    setup, work = replace(BF16, recompute=recompute), replace(HOUR, reference=reference)
    assert plan_cost(B7, work, setup, H200).passes == expected
    kept = plan_cost(B7, work, replace(setup, recompute="keep_attention"), H200).passes
    assert 3 + reference < kept < 3.3 + reference  # at this length attention is most of the work


def test_updates_repeat_the_passes_and_prompts_in_flight_the_keys_and_values():
    none = replace(BF16, recompute="none")
    assert plan_cost(B7, replace(HOUR, updates=2), none, H200).passes == 6
    assert plan_cost(B7, replace(HOUR, updates=2), BF16, H200).passes == 8
    one, three = (plan_memory(B7, HOUR, replace(BF16, prompts_in_flight=n), H200).parts for n in (1, 3))
    for part, size in one.items():
        assert three[part] == (3 * size if part in ("prefix KV", "layer inputs") else size)


def test_decoding_side_by_side_reads_the_weights_once_for_all():
    """Of short prompts, whose keys and values are little beside the weights; never of more than there are."""
    work, device = replace(HOUR, prompt_tokens=1000), replace(H200, launch_s=0.0)
    alone, eight, more = (
        plan_cost(B7, work, replace(BF16, prompts_in_flight=n), device).seconds["decode"] for n in (1, 8, 80)
    )
    assert alone / 8 < eight == more < 1.2 * alone / 8


def test_the_last_change_is_one_prompt_in_flight_where_that_is_what_is_too_much():
    lean = replace(BF16, recompute="layer", offload=True, mlp_tile_tokens=4096)
    found = smallest_change(B7, HOUR, replace(lean, prompts_in_flight=8), H200, 1)
    assert found is not None
    assert found[0] == {"rollout.prompts_in_flight": "1"}
    assert found[2] == lean


def test_what_is_faster_is_offered_if_it_fits_and_is_clearly_so():
    short, lean = replace(HOUR, prompt_tokens=4000), replace(BF16, offload=True, mlp_tile_tokens=4096)
    found = fastest_change(B7, short, BF16, H200, 1)
    assert found is not None
    keys, other = found
    assert keys == {"rollout.prompts_in_flight": "8"}  # decoding is most of it
    assert fits(B7, short, other, H200)
    seconds = [plan_cost(B7, short, setup, H200).total_s for setup in (BF16, other)]
    assert seconds[1] < 0.9 * seconds[0]
    assert fastest_change(B7, short, other, H200, 1) is None
    # where nothing is decoded, what the backward need not compute again
    found = fastest_change(B7, replace(short, rollout=False), BF16, H200, 1)
    assert found is not None
    assert found[0] == {"memory.recompute": "none"}
    # what would be faster for an hour has no room
    assert plan_cost(B7, HOUR, BF16, H200).total_s > plan_cost(B7, HOUR, replace(BF16, recompute="none"), H200).total_s
    assert fastest_change(B7, HOUR, lean, H200, 1) is None


def test_host_memory_decides_where_it_is_known(tmp_path):
    lean = replace(BF16, offload=True, mlp_tile_tokens=4096)
    needs = plan_memory(B7, HOUR, lean, H200).host_bytes
    assert needs > 40 * GIB
    little, enough = (replace(H200, host_bytes=int(share * needs)) for share in (1.05, 1.2))
    assert [fits(B7, HOUR, lean, device) for device in (H200, little, enough)] == [True, False, True]
    found = smallest_change(B7, HOUR, lean, little, 1)
    assert found is not None
    assert (found[0]["memory.offload"], found[2].offload) == ("false", False)
    assert fits(B7, *found[1:], little)
    keys = {"model": {"path": "models/Qwen2.5-VL-7B-Instruct", "dtype": "bfloat16", "lora": {}}}
    offloaded = config(tmp_path, memory={"recompute": "layer", "offload": True, "mlp_tile_tokens": 4096}, **keys)
    most = [max_prompt_tokens(offloaded, 1, 139 * GIB, host) for host in (None, 200 * GIB, 20 * GIB)]
    assert most[0] == most[1] > 3 * most[2] > 0


def test_pinned_memory_is_counted_as_pytorch_takes_it():
    """In powers of two: an input of 1.7 GiB takes 2, as often as there are layers; on the CPU nothing is pinned."""
    lean = replace(BF16, offload=True)
    assert plan_memory(B7, HOUR, lean, H200).host == {"layer inputs": 28 * 2 * GIB}
    assert plan_memory(B7, HOUR, lean, find_device("CPU")).host == {"layer inputs": 28 * 256_000 * 3584 * 2}
    away = replace(lean, lora_rank=0, offload_reference=True)
    for device, most in ((H200, 2.0), (find_device("CPU"), 1.0)):
        taken = plan_memory(B7, replace(HOUR, reference=True), away, device).host["reference weights"]
        assert 0.999 * most**0.5 < taken / (2 * (B7.trunk_parameters + B7.tower_parameters)) <= most


def test_a_gpu_of_this_machine_has_a_known_host(tmp_path):
    assert _gpus_here("H200", tmp_path) == 0
    for number, model in enumerate(["NVIDIA H200", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    assert [_gpus_here(name, tmp_path) for name in GPUS] == [1, 0, 2]


def test_an_encoder_that_learns_takes_a_phase_of_its_own(tmp_path):
    keys = {"model": {"path": "models/Qwen2.5-VL-3B-Instruct"}, "video": {"fps": None, "num_frames": 256}}
    frozen = make_plan(config(tmp_path, **keys), "H200", 1)
    keys["model"]["train"] = ["language", "projector", "tower"]
    learns = make_plan(config(tmp_path, **keys), "H200", 1)
    new = learns.memory.phases.keys() - frozen.memory.phases.keys()
    assert new == learns.cost.seconds.keys() - frozen.cost.seconds.keys() == {"encoder"}
    rounds = learns.work.prefixes
    assert learns.cost.seconds["encoder"] == pytest.approx(3 * rounds * learns.encode_s)
    assert learns.memory.phases["encoder"]["encoder"] > GIB
    leaves = learns.prompt.tokens * 4 * B3.width
    assert learns.memory.phases["prefill"]["media embeddings"] == leaves


def test_a_device_in_small_letters():
    assert find_device("h100").name == "H100"
    assert find_device("cpu").is_cpu


def test_unknown_device():
    with pytest.raises(ValueError, match="no device 'B200'; known: A100-80G, H100, H200, CPU"):
        find_device("B200")
