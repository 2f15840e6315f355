"""The pages under docs/: their examples run, and what they name exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from longrl.config_files import load_config

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


def test_extending_configuration_is_accepted(tmp_path):
    found = blocks(EXTENDING, "yaml")
    assert found
    for number, (_, text) in enumerate(found):
        base, added = tmp_path / "base.yaml", tmp_path / f"{number}.yaml"
        base.write_text(BASE)
        added.write_text(text)
        config = load_config([base, added])
        assert config.model_dump() != load_config([base]).model_dump()
