# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How measured runs become the figures of a table."""

from __future__ import annotations

import pytest

from benchmarks.closed_loop import Run
from benchmarks.report import (
    Sample,
    Spread,
    acceptance_length,
    markdown,
    speed_ratios,
    table,
    verified_per_accepted,
)


def sample(
    configuration: str,
    concurrency: int = 1,
    round: int = 0,
    *,
    seconds: float = 1.0,
    tokens: int = 100,
    decode_tokens: int = 96,
    request_steps: int = 96,
    verified: int = 0,
    accepted: int = 0,
) -> Sample:
    run = Run(seconds, seconds, tokens, decode_tokens, request_steps, verified, accepted)
    return Sample(configuration, concurrency, round, run)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_spread_is_the_median_and_the_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)
    assert Spread.of([4.0, 1.0]) == Spread(median=2.5, low=1.0, high=4.0)
    assert str(Spread.of([1.234, 1.0, 2.0])) == "1.23 (1.00-2.00)"
    assert str(Spread.of([1.0, 1.0])) == "1.00"


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_ratios_compare_runs_of_the_same_round() -> None:
    # The second round is on a machine that is half as fast; the ratio does not see it.
    samples = [
        sample("plain", round=0, seconds=1.0),
        sample("ours", round=0, seconds=0.5),
        sample("plain", round=1, seconds=2.0),
        sample("ours", round=1, seconds=1.0),
    ]
    assert speed_ratios(samples, "ours", "plain", 1) == [2.0, 2.0]
    assert speed_ratios(samples, "plain", "plain", 1) == [1.0, 1.0]


def test_a_round_without_both_runs_has_no_ratio() -> None:
    samples = [
        sample("plain", round=0),
        sample("ours", round=0, seconds=2.0),
        sample("plain", round=1),
        sample("ours", concurrency=4, round=1),
    ]
    assert speed_ratios(samples, "ours", "plain", 1) == [0.5]


def test_acceptance_length_weighs_runs_by_their_steps() -> None:
    samples = [
        sample("ours", decode_tokens=30, request_steps=10),
        sample("ours", concurrency=4, decode_tokens=10, request_steps=10),
        sample("plain"),
    ]
    assert acceptance_length(samples, "ours") == 2.0
    assert acceptance_length(samples, "plain") == 1.0
    assert acceptance_length(samples, "absent") is None


def test_verified_per_accepted_counts_draft_tokens_only() -> None:
    samples = [
        sample("ours", verified=30, accepted=10),
        sample("ours", verified=10, accepted=0),
        sample("plain"),
    ]
    assert verified_per_accepted(samples, "ours") == 4.0
    assert verified_per_accepted(samples, "plain") is None


def test_table_has_a_row_a_configuration_and_a_row_a_pair() -> None:
    samples = [
        sample("plain", 1),
        sample("eagle3-k2", 1, seconds=0.8, verified=20, accepted=10),
        sample("chain-k2", 1, seconds=0.5, verified=20, accepted=10),
        sample("plain", 4),
        sample("eagle3-k2", 4),
        sample("chain-k2", 4, seconds=2.0),
    ]
    text = table(samples, ["plain", "eagle3-k2", "chain-k2"], [1, 4], [("chain-k2", "eagle3-k2")])
    header, _, *rows = map(cells, text.splitlines())
    assert header == [
        "configuration",
        "concurrency 1",
        "concurrency 4",
        "acceptance length",
        "verified per accepted",
    ]
    assert rows == [
        ["plain", "1.00", "1.00", "1.00", "-"],
        ["eagle3-k2", "1.25", "1.00", "1.00", "2.00"],
        ["chain-k2", "2.00", "0.50", "1.00", "2.00"],
        ["chain-k2 / eagle3-k2", "1.60", "0.50", "", ""],
    ]


def test_a_failed_configuration_says_why_and_the_others_stand() -> None:
    samples = [sample("plain", 1), sample("broken", 1)]
    text = table(samples, ["plain", "broken"], [1], failures={"broken": "a | b"})
    lines = text.splitlines()
    assert cells(lines[2]) == ["plain", "1.00", "1.00", "-"]
    assert lines[3].startswith("| broken")
    assert "failed: a \\| b" in lines[3]


def test_markdown_cells_are_aligned() -> None:
    lines = markdown(["a", "long header"], [["wide cell", "x"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= set("|- ")
