# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How measured runs become the figures of a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from echo_vllm.offline.bench.closed_loop import Latency, Run
from echo_vllm.offline.bench.intervals import Interval, median, ratio
from echo_vllm.offline.bench.tables import (
    FIGURES,
    Sample,
    acceptance_length,
    against_best,
    details,
    figures,
    markdown,
    speed_ratio,
    speed_ratios,
    summary,
    table,
    verified_per_accepted,
)


def sample(
    configuration: str,
    load: float = 1,
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
    return Sample(configuration, load, round, run)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_ratio_is_the_geometric_mean_of_pairs_with_its_interval() -> None:
    pairs = [0.8, 1.25, 1.0, 2.0, 0.5]
    found = ratio(pairs)
    assert found.middle == pytest.approx(1.0)
    assert 0.5 < found.low < 0.8
    assert 1.25 < found.high < 2.0
    assert ratio([1 / p for p in pairs]).low == pytest.approx(1 / found.high, rel=0.02)
    assert str(Interval(0.971, 0.949, 0.99, 5)) == "0.97 [0.95, 0.99]"


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    found = [ratio(np.exp(generator.normal(0.1, 0.05, size=40)).tolist()) for _ in range(100)]
    hits = sum(each.low <= np.exp(0.1) <= each.high for each in found)
    assert 88 <= hits <= 100
    widths = [each.high - each.low for each in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.05 * np.exp(0.1) / 40**0.5, rel=0.1)


def test_one_pair_has_no_interval_and_equal_ones_a_point() -> None:
    assert str(ratio([1.234])) == "1.23"
    assert str(ratio([1.5, 1.5, 1.5])) == "1.50"
    assert str(median([3.0, 1.0, 2.0])).startswith("2.00 [1.00, 3.00")
    with pytest.raises(ValueError, match="no values"):
        ratio()
    with pytest.raises(ValueError, match="no values"):
        ratio([])


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
        sample("ours", load=4, round=1),
    ]
    assert speed_ratios(samples, "ours", "plain", 1) == [0.5]


def test_runs_of_two_sessions_have_no_ratio() -> None:
    samples = [sample("plain"), replace(sample("ours", seconds=0.5), session=1)]
    assert speed_ratios(samples, "ours", "plain", 1) == []
    samples.append(replace(sample("plain", seconds=2.0), session=1))
    assert speed_ratios(samples, "ours", "plain", 1) == [4.0]


def test_the_best_other_configuration_is_the_one_with_the_lowest_ratio() -> None:
    samples = [sample("auto"), sample("a", seconds=2.0), sample("b", seconds=0.8)]
    best = against_best(samples, "auto", ["a", "b", "absent"], 1)
    assert best is not None
    assert best[0].middle == pytest.approx(0.8)
    assert best[1] == "b"
    assert against_best(samples, "auto", ["absent"], 1) is None
    text = table(samples, ["auto"], [1, 4], fixed=["a", "b"], elastic=["auto"])
    assert cells(text.splitlines()[-1])[:3] == ["auto / best fixed", "0.80 (b)", "-"]


def test_a_geometric_mean_needs_the_whole_sweep() -> None:
    samples = [sample(name, c, seconds=s) for name, c, s in SWEEP]
    whole = speed_ratio(samples, "ours", "plain", 1, 4)
    assert whole is not None
    assert whole.middle == pytest.approx(1.0)
    assert speed_ratio(samples, "ours", "plain", 1, 4, 8) is None


def test_every_load_weighs_the_same_in_a_geometric_mean() -> None:
    """However many rounds it has."""
    found = ratio([2.0] * 9, [0.5] * 2)
    assert (found.middle, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


SWEEP = [("plain", 1, 1.0), ("ours", 1, 0.5), ("plain", 4, 1.0), ("ours", 4, 2.0)]


def test_shares_are_blank_where_a_configuration_does_not_count_them() -> None:
    latency = Latency(0.1, 0.2, itl_p50=0.01, itl_p99=0.03, tpot_p50=0.005, tpot_p99=0.01)
    ours = sample("ours", seconds=2.0, verified=30, accepted=10)
    ours = replace(ours, run=replace(ours.run, draft_seconds=0.5, latency=latency))
    samples = [sample("plain"), ours]
    found = figures(samples, "ours", 1)
    assert found["draft %"] == Interval(25.0, 25.0, 25.0, 1)
    assert found["TTFT p99, ms"].middle == pytest.approx(200)
    assert (
        not {"draft %", "verify %", "TTFT p50, ms", "verified per accepted"}
        & figures(samples, "plain", 1).keys()
    )
    header, _, plain, row = map(cells, details(samples, ["plain", "ours"], [1, 4]).splitlines())
    assert header == ["requests at once", "configuration", *FIGURES]
    assert plain[header.index("draft %")] == ""
    assert row[header.index("draft %")] == "25"
    assert row[header.index("verified per accepted")] == "3"


def test_a_summary_is_by_temperature() -> None:
    hot = [replace(sample(name, seconds=s), temperature=1.0) for name, _, s in SWEEP[:2]]
    rows = summary([sample("plain"), *hot], ["plain", "ours"], "plain")
    keys = [(row["temperature"], row["configuration"]) for row in rows]
    assert keys == [(0.0, "plain"), (1.0, "plain"), (1.0, "ours")]
    assert rows[2]["speed over plain"]["middle"] == pytest.approx(2.0)


def test_acceptance_length_weighs_runs_by_their_steps() -> None:
    samples = [
        sample("ours", decode_tokens=30, request_steps=10),
        sample("ours", load=4, decode_tokens=10, request_steps=10),
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
        "1 at once",
        "4 at once",
        "geometric mean",
        "acceptance length",
        "verified per accepted",
    ]
    assert rows == [
        ["plain", "1.00", "1.00", "1.00", "1.00", "-"],
        ["eagle3-k2", "1.25", "1.00", "1.12", "1.00", "2.00"],
        ["chain-k2", "2.00", "0.50", "1.00", "1.00", "2.00"],
        ["chain-k2 / eagle3-k2", "1.60", "0.50", "0.89", "", ""],
    ]


def test_a_failed_configuration_says_why_and_the_others_stand() -> None:
    samples = [sample("plain", 1), sample("broken", 1)]
    text = table(samples, ["plain", "broken"], [1], failures={"broken": "a | b"})
    lines = text.splitlines()
    assert cells(lines[2]) == ["plain", "1.00", "1.00", "1.00", "-"]
    assert lines[3].startswith("| broken")
    assert "failed: a \\| b" in lines[3]


def test_markdown_cells_are_aligned() -> None:
    lines = markdown(["a", "long header"], [["wide cell", "x"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= set("|- ")
