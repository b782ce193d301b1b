# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The comparison of drafter trainings, on made-up counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.drafter_study import ANEW, BASES, CONTINUED, VARIANTS, compare, plot, table


def counts(accepted: list[list[int]], seconds: float = 10.0, computed: int = 0) -> dict[str, Any]:
    return {
        "drafts": [20] * len(accepted),
        "accepted": accepted,
        "cpu_seconds": seconds,
        "computed_tokens": computed,
    }


def rows() -> dict[str, dict[str, Any]]:
    base = [[10, 5, 0, 0, 0], [8, 2, 0, 0, 0], [12, 6, 3, 0, 0]]
    better = [[first + 4, *rest] for first, *rest in base]
    return {
        "loss ce": counts(better, seconds=15.0),
        CONTINUED: counts(base),
        "loss tv": counts(base, computed=100),
        # Nothing to compare it with: its base has not run.
        "layers 2 15 29": counts(base),
    }


def test_a_variant_is_compared_with_its_base_on_the_same_answers() -> None:
    lines = {line.name: line for line in compare(rows())}
    assert list(lines) == [CONTINUED, "loss ce", "loss tv"]
    base, better = lines[CONTINUED], lines["loss ce"]
    assert base.length == pytest.approx(1 + 46 / 60)
    assert (base.difference, base.low, base.high) == (0, 0, 0)
    assert better.length == pytest.approx(1 + 58 / 60)
    # Every answer gained the same, so whatever answers are drawn the difference is that.
    assert better.low == pytest.approx(0.2)
    assert better.high == pytest.approx(0.2)
    assert better.accepted == pytest.approx([42 / 60, 13 / 60, 3 / 60, 0, 0])
    assert better.time == pytest.approx(1.5)
    assert lines["loss tv"].time is None


def test_table_and_picture(tmp_path: Path) -> None:
    lines = compare(rows())
    text = table(lines)
    assert "| loss ce" in text
    assert "+0.200 (+0.200 to +0.200) of continued" in text
    assert "layers 2 15 29" not in text
    plot(lines, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000


def test_every_variant_has_a_base_and_one_change() -> None:
    for name, (base, changes) in VARIANTS.items():
        assert base in BASES
        assert len(changes) == (0 if name in (CONTINUED, ANEW) else 1)
