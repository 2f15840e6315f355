"""docs/models.md says what the tests of tests/families are parametrised over."""

from __future__ import annotations

import importlib.util


def test_the_table_is_current(root):
    spec = importlib.util.spec_from_file_location("make_models_page", root / "docs" / "make_models_page.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.make_page(module.promised()), "docs/models.md is out of date: make models-page"
    assert "| `qwen2` | yes |  |" in page


def test_every_family_has_its_line():
    from longrl.models import FAMILIES
    from tests.families.matrix import TAKES

    assert set(TAKES) == set(FAMILIES) - {"qwen2_5_omni_thinker", "llava_llama"}  # the same classes
