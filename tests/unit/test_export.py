"""Exports: a checkpoint's model as a folder of its own."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from longrl.checkpoint import Checkpoints
from longrl.export import export_command
from longrl.runtime import CHECKPOINTS
from tests.unit.test_checkpoint import make_model, names, nothing, save, truncate


def test_export_copies_the_model_folder(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "run" / CHECKPOINTS, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "run" / "config.yaml").write_text("kind: sft\n")
    (tmp_path / "empty").mkdir()
    export_command(tmp_path / "run", None, tmp_path / "new" / "deep")
    export_command(str(tmp_path / "run"), 1, str(tmp_path / "empty"))
    export_command(tmp_path / "run", 1, None)
    assert (tmp_path / "run" / "export" / "step_000001" / "config.json").is_file()
    assert (tmp_path / "new" / "deep" / "deep" / "model.bin").read_text() == "weights 2"
    assert (tmp_path / "empty" / "deep" / "model.bin").read_text() == "weights 1"
    assert names(tmp_path) == ["empty", "new", "run"]
    assert "step 2" in capsys.readouterr().out


def test_export_loads_in_transformers(tmp_path):
    model = make_model()
    Checkpoints(tmp_path / CHECKPOINTS, keep=1).save(1, model.save_pretrained, nothing, {})
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    export_command(tmp_path, None, tmp_path / "out")
    tokens = torch.arange(10)[None]
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits, model.eval()(tokens).logits)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # the weights are as readable as any new file


def test_export_refuses(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        export_command(tmp_path, None, tmp_path / "out")
    final = save(Checkpoints(tmp_path / CHECKPOINTS, keep=1), 1)
    with pytest.raises(ValueError, match="no checkpoint of step 3; there are: 1"):
        export_command(tmp_path, 3, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ValueError, match="not an empty folder"):
            export_command(tmp_path, 1, out)
    with pytest.raises(OSError, match="File exists; choose another --out"):
        export_command(tmp_path, 1, tmp_path / "full" / "mine.txt" / "out")
    with pytest.raises(ValueError, match="trained no adapters"):
        export_command(tmp_path, 1, tmp_path / "out", merge_lora=True)
    truncate(final / "model" / "config.json")
    with pytest.raises(ValueError, match="is damaged"):
        export_command(tmp_path, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_export_of_a_folder_of_runs_names_them(tmp_path):
    for name in ("sft", "rl"):
        save(Checkpoints(tmp_path / name / CHECKPOINTS, keep=1), 1)
    with pytest.raises(ValueError, match=f"no complete checkpoint; give {tmp_path}/rl or {tmp_path}/sft$"):
        export_command(tmp_path, None, tmp_path / "out")


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("kind: sft\n")
    save(Checkpoints(tmp_path / CHECKPOINTS, keep=1), 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left on device; free space there or choose another --out"):
        export_command(tmp_path, None, tmp_path / "out")
