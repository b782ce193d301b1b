# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which depths become gates, and that their thresholds are the best ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.offline.calibrate.fit import Calibration, fit
from echo_vllm.offline.calibrate.gates import (
    GateCosts,
    best_threshold,
    choose_depths,
    fastest_thresholds,
    separation,
    truncation_depths,
    youden_thresholds,
)
from echo_vllm.offline.calibrate.samples import Samples, collect
from tests.offline.calibrate.synthetic import chain, step

MANY = [1000] * 8


@pytest.mark.parametrize(
    ("aucs", "wanted"),
    [
        ([0.8, 0.81, 0.82, 0.83, 0.84], [1, 3]),  # The last depth has nothing to cut.
        ([0.7, 0.75, 0.6, 0.9], [1, 2]),  # Next to each other, but much better.
        ([0.6, 0.7, 0.7, 0.7], [2]),  # The root must separate, too.
        ([0.65, 0.65, 0.9], []),  # Above delta, not at it.
        ([None, 0.7, 0.9], [2]),
        ([0.7, 0.8, 0.7, 0.9, 0.7, 0.85, 0.86, 0.9], [1, 4, 6]),  # At most three.
        ([0.66, 0.7, 0.73, 0.76, 0.79, 0.9], [1, 4, 5]),
        ([0.9], []),
    ],
)
def test_gates_are_sparse_sweet_spots(aucs: list[float | None], wanted: list[int]) -> None:
    assert choose_depths(aucs, MANY[: len(aucs)]) == wanted


def test_a_sweet_spot_needs_trees_of_both_outcomes() -> None:
    assert choose_depths([0.9, 0.9, 0.9], [49, 50, 50]) == [2]
    assert choose_depths([0.9, 0.9, 0.9], [49, 50, 50], min_samples=10) == [1]
    assert choose_depths([0.7, 0.9], [50, 50], delta=0.75) == []


def test_nothing_to_separate_has_no_auc() -> None:
    assert separation(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert separation(np.array([0.1, 0.2]), np.array([False, False])) is None
    assert separation(np.array([0.1, 0.2]), np.array([False, True])) == 1.0


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(-5, 5)), min_size=1, max_size=12))
def test_no_threshold_is_better_than_the_best_one(samples: list[tuple[int, int]]) -> None:
    confidence = np.array([c / 8 for c, _ in samples])
    value = np.array([float(v) for _, v in samples])
    tau = best_threshold(confidence, value)
    every = [value[confidence > t].sum() for t in (0.0, *np.unique(confidence), 1.0)]
    assert value[confidence > tau].sum() == max(every)
    assert 0 <= tau <= 1
    assert tau not in confidence or tau == 1.0


def test_thresholds_between_neighbouring_floats_still_separate() -> None:
    low = 0.3
    high = math.nextafter(low, 1.0)
    tau = best_threshold(np.array([low, high]), np.array([-1.0, 1.0]))
    assert low <= tau < high


def two_kinds(num_each: int = 100) -> Samples:
    """Sure trees (c 0.9, three nodes accepted) and unsure ones (c 0.1, none)."""
    sure = [chain(f"s{i}", np.log([0.9, 0.8, 0.7]).tolist(), 3) for i in range(num_each)]
    unsure = [chain(f"u{i}", np.log([0.1, 0.05, 0.02]).tolist(), 0) for i in range(num_each)]
    return collect([step(sure + unsure)], num_nodes=3)


def test_gates_cut_the_trees_that_should_be_cut() -> None:
    samples = two_kinds()
    profile = fit(samples, target="t", drafter="d", dtype="", prompts="").profile
    assert list(profile.gates()) == [1]  # The second depth would not know better.
    assert profile.gates()[1] == pytest.approx(0.5)
    stop = truncation_depths(samples, profile.gates())
    assert stop.tolist() == [3] * 100 + [1] * 100


@pytest.mark.parametrize(
    ("level_s", "wanted"),
    [(0.001, [3] * 100 + [1] * 100), (0.1, [1] * 200), (0.0, [3] * 200)],
)
def test_gates_weigh_tokens_against_time(level_s: float, wanted: list[int]) -> None:
    """A level brings at most one token, which takes 0.05 s without drafting."""
    samples = two_kinds()
    costs = GateCosts(1, plain_s=0.05, base_s=0.06, level_s=level_s, nodes_per_level=1)
    found = fastest_thresholds(samples, [1], costs)
    assert truncation_depths(samples, found.taus).tolist() == wanted
    assert found.price == max(1 / costs.plain_s, found.achieved)


def test_youden_weighs_both_outcomes_alike() -> None:
    """Few accepted trees among many: the threshold does not move with their number."""
    for rejected in (10, 1000):
        trees = [chain(f"y{i}", [math.log(0.5 + i / 100)] * 2, 1) for i in range(10)]
        trees += [
            chain(f"n{i}", [math.log(0.01 + 0.48 * i / rejected)] * 2, 0) for i in range(rejected)
        ]
        taus = youden_thresholds(collect([step(trees)], num_nodes=2), [1])
        assert 0.4 < taus[1] < 0.5


def rate_of(samples: Samples, taus: dict[int, float], costs: GateCosts, width: int) -> float:
    """Tokens a second of the batch, tree by tree."""
    tokens = seconds = 0.0
    for tree in range(samples.num_trees):
        depth = 1
        while depth < samples.max_depth and samples.confidence[tree, depth - 1] > taus.get(
            depth, -1.0
        ):
            depth += 1
        tokens += 1
        for rank in samples.accepted_rank[tree, :depth]:
            if not 0 <= rank < width:
                break
            tokens += 1
        seconds += costs.base_s + (depth - 1) * costs.level_s
    return tokens / seconds


@pytest.mark.parametrize("level_s", [0.002, 0.02, 0.08])
def test_a_single_gate_is_the_fastest_possible(calibration: Calibration, level_s: float) -> None:
    samples = calibration.samples
    costs = GateCosts(4, plain_s=0.1, base_s=0.11, level_s=level_s, nodes_per_level=2)
    for depth in (1, 2):
        found = fastest_thresholds(samples, [depth], costs)
        assert found.achieved == pytest.approx(rate_of(samples, found.taus, costs, 2))
        for tau in np.linspace(0, 1, 21):
            rate = rate_of(samples, {depth: float(tau)}, costs, 2)
            # Where nothing beats plain decoding, the gates keep the loss against it small.
            assert rate <= max(found.achieved, found.price) + 1e-9


def test_more_gates_do_not_slow_down(calibration: Calibration) -> None:
    samples = calibration.samples
    costs = GateCosts(4, plain_s=0.1, base_s=0.1, level_s=0.02, nodes_per_level=3)
    none, one, two = (
        fastest_thresholds(samples, gates, costs).achieved for gates in ([], [1], [1, 3])
    )
    assert none < one
    assert two > 0.999 * one


def test_dearer_levels_raise_the_thresholds(calibration: Calibration) -> None:
    taus = []
    for level_s in (0.001, 0.01, 0.03, 0.3):
        costs = GateCosts(4, plain_s=0.1, base_s=0.1, level_s=level_s, nodes_per_level=3)
        taus.append(fastest_thresholds(calibration.samples, [1], costs).taus[1])
    assert taus == sorted(taus)
    assert taus[0] < taus[-2]
    assert taus[-1] == 1.0  # A level that takes three plain steps never pays.


def test_costs_are_shares_of_a_batch() -> None:
    """Curves that are straight lines, so that shares do not depend on the batch."""
    cost = StepCost(
        verify=CostCurve((1, 1001), (0.101, 1.101)),  # 0.1 s and 1 ms a row
        draft_level=CostCurve((1, 1001), (0.0501, 0.1501)),  # 50 ms and 0.1 ms a row
        catch_up=CostCurve((1, 1001), (0.01, 0.01)),
        other=0.02,
    )
    found = GateCosts.at_load(cost, requests=10, frontier=4, nodes_per_level=3, max_depth=5)
    assert found.plain_s == pytest.approx((0.1 + 10 * 0.001 + 0.02) / 10)
    assert found.base_s == pytest.approx((0.1 + 40 * 0.001 + 0.02 + 0.01) / 10)
    assert found.level_s == pytest.approx((30 * 0.001 + 0.05 + 40 * 0.0001) / 10)
    assert (found.requests, found.nodes_per_level) == (10, 3)
