"""The pages under docs/: their examples run, and what they name exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from longrl.config_files import load_config
from tests.unit.media import render

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BASE = "kind: rl\nrun_dir: run\nmodel: {path: model}\nsteps: 1\n"


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(number of the line before it, content) of every fenced block."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder to import from; what is imported from it is forgotten afterwards."""
    from longrl import models

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def test_extending_runs_from_top_to_bottom(importable):
    variables: dict[str, object] = {}
    saved, run = [], 0
    for line, code in blocks(EXTENDING, "python"):
        name = re.match(r"# (\w+\.py)\n", code)
        if name:
            (importable / name[1]).write_text(code, encoding="utf-8")
            saved.append(name[1])
        else:
            # Empty lines in front, so that a traceback gives the line of the page.
            exec(compile("\n" * line + code, str(ROOT / "docs" / "extending.md"), "exec"), variables)
            run += 1
            assert "assert" in code
    assert saved == ["my_reward.py", "my_advantage.py", "my_loss.py", "my_family.py"]
    assert run == len(saved)


def test_inference_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    render(tmp_path / "v.mp4", [float(i) for i in range(130)])
    [(_, code)] = blocks((ROOT / "docs" / "inference.md").read_text(encoding="utf-8"), "python")
    exec(code, {"DIR": "tiny:qwen2_5_vl", "VIDEO": "v.mp4"})


@pytest.mark.parametrize("page", ["extending.md", "rewards.md"])
def test_configuration_on_a_page_is_accepted(page, tmp_path):
    found = blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), "yaml")
    assert found
    for number, (_, text) in enumerate(found):
        base, added = tmp_path / "base.yaml", tmp_path / f"{number}.yaml"
        base.write_text(BASE)
        added.write_text(text)
        config = load_config([base, added])
        assert config.model_dump() != load_config([base]).model_dump()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "config.md"], ids=lambda page: page.name)
def test_pages_are_short_and_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) < (
        300 if page.name in ("architecture.md", "log.md", "numerics.md", "recipes.md") else 160
    )
    links = [link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text) if not (page.parent / link).exists()]
    assert links == []
    missing = []
    for path, _, name in re.findall(r"`((?:src|tests|docs|configs|benchmarks)/[\w./-]*)(::(\w+))?`", text):
        file = ROOT / path
        if not file.exists() or (name and f"\ndef {name}(" not in file.read_text(encoding="utf-8")):
            missing.append(f"{path} {name}")
    assert missing == []


def test_architecture_has_a_line_for_every_source_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("```\nsrc/longrl/\n")[2].partition("```")[0]
    named = [line.split()[0] for line in tree.splitlines()]
    source = ROOT / "src" / "longrl"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in (".py", ".css")}
    plain = {name for name in files if name.endswith("__init__.py")}
    assert named == sorted(named)
    assert files - plain <= set(named) <= files
