"""The repository as a whole: imports, the README, the Makefile."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from longrl.check import BF16_DIFF
from longrl.cli import app
from longrl.config import DataConfig, VideoConfig
from longrl.config_files import load_arguments
from longrl.data.examples import load_examples
from longrl.plan.plan import make_plan

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "math_verify": "math-verify",
    "huggingface_hub": "huggingface-hub",
}
"""Import name -> distribution, where they differ."""


def test_configuration_and_command_line_import_no_torch():
    light = "config, types, config_files, cli, check, runtime, models, plan.plan, plan.text".replace(", ", ", longrl.")
    heavy = "{'torch', 'transformers', 'av', 'matplotlib'}"
    code = f"import longrl.{light}, sys; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_source_logs_and_never_prints(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"] == []


def test_source_imports_what_the_project_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "dev"]
    required, optional = (
        {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines}
        for lines in (project["dependencies"], [line for lines in extras for line in lines])
    )
    imported, when_loaded = set(), set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported |= packages(ast.walk(tree))
        when_loaded |= packages(tree.body)
    assert when_loaded <= required
    assert imported <= required | optional
    assert "pydantic" in imported


def packages(nodes: Iterable[ast.AST]) -> set[str]:
    """Distributions that some statements import."""
    imported: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add((node.module or "").partition(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in imported - {*sys.stdlib_module_names, "longrl"}}


def test_readme_is_short_and_its_make_targets_exist():
    assert len(README.splitlines()) < 120
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) | set(re.findall(r"`make (\w+)`", README))
    assert {"quickstart", "test"} <= named <= targets


def test_readme_commands_exist():
    groups = {group.name: {command.name for command in group.typer_instance.registered_commands}
              for group in app.registered_groups}  # fmt: skip
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    lines = re.findall(r"^longrl (\w+) ?(\w*)", README, re.MULTILINE)
    assert len(lines) > 5
    for first, second in lines:
        assert first in commands or second in groups[first]


def test_readme_layout_exists():
    layout = README.partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
    names = re.findall(r"(?:^|\s)(\w+\.py|[\w/]+/)(?=[\s,])", layout)
    assert len(names) > 15
    inside = [name for name in names if name not in ("src/longrl/", "configs/", "tests/", "benchmarks/", "docs/")]
    missing = [name for name in inside if not (ROOT / "src" / "longrl" / name).exists()]
    missing += [name for name in set(names) - set(inside) if not (ROOT / name).is_dir()]
    assert missing == []


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_run_is_accepted_and_an_hour_fits_the_gpu_named(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (gpu,) = set(re.findall(r"--device (\w+)", README))
    (tmp_path / "lectures.yaml").write_text(block)
    config = load_arguments([str(tmp_path / "lectures.yaml"), "data.train=nowhere.jsonl"], "rl")
    plan = make_plan(config, gpu, 1)
    assert plan.fits
    assert f"an hour: {plan.prompt.video_tokens:,} tokens at most" in block
    assert config.algo.max_logprob_diff >= BF16_DIFF


def test_readme_row_is_accepted(tmp_path):
    (row,) = re.findall(r"```\n({.*})\n```", README)
    (tmp_path / "a.mp4").touch()
    (tmp_path / "rows.jsonl").write_text(row)
    (example,) = load_examples(str(tmp_path / "rows.jsonl"), DataConfig(), VideoConfig())
    assert (example.kind, example.answer, len(example.clips)) == ("choice", "B", 1)


def test_quickstart_configuration_is_there():
    (config,) = set(re.findall(r"longrl quickstart (\S+)", MAKEFILE))
    assert (ROOT / config).is_file()


def test_ci_runs_the_readme_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test\b", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert "make test " in README


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `make` looks at before it does anything, in a folder of their own."""
    (tmp_path / "constraints").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints/cpu.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"))
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def test_make_refuses_an_old_python_and_says_what_to_do(checkout):
    old = checkout / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make(checkout, f"PYTHON={old}", "test")
    assert done.returncode != 0
    assert f"longrl needs Python 3.11 or newer; '{old}' is Python 3.9.2. Run: make PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_installs_once_and_again_when_the_requirements_change(checkout):
    assert "pip install" in make(checkout, "-n", "quickstart").stdout
    assert "[dev]" not in make(checkout, "-n", "quickstart").stdout
    assert "[dev]" in make(checkout, "-n", "test").stdout
    (checkout / ".venv").mkdir()
    for number, name in enumerate(("pyproject.toml", "constraints/cpu.txt", ".venv/core.stamp", ".venv/dev.stamp")):
        (checkout / name).touch()
        os.utime(checkout / name, (1_000_000 + number, 1_000_000 + number))
    for target in ("setup", "quickstart", "test", "lint", "docs"):
        assert "pip install" not in make(checkout, "-n", target).stdout
    os.utime(checkout / "constraints" / "cpu.txt", (1_000_010, 1_000_010))
    for target in ("setup", "quickstart", "test", "lint", "docs"):
        assert "pip install" in make(checkout, "-n", target).stdout
