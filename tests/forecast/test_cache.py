# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Measured costs on disk."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from echo_vllm.forecast import CostCache, CostCurve, CostKey, StepCost, describe_cpu

KEY = CostKey("target", "head", "float32", "cpu x2", 2, "0.32.0", "0.1.0", 512)
COST = StepCost(
    verify=CostCurve((1, 64), (0.1, 0.30000000000000004)),
    draft_level=CostCurve((1,), (0.01,)),
    catch_up=CostCurve((1, 3), (0.01, 0.02)),
    other=0.003,
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    cache = CostCache(tmp_path / "new" / "folder")
    assert cache.load(KEY) is None
    assert cache.save(KEY, COST) == cache.path(KEY)
    assert cache.load(KEY) == COST
    assert [path.name for path in cache.folder.iterdir()] == [cache.path(KEY).name]


@pytest.mark.parametrize(
    "change",
    [
        {"target": "other"},
        {"drafter": "other"},
        {"dtype": "bfloat16"},
        {"hardware": "other"},
        {"threads": 3},
        {"vllm_version": "1"},
        {"echo_vllm_version": "1"},
        {"max_rows": 64},
    ],
)
def test_every_part_of_the_key_counts(tmp_path: Path, change: dict[str, str]) -> None:
    cache = CostCache(tmp_path)
    cache.save(KEY, COST)
    assert cache.load(replace(KEY, **change)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({"schema_version": 99}).encode(),
        json.dumps({"schema_version": 1, "key": {}, "cost": COST.to_dict()}).encode(),
        json.dumps({"schema_version": 1, "key": vars(KEY), "cost": {"verify": 3}}).encode(),
        json.dumps(
            {"schema_version": 1, "key": vars(KEY), "cost": {**COST.to_dict(), "other": -1}}
        ).encode(),
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CostCache(tmp_path)
    cache.path(KEY).write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert cache.load(KEY) is None
    assert str(cache.path(KEY)) in caplog.text
    cache.save(KEY, COST)
    assert cache.load(KEY) == COST, "the next measurement replaces it"


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = CostCache(tmp_path / "file" / "folder")
    with caplog.at_level(logging.WARNING):
        assert cache.save(KEY, COST) is None
        assert cache.load(KEY) is None
    assert "is not kept" in caplog.text


def test_the_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_VLLM_CACHE", str(tmp_path))
    assert CostCache().folder == tmp_path / "costs"
    monkeypatch.delenv("ECHO_VLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CostCache().folder == tmp_path / "xdg" / "echo-vllm" / "costs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert CostCache().folder == tmp_path / "home" / ".cache" / "echo-vllm" / "costs"


def test_this_machine_has_a_description() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    assert describe_cpu().endswith(f" x{os.cpu_count()}")
    assert not named or describe_cpu().startswith(named[0])
