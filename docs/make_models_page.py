"""Runs tests/families and writes the table of models.md beside this file from what passed: `make models-page`.

A cell is a test; what is not there is not tested, or is refused (which is tested). CI runs the same tests and compares
the page with what they are parametrised over.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Set
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("models.md")
TABLE = re.compile(r"(<!-- The table is made by `make models-page`[^\n]*-->\n).*?(?=\n\n)", re.DOTALL)

sys.path.insert(0, str(ROOT))

from tests.families import matrix, test_engine, test_media, test_ranks, test_training  # noqa: E402

TESTS: dict[str, Callable[..., None]] = {
    "text": test_media.test_text,
    "image": test_media.test_image,
    "several images": test_media.test_several_images,
    "interleaved": test_media.test_interleaved,
    "video": test_media.test_video,
    "audio": test_media.test_audio,
    "video with its sound": test_media.test_video_with_its_sound,
    "SFT": test_training.test_sft,
    "RL": test_training.test_rl,
    "SP": test_ranks.test_sp,
    "LoRA": test_training.test_lora,
    "engine": test_engine.test_engine,
    "export": test_training.test_export,
}
"""Column -> the test of it."""


def make_page(cells: Set[tuple[str, str]]) -> str:
    """The page with another table.

    Args:
        cells: (name of a test, family) of those that hold.
    """
    lines = [f"| family | {' | '.join(TESTS)} |", "|---" * (1 + len(TESTS)) + "|"]
    for family in matrix.TAKES:
        row = ["yes" if (test.__name__, family) in cells else "" for test in TESTS.values()]
        lines.append(f"| `{family}` | {' | '.join(row)} |")
    page, count = TABLE.subn(lambda match: match[1] + "\n".join(lines), PAGE.read_text(encoding="utf-8"))
    assert count == 1, f"{PAGE} has {count} places for the table"
    return page


def promised() -> set[tuple[str, str]]:
    """The cells that the tests are parametrised over."""
    return {
        (test.__name__, family)
        for test in TESTS.values()
        for mark in vars(test)["pytestmark"]
        if mark.name == "parametrize" and mark.args[0] == "name"
        for family in mark.args[1]
    }


def passed() -> set[tuple[str, str]]:
    """Runs them; the cells whose tests passed.

    Raises:
        RuntimeError: A cell's test was not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "tests/families", "--junitxml"]
        subprocess.run([*command, str(report)], cwd=ROOT, check=False)
        found: dict[tuple[str, str], bool] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            test, _, family = case.get("name", "").rstrip("]").partition("[")  # test_sp[vila]
            found[test, family] = found.get((test, family), True) and len(case) == 0  # else a failure or a skip
    if lost := promised() - found.keys():
        raise RuntimeError(f"not run: {sorted(lost)}")
    return {cell for cell, has_passed in found.items() if has_passed}


if __name__ == "__main__":
    PAGE.write_text(make_page(passed()), encoding="utf-8")
