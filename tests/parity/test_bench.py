"""The benchmark's paths do the same work: equal gradients, and the operations that they claim."""

from __future__ import annotations

import json

import pytest

from longrl.bench import Work, bench_step

KEYS = {"path", "seconds", "prefix_passes", "prompt_tokens", "group_size", "response_tokens", "peak_bytes"}


@pytest.fixture(scope="module")
def measured():
    work = Work(prompt_tokens=70, group_size=3, response_tokens=5)
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("typer.echo", lines.append)
        bench_step(work, repeats=1, threads=None, as_json=True)
    return {row["path"]: row for row in map(json.loads, lines)}


def test_every_path_gives_the_gradients_of_separate_sequences(measured):
    assert list(measured) == ["fused", "shared", "plain", "stock"]
    assert measured["plain"]["max_rel_grad_diff"] == 0
    assert all(0 < measured[path]["max_rel_grad_diff"] <= 1e-5 for path in ("fused", "shared", "stock"))


def test_figures(measured):
    assert {path: row["prefix_passes"] for path, row in measured.items()} == {
        "fused": 3,
        "shared": 5,
        "plain": 13,
        "stock": 13,
    }
    for row in measured.values():
        assert row.keys() > KEYS
        assert row["seconds"] > 0
    # no more than 13 / 3, the limit for long prompts; responses, which nobody shares, pull it down
    assert 2 < measured["fused"]["speedup_by_flops"] < 13 / 3
