"""VILA as NVlabs publishes it: the tokenizer knows tokens of media that the body has no embeddings for, and the body of
8B has a head of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longrl import load
from longrl.config import ModelConfig, RlConfig, SftConfig
from longrl.data.prompts import response_ids
from longrl.export import export_command
from longrl.models import load_family
from longrl.models.vila import Vila, tiny_content, tiny_tokenizer
from longrl.policy import Policy
from longrl.report.metrics import read_metrics
from longrl.train_rl import train_rl
from longrl.train_sft import train_sft
from longrl.types import Example, Message
from longrl.verify import differences, separate, shared
from tests.families.matrix import SEEN, ask, contents, sampled, written
from tests.families.test_training import EVEN, make_config

ROWS = 512
"""Of the embeddings: up to `<vila/sentinel>`, `<image>` and `<vila/video>`."""


def make(dtype: torch.dtype = torch.float32) -> Vila:
    tokenizer = tiny_tokenizer()
    content = tiny_content(tokenizer)
    content["llm_cfg"] |= {"vocab_size": ROWS, "tie_word_embeddings": False}
    return Vila.make(content, tokenizer, 0, dtype)


@pytest.fixture
def folder(tmp_path) -> Path:
    make().save(tmp_path / "model")
    return tmp_path / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
    return {f"{file}/{name}": x for file, tensors in files.items() for name, x in tensors.items()}


def test_it_is_the_published_layout():
    family = make()
    assert min(family.pads) == ROWS + 1
    assert len(family.tokenizer) == ROWS + 3
    assert family.model.llm.lm_head.weight.shape[0] == family.model.llm.model.embed_tokens.weight.shape[0] == ROWS


@pytest.mark.parametrize("kind", SEEN)
def test_prompts_and_responses(kind, files):
    """No token of a prompt is beyond the embeddings, so that nobody, an engine neither, can look one up; the shared
    prompt is separate sequences, the engine is the trainer."""
    content = contents(files)[kind]
    family = make(torch.float64)
    _, prompts = ask(family, content)
    assert all(int(prompt.token_ids.max()) < ROWS for prompt in prompts)
    case = written(family, content)
    gradients, logprobs = differences(shared(Policy(family), case), separate(family, case))
    assert (gradients < 1e-7, logprobs < 1e-6) == (True, True)
    case = sampled(make(), content)
    assert max(max(response) for response in case.responses) < ROWS
    recorded = torch.tensor([x for one in case.logprobs for x in one], dtype=torch.float64)
    assert (recorded - shared(Policy(make()), case).logprobs.double()).abs().max() < 1e-5


def test_a_folder_is_asked(folder, files, tmp_path):
    model = load(folder, cache_dir=str(tmp_path / "cache"))
    reply = model.generate_content([*contents(files)["interleaved"], "what?"], max_new_tokens=4)
    assert reply.prompt_tokens > 12


def test_training_and_export(folder, files, tmp_path):
    """Rows with text, images and a video, supervised and reinforced; the export has the source's names and sizes."""
    short = {"steps": 3, "optim": {"lr": 1e-3}}
    config = make_config("vila", files, tmp_path / "sft", {"path": str(folder)}, **short)
    train_sft(SftConfig.model_validate(config))
    losses = [line["loss"] for line in read_metrics(tmp_path / "sft" / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    sampling = {"rewards": EVEN, "scoring": {"in_process": list(EVEN)}}
    sampling |= {"rollout": {"group_size": 4, "max_new_tokens": 2}}
    export_command(tmp_path / "sft" / "run", None, tmp_path / "out")
    config = make_config("vila", files, tmp_path / "rl", {"path": str(tmp_path / "out")}, **short, **sampling)
    train_rl(RlConfig.model_validate(config))
    lines = read_metrics(tmp_path / "rl" / "run" / "metrics.jsonl")
    assert max(line["sampling/logprob_diff"] for line in lines if line["groups/informative"]) < 1e-5
    shapes = {name: x.shape for name, x in weights(folder).items()}
    assert "llm/model.safetensors/lm_head.weight" in shapes
    assert {name: x.shape for name, x in weights(tmp_path / "out").items()} == shapes
    family = load_family(ModelConfig(path=str(tmp_path / "out")))
    family.save(tmp_path / "again")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(family.tokenizer) == ROWS + 3


def test_a_text_with_a_token_that_has_no_embedding():
    family = make()
    example = Example(
        id="q7", messages=(Message(role="user", content=("<vila/sentinel>?",)),), answer=None, kind="open"
    )
    with pytest.raises(ValueError, match=r"^example q7: its text has the token '<vila/sentinel>' \(512\), for which"):
        family.prompt(example, ())
    with pytest.raises(ValueError, match=r"^the response 'a <image>' has the token '<image>' \(513\)[^\n]* 512 embed"):
        response_ids(family, "a <image>")
