"""Our VILA beside NVlabs' own code, on the same tiny random checkpoints: names, shapes, embeddings, log-probs.

Two steps, because their code wants an old transformers:

    python benchmarks/vila_reference.py write DIR              here: checkpoints, media, and what we make of them
    OTHER/python benchmarks/vila_reference.py compare DIR CODE

CODE is a checkout of github.com/NVlabs/VILA; OTHER an environment with torch, transformers 4.46.3, accelerate, einops,
pillow and safetensors. Their modules are imported, nothing of them is here. Kept from them: half precision, CUDA, and
reading video files (both sides get the same frames).
"""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

BOUND = 1e-5
TSP = '{"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}'
TEXT = "What comes first?"
CASES = {
    "lite": {"kind": "mlp_downsample_3x3_fix", "media": ["image", "other", "video"]},
    "gelu": {"kind": "mlp2x_gelu", "media": ["video", "image"], "mm_vision_select_layer": -1},
    "linear": {"kind": "linear", "media": ["image"], "mm_vision_select_layer": 1},
    "dynamic": {"kind": "mlp_downsample", "media": ["image"], "image_aspect_ratio": "dynamic", "max_tiles": 6},
    "dynamic-video": {"kind": "mlp_downsample_2x2_fix", "media": ["video"], "image_aspect_ratio": "dynamic"},
    "s2": {
        "kind": "mlp_downsample_2x2_fix",
        "media": ["image"],
        "image_aspect_ratio": "dynamic_s2",
        "dynamic_s2": True,
        "s2_scales": "56,112,168",
        "s2_resize_output_to_scale_idx": -1,
    },
    "s2-small": {
        "kind": "mlp_downsample_3x3_s2",
        "media": ["image"],
        "image_aspect_ratio": "dynamic_s2",
        "dynamic_s2": True,
        "s2_scales": "56,112",
    },
    "s2-video": {
        "kind": "mlp_downsample_3x3_s2_new",
        "media": ["video"],
        "image_aspect_ratio": "dynamic_s2",
        "dynamic_s2": True,
        "s2_scales": "56,112",
    },
    "tsp": {"kind": "mlp_downsample_2x2_fix", "media": ["video"], "video_encoder": TSP},
    "published": {"kind": "mlp_downsample", "media": ["image", "video"], "rows": 512},
}
"""rows: embeddings of the body, of fewer tokens than the tokenizer knows, as in what NVlabs published. Their code adds
some for the others as it loads; log-probs are compared over ours."""
KINDS = (
    *("linear", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample", "mlp_downsample_2x2_fix"),
    *("mlp_downsample_3x3_fix", "mlp_downsample_3x3_s2", "mlp_downsample_3x3_s2_new", "identity"),
)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in sorted(state.items())}


# ---- ours


def write(folder: Path) -> None:
    from longrl.models.vila_projector import Projector, ProjectorConfig

    folder.mkdir(parents=True)
    kinds = {
        kind: shapes(Projector(ProjectorConfig(kind, 24, 24 if kind == "identity" else 32)).state_dict())
        for kind in KINDS
    }
    (folder / "projectors.json").write_text(json.dumps(kinds))
    rng = np.random.default_rng(0)
    pictures = {"image": (100, 230), "other": (61, 47)}
    for name, size in pictures.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    np.save(folder / "video.npy", rng.integers(0, 256, (16, 90, 120, 3), dtype=np.uint8))
    with torch.no_grad():
        for name, case in CASES.items():
            write_case(folder, name, dict(case))


def write_case(folder: Path, name: str, case: dict) -> None:
    from longrl.models.streams import make_streams
    from longrl.models.vila import Vila, tiny_content, tiny_tokenizer
    from longrl.policy import Policy
    from longrl.types import Clip, Example, Frames, Message

    tokenizer = tiny_tokenizer()
    content = tiny_content(tokenizer) | case
    content["mm_projector_cfg"] = {"model_type": "v2l_projector", "mm_projector_type": content.pop("kind")}
    content["vision_tower_cfg"] |= {"image_size": 56, "hidden_size": 48}
    content["llm_cfg"] |= {"vocab_size": content.pop("rows", len(tokenizer))}
    family = Vila.make(content, tokenizer, 0, torch.float32)
    family.save(folder / name)
    # a name that transformers had not given it yet
    about = folder / name / "llm" / "tokenizer_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))

    clips, media = [], []
    for one in content.pop("media"):
        if one == "video":
            frames = Frames(pixels=np.load(folder / "video.npy"), timestamps_s=np.arange(16, dtype=np.float64))
            clips.append(Clip(path="video", fps=1.0))
            media.append(family.encode_frames([frames]))
        else:
            clips.append(Clip(path=str(folder / f"{one}.png"), kind="image"))
            media += family.encode(clips[-1])
    message = Message(role="user", content=(*clips, TEXT))
    prompt = family.prompt(Example(id=name, messages=(message,), answer=None, kind="open"), tuple(media))
    policy, response = Policy(family), tokenizer.encode("<answer>B</answer><|im_end|>")
    embeds, _ = policy.trunk._embed(prompt, [slice(0, len(prompt))])
    prefix = policy.prefix([prompt])
    logprobs, _ = policy.logprobs(prefix, make_streams([prompt], [response], prefix.length))
    seen = {"embeds": embeds, "logprobs": logprobs[logprobs != 0], "response": torch.tensor(response)}
    save_file(seen, folder / name / "ours.safetensors")


# ---- theirs


def their_modules(code: Path):
    """Their package for the hub, without what it imports for other purposes than to run the model."""
    import transformers  # before it finds what is not there

    for name in ("torchvision", "cv2", "s2wrapper"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["s2wrapper"].forward = None  # pyright: ignore
    for name, where in (("llava", "llava"), ("llava.model", "llava/model")):
        package = sys.modules.setdefault(name, types.ModuleType(name))
        package.__path__ = [str(code / where)]
    torch.Tensor.half = torch.Tensor.cuda = lambda self, *args, **kwargs: self  # pyright: ignore
    tower, read = transformers.SiglipVisionModel, transformers.SiglipVisionModel.from_pretrained.__func__
    tower.from_pretrained = classmethod(  # pyright: ignore
        lambda cls, path, attn_implementation=None, **kwargs: read(cls, path, attn_implementation="sdpa", **kwargs)
    )
    from llava.model.encoders.video.tsp import TSPVideoEncoder  # pyright: ignore
    from llava.remote_code import auto_processor, base_projector, media, modeling_vila  # pyright: ignore

    return modeling_vila, base_projector, auto_processor, media, TSPVideoEncoder


def their_function(source: Path, name: str, inside: types.ModuleType):
    """One function of a file that cannot be imported whole; inside: where it finds what it uses."""
    found = [x for x in ast.walk(ast.parse(source.read_text())) if isinstance(x, ast.FunctionDef) and x.name == name]
    found[0].decorator_list = []
    names = dict(vars(inside))
    exec(compile(ast.Module(found[:1], []), str(source), "exec"), names)
    return names[name]


def compare(folder: Path, code: Path) -> bool:
    modeling, projectors, processing, media, tsp = their_modules(code)
    frames = [Image.fromarray(frame) for frame in np.load(folder / "video.npy")]
    media._extract_video = lambda video, config: frames

    class InFull(modeling.VILAForCausalLM):
        def post_config(self) -> None:
            self.eval()

    # which their package for the hub calls, but does not have
    for missing in ("merge_chessboard", "split_chessboard"):
        setattr(InFull, missing, staticmethod(their_function(code / "llava/model/llava_arch.py", missing, modeling)))

    good = True
    for kind, ours in json.loads((folder / "projectors.json").read_text()).items():
        config = types.SimpleNamespace(mm_hidden_size=24, hidden_size=32)
        built = projectors.MultimodalProjector(projectors.MultimodalProjectorConfig(kind), config)
        good &= report(f"projector {kind}: names and shapes", shapes(built.state_dict()) == ours)
    for name, case in CASES.items():
        root = str(folder / name)
        config = modeling.VILAConfig.from_pretrained(root)
        config.resume_path = config._name_or_path = root
        model = InFull(config, device_map="cpu")
        if "video_encoder" in case:
            model.encoders["video"] = tsp(model, json.loads(case["video_encoder"])["pool_sizes"])
        for part, module in (
            ("llm", model.llm),
            ("vision_tower", model.vision_tower.vision_tower),
            ("mm_projector", model.mm_projector),
        ):
            ours, theirs = load_file(folder / name / part / "model.safetensors"), dict(module.state_dict())
            if part == "llm":
                theirs.pop("lm_head.weight")  # tied: once in a file
                theirs["model.embed_tokens.weight"] = theirs["model.embed_tokens.weight"][: case.get("rows")]
            same = shapes(theirs) == shapes(ours) and all(torch.equal(ours[key], theirs[key]) for key in ours)
            good &= report(f"{name}: {part}: names, shapes and values", same)
        good &= compare_case(name, case, folder, model, config, processing, media)
    return good


@torch.no_grad()
def compare_case(name, case, folder, model, config, processing, media) -> bool:
    ours = load_file(folder / name / "ours.safetensors")
    parts = [media.Video("video") if one == "video" else Image.open(folder / f"{one}.png") for one in case["media"]]
    processor = processing.VILAProcessor(
        image_processor=model.vision_tower.image_processor, tokenizer=model.tokenizer, config=config
    )
    inputs = processor([[{"from": "human", "value": [*parts, TEXT]}]])
    embeds, _, _ = model._embed(inputs.input_ids, inputs.media, inputs.media_config, None, None)
    same = embeds[0].shape == ours["embeds"].shape
    off = float((embeds[0] - ours["embeds"]).abs().max()) if same else float("inf")
    good = report(f"{name}: embeddings of {len(embeds[0])} tokens, the prompt whole", off <= BOUND, off)
    response = ours["response"]
    after = model.llm.model.embed_tokens(response)[None]
    logits = model.llm(inputs_embeds=torch.cat([embeds, after], 1)).logits[
        0, -len(response) - 1 : -1, : case.get("rows")
    ]
    logprobs = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
    off = float((logprobs - ours["logprobs"]).abs().max())
    return report(f"{name}: log-probs of {len(response)} tokens", off <= BOUND, off) and good


def report(claim: str, holds: bool, off: float | None = None) -> bool:
    print(f"{'ok  ' if holds else 'FAIL'}  {claim:68}" + ("" if off is None else f"{off:8.1e}"))
    return holds


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"] and len(sys.argv) == 3:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        sys.path.insert(0, sys.argv[3])
        sys.exit(not compare(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        sys.exit(__doc__)
