# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From traces with known survival to profiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.forecast.drafter_profile import MAX_KNOTS, DrafterProfile
from echo_vllm.offline.calibrate.fit import (
    Calibration,
    fit,
    fit_drawn,
    reliability,
    survival_knots,
)
from echo_vllm.offline.calibrate.gates import GateCosts
from echo_vllm.offline.calibrate.samples import Samples, collect
from echo_vllm.trace_format import TraceStep
from tests.offline.calibrate.synthetic import SHARPNESS, chain, request, step


def profile_of(samples: Samples, *costs: GateCosts) -> DrafterProfile:
    calibration = fit(
        samples,
        target="t",
        drafter="d",
        dtype="float32",
        prompts="p",
        costs=costs,
        created="2025-01-01",
    )
    return calibration.profile


def test_a_logistic_survival_is_recovered() -> None:
    generator = np.random.default_rng(1)
    logprobs = -generator.exponential(2.0, size=40_000)
    chances = 1 / (1 + np.exp(-(1.0 + 1.3 * logprobs)))
    knots, probs = survival_knots(logprobs, generator.random(40_000) < chances)
    grid = np.linspace(-8, -0.05, 200)
    wanted = 1 / (1 + np.exp(-(1.0 + 1.3 * grid)))
    assert np.abs(np.interp(grid, knots, probs) - wanted).max() < 0.04
    assert np.abs(np.interp(logprobs, knots, probs) - chances).mean() < 0.008


def test_the_survival_of_whole_trees_is_recovered(calibration: Calibration) -> None:
    samples = calibration.samples
    model = calibration.profile.survival()
    found = model.probability(
        torch.tensor(samples.node_logprob, dtype=torch.float32), torch.tensor(samples.node_depth)
    ).numpy()
    for depth in range(1, 5):
        here = samples.node_depth == depth
        true = np.exp(SHARPNESS * samples.node_logprob[here])
        assert np.abs(found[here] - true).mean() < 0.012
        assert found[here].sum() == pytest.approx(samples.node_accepted[here].sum(), rel=0.05)


def test_drawn_candidates_have_curves_of_their_own(steps: list[TraceStep]) -> None:
    """A trace may hold both kinds; each is fitted to its own trees."""
    both = [
        replace(each, requests=[replace(r, drawn=i % 2 == 1) for i, r in enumerate(each.requests)])
        for each in steps
    ]
    best, drawn = (collect(both, 30, kind=kind) for kind in ("best", "drawn"))
    assert best.num_trees == drawn.num_trees == 1500
    assert not set(best.request_ids) & set(drawn.request_ids)
    found = fit_drawn(drawn, 0.6)
    assert found.temperature == 0.6
    assert [depth.depth for depth in found.depths] == [1, 2, 3, 4]
    assert sum(depth.samples for depth in found.depths) == len(drawn.node_depth)
    scores = torch.tensor(drawn.node_logprob, dtype=torch.float32)
    predicted = found.survival().probability(scores, torch.tensor(drawn.node_depth)).numpy()
    true = np.exp(SHARPNESS * drawn.node_logprob)
    assert np.abs(predicted - true).mean() < 0.012
    assert all(depth.ece_after < depth.ece_before for depth in found.depths[:2])


def test_calibration_errors_fall_on_requests_that_were_held_out(calibration: Calibration) -> None:
    for depth in calibration.profile.depths:
        assert depth.ece_after < depth.ece_before / 2
        assert depth.ece_after < 0.035  # Chance alone makes 0.02 at depth 1.


@given(
    st.lists(st.tuples(st.floats(-30, 0), st.booleans()), min_size=1, max_size=200),
)
def test_curves_rise_have_few_knots_and_never_say_never(
    nodes: list[tuple[float, bool]],
) -> None:
    logprobs = np.array([x for x, _ in nodes])
    accepted = np.array([a for _, a in nodes])
    knots, probs = survival_knots(logprobs, accepted)
    assert 1 <= len(knots) == len(probs) <= MAX_KNOTS
    assert (np.diff(knots) > 0).all()
    assert (np.diff(probs) >= 0).all()
    assert probs[0] > 0
    assert probs[-1] <= 1
    assert logprobs.min() - 1e-9 <= knots[0] <= knots[-1] <= logprobs.max() + 1e-9


def test_merging_knots_keeps_the_number_of_accepted_nodes() -> None:
    generator = np.random.default_rng(2)
    logprobs = -generator.exponential(1.0, size=20_000)
    accepted = generator.random(20_000) < np.exp(logprobs)
    knots, probs = survival_knots(logprobs, accepted)
    assert len(knots) == MAX_KNOTS
    assert np.interp(logprobs, knots, probs).mean() == pytest.approx(accepted.mean(), rel=0.02)


def test_reliability_is_the_textbooks() -> None:
    predicted = np.array([0.1, 0.1, 0.1, 0.1, 0.8, 0.8])
    accepted = np.array([1, 0, 0, 0, 1, 0], dtype=bool)
    found = reliability(predicted, accepted)
    assert found.predicted.tolist() == pytest.approx([0.1, 0.8])
    assert found.accepted.tolist() == pytest.approx([0.25, 0.5])
    assert found.count.tolist() == [4, 2]
    assert found.ece == pytest.approx((4 * 0.15 + 2 * 0.3) / 6)


def test_equal_predictions_share_a_bin() -> None:
    generator = np.random.default_rng(3)
    accepted = generator.random(1000) < 0.3
    found = reliability(np.full(1000, 0.3), accepted)
    assert found.count.tolist() == [1000]
    assert found.ece == pytest.approx(abs(accepted.mean() - 0.3))


def test_auc_and_acceptance_are_those_of_a_count_by_hand(
    steps: list[TraceStep], calibration: Calibration
) -> None:
    """One tree, one depth at a time, from the trace itself."""
    for depth in calibration.profile.depths:
        best, label = [], []
        for tree in (tree for one in steps for tree in one.requests):
            depths = tree.depths().tolist()
            best.append(
                max(x for x, d in zip(tree.logprobs, depths, strict=True) if d == depth.depth)
            )
            label.append(any(depths[node] == depth.depth for node in tree.accepted))
        # By the definition of the AUC: how often a pair is in order.
        yes = np.array([b for b, a in zip(best, label, strict=True) if a])
        no = np.array([b for b, a in zip(best, label, strict=True) if not a])
        pairs = (yes[:, None] > no).mean() + 0.5 * (yes[:, None] == no).mean()
        assert depth.auc == pytest.approx(pairs, abs=1e-6)
        assert depth.acceptance == pytest.approx(np.mean(label))
        assert depth.samples == len(label)


def test_the_profile_says_where_it_comes_from(calibration: Calibration, tmp_path: Path) -> None:
    profile = calibration.profile
    assert (profile.target, profile.drafter, profile.num_steps) == ("target", "head", 3000)
    assert profile.delta == 0.65
    assert "Youden" in profile.objective
    assert 1 in profile.gates()
    assert 4 not in profile.gates()
    profile.save(tmp_path / "p.json")
    assert DrafterProfile.load(tmp_path / "p.json").gates() == pytest.approx(profile.gates())


def test_with_costs_the_fastest_width_sets_the_thresholds(calibration: Calibration) -> None:
    costs = [
        GateCosts(8, plain_s=0.01, base_s=0.01 + 0.001 * n, level_s=0.002 * n, nodes_per_level=n)
        for n in (1, 2, 3)
    ]
    every = [profile_of(calibration.samples, each) for each in costs]
    best = profile_of(calibration.samples, *costs)
    speeds = [float(p.objective.rpartition("these gates ")[2]) for p in every]
    assert best == every[int(np.argmax(speeds))]
    assert "at 8 requests" in best.objective
    assert "plain decoding makes 100, " in best.objective
    assert best.created == "2025-01-01"


def test_free_levels_need_no_gates(calibration: Calibration) -> None:
    costs = GateCosts(requests=1, plain_s=1.0, base_s=1.0, level_s=0.0, nodes_per_level=3)
    profile = profile_of(calibration.samples, costs)
    assert profile.gates() == {}


def test_trees_that_the_scheduler_cut_are_left_out() -> None:
    logprobs = [-0.1, -0.2, -0.3]
    whole = chain("a", logprobs, 1)
    cut = request("b", whole.parents, logprobs, whole.level_starts, [0], selected=[0])
    plain = request("c", whole.parents, logprobs, whole.level_starts, [], selected=[])
    samples = collect([step([whole, cut, plain])], num_nodes=3)
    assert (samples.request_ids, samples.skipped, samples.partial) == (("a",), 2, 0)


def test_of_a_partly_verified_pool_the_verified_nodes_count() -> None:
    tree = request(
        "a", [-1, -1, 0, 0], [-0.5, -1.0, -0.7, -2.0], [0, 2], [0, 2], selected=[0, 2, 1]
    )
    samples = collect([step([tree])], num_nodes=3)
    assert (samples.skipped, samples.partial) == (0, 1)
    assert samples.node_logprob.tolist() == pytest.approx([-0.5, -1.0, -0.7])
    assert samples.node_accepted.tolist() == [True, False, True]
    assert samples.node_parent_accepted.tolist() == [True, True, True]
    assert samples.node_child_rank.tolist() == [0, 1, 0]
    assert samples.accepted_rank.tolist() == [[0, 0]]
    assert samples.confidence[0].tolist() == pytest.approx(np.exp([-0.5, -0.7]).tolist())


def test_depths_that_the_drafter_did_not_reach_are_not_counted() -> None:
    trees = [chain("a", [-0.1, -0.2], 2), chain("b", [-0.1], 1), chain("c", [-0.1, -0.9], 0)]
    profile = profile_of(collect([step(trees)], num_nodes=2))
    assert [d.samples for d in profile.depths] == [3, 2]
    assert [d.acceptance for d in profile.depths] == pytest.approx([2 / 3, 1 / 2])
    assert [d.auc for d in profile.depths] == [0.5, 1.0]
    assert profile.gates() == {}  # Too few trees.


def test_a_trace_without_a_whole_tree_is_refused() -> None:
    tree = request("a", [-1, -1], [-0.5, -1.0], [0], [], selected=[0])
    with pytest.raises(ValueError, match="no tree of which all 2 nodes were verified, got 1"):
        collect([step([tree])], num_nodes=2)


def test_requests_not_trees_are_held_out() -> None:
    trees = [chain(name, [-0.1], 1) for name in "cabd"]
    samples = collect([step(trees), step(trees[::-1])], num_nodes=1)
    halves = dict(zip(samples.request_ids, samples.halves().tolist(), strict=True))
    assert halves == {"a": False, "b": True, "c": False, "d": True}
    assert samples.halves().sum() == 4
