# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether to draft, and how deep, as the load changes."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from echo_vllm.forecast import CostCurve, Costs, StepCost
from echo_vllm.forecast.forecaster import (
    ENOUGH,
    GAIN,
    MARGIN,
    PLAIN_STEPS,
    REUSE,
    SLOWEST_PROBE_STEPS,
    Forecaster,
)
from echo_vllm.forecast.plan import Load
from echo_vllm.forecast.survival import SurvivalModel


def forecaster(accept: float, online: bool = False, k_max: int | None = None) -> Forecaster:
    """Trees of depth 4 whose best child has probability `accept`, the next one a third of it."""
    found = Forecaster(
        survival=SurvivalModel.default(4), max_depth=4, frontier=2, k_max=k_max, online=online
    )
    remember(found, accept)
    return found


def remember(found: Forecaster, accept: float) -> None:
    draw = random.Random(1)
    for _ in range(64):
        sure = min(0.99, max(0.01, draw.gauss(accept, 0.1)))
        scores, depths = [], []
        for depth in range(1, 5):
            for score in (sure**depth, sure**depth / 3):
                scores.append(math.log(score))
                depths.append(depth)
        found.observe_draft(scores, depths)


def cost(free: float, drafter: float = 0.02) -> Costs:
    """Free up to `free` rows; beyond, every row costs as much as it must."""
    rows = np.array([1.0, free, 10 * free, 100 * free])
    return Costs.of(
        StepCost(
            verify=CostCurve.from_points(rows, np.maximum(rows / free, 1.0)),
            draft_level=CostCurve((1.0, 1001.0), (drafter, 25 * drafter)),
            catch_up=CostCurve((1.0, 1001.0), (drafter, 25 * drafter)),
            other=0.05,
        )
    )


def test_nothing_is_drafted_before_costs_are_known_and_little_before_drafts_are() -> None:
    empty = Forecaster(
        survival=SurvivalModel.default(3), max_depth=3, frontier=2, k_max=None, online=True
    )
    assert (empty.plan(Load(4, 0), None).max_depth, empty.plan(Load(4, 0), None).probes) == (0, 0)
    plan = empty.plan(Load(4, 0), cost(64))
    assert plan.max_depth == 0
    assert plan.probes > 0
    for _ in range(ENOUGH):
        empty.observe_draft([-0.1, -0.2, -0.3], [1, 2, 3])
    assert empty.plan(Load(1, 0), cost(64)).max_depth == 3


def test_low_load_drafts_deep_and_high_load_not_at_all() -> None:
    weak = forecaster(0.4)
    assert (weak.plan(Load(1, 0), cost(32)).max_depth or 0) >= 2
    for _ in range(3):
        plan = weak.plan(Load(256, 0), cost(32))
    assert plan.max_depth == 0
    # And back, in the step in which the load falls.
    assert (weak.plan(Load(1, 0), cost(32)).max_depth or 0) >= 2


def test_the_forecast_is_the_upper_envelope_and_has_no_cliff() -> None:
    found = forecaster(0.7)
    speeds = []
    for requests in range(1, 200):
        best = found.forecast(Load(requests, 0), cost(32))
        speeds.append(max(best.speed, best.plain))
        assert speeds[-1] >= best.plain
    ratios = np.array(speeds[1:]) / np.array(speeds[:-1])
    # One request more never costs a visible part of the throughput.
    assert ratios.min() > 0.99


def test_the_decision_has_hysteresis() -> None:
    """Where both ways are equally good, a small change of the load does not flip it each time."""
    found = forecaster(0.4)
    curve = cost(32)
    decisions = []
    for requests in [*range(1, 257), *range(256, 0, -1)]:
        found.plan(Load(requests, 0), curve)
        decisions.append(found._drafting)  # A single step of plain decoding is no decision.
    flips = sum(a != b for a, b in itertools.pairwise(decisions))
    assert flips == 2
    up = decisions.index(False) + 1
    down = 257 - (decisions[256:].index(True) + 1)
    # It gives up later than it resumes: between the two the margin decides.
    assert down <= up
    best = found.forecast(Load(up, 0), curve)
    assert best.speed <= (1 + GAIN - MARGIN) * best.plain or best.depth == 0


def test_probes_become_rare_while_nothing_is_drafted() -> None:
    found = forecaster(0.05)
    probed = [
        step for step in range(3000) if found.plan(Load(400, 0), cost(16, drafter=0.2)).probes
    ]
    gaps = np.diff(probed)
    assert gaps[0] <= 64
    assert gaps[-1] == SLOWEST_PROBE_STEPS
    assert len(probed) < 20


def test_better_prompts_are_noticed_at_rest_within_twelve_probes() -> None:
    found = forecaster(0.05)
    curve, seen = cost(64, drafter=0.2), forecaster(0.95)
    assert (found.plan(Load(32, 0), curve).max_depth or 0) == 0
    for step in range(12 * SLOWEST_PROBE_STEPS):
        plan = found.plan(Load(32, 0), curve)
        if plan.max_depth:
            return
        for scores, depths in list(seen._drafts)[step % 32 :][: plan.probes]:
            found.observe_draft(scores.tolist(), depths.tolist())
    pytest.fail("still resting")


def test_probes_go_round_the_batch() -> None:
    found = forecaster(0.05)
    probed: set[int] = set()
    for _ in range(40):
        found._next_probe = 0
        probed.update(found.plan(Load(64, 0), cost(16, drafter=0.2)).probed(64))
    assert probed == set(range(64))


def test_drafting_to_full_depth_has_probes_too() -> None:
    """Otherwise only promising requests would be remembered."""
    found = forecaster(0.97)
    plans = [found.plan(Load(1, 0), cost(64, drafter=0.001)) for _ in range(200)]
    assert {plan.max_depth for plan in plans} == {0, 4}, "at times a step of plain decoding"
    assert sum(plan.probes > 0 for plan in plans) >= 5


def test_steps_of_plain_decoding_become_rare() -> None:
    found = forecaster(0.9)
    plain = [step for step in range(2000) if not found.plan(Load(2, 0), cost(64)).max_depth]
    gaps = np.diff(plain)
    assert (gaps[0], gaps[-1]) == PLAIN_STEPS
    assert (np.diff(gaps) >= 0).all()


def test_the_forecast_keeps_to_k_max() -> None:
    """Drafting that cannot be verified is not forecast to pay."""
    curve = cost(64)
    free, bound, none = (
        forecaster(0.8, k_max=k).forecast(Load(8, 5), curve) for k in (None, 21, 5)
    )
    assert free.nodes > 2
    assert 0 < bound.nodes <= 2
    assert (none.depth, none.nodes) == (0, 0.0)
    assert forecaster(0.8, k_max=0).plan(Load(8, 0), curve).max_depth == 0


def test_low_factors_are_forgotten_at_rest() -> None:
    """They may be why nothing is verified; then nothing would ever correct them."""
    found = forecaster(0.6, online=True)
    for _ in range(400):
        found.observe_acceptance([16 * 0.6], [0])
    low = found.factors()[0]
    for _ in range(4000):
        found.observe_acceptance([], [])
    assert low < 0.3
    assert found.factors()[0] > 0.9


def test_observed_acceptance_changes_the_decision() -> None:
    found = forecaster(0.6, online=True)
    requests = next(
        r
        for r in range(1, 400)
        if 1.05 < (b := found.forecast(Load(r, 0), cost(32))).speed / b.plain < 1.3
    )
    assert (found.plan(Load(requests, 0), cost(32)).max_depth or 0) > 0
    for _ in range(400):
        # Sixteen nodes at depth 1, each said to be accepted with 0.6: almost none is.
        found.observe_acceptance([16 * 0.6], [0])
    assert found.factors()[0] == pytest.approx(0.25, abs=0.02)
    for _ in range(REUSE):
        found.plan(Load(requests, 0), cost(32))
    best = found.forecast(Load(requests, 0), cost(32))
    assert best.speed < best.plain or best.depth != 1


def test_prefill_is_part_of_the_load() -> None:
    found = forecaster(0.7)
    alone, crowded = (found.forecast(Load(8, prefill), cost(64)) for prefill in (0, 2000))
    assert crowded.plain < alone.plain
    assert crowded.speed < alone.speed


def test_catching_up_must_pay_in_the_tokens_that_are_left() -> None:
    """A little gain is worth a long prompt's pass through the drafter only to a long answer."""
    costs = cost(16, drafter=0.02)
    best = forecaster(0.7).forecast(Load(8), costs)
    assert best.speed / best.plain > 1.04
    drafts = {
        (waiting, left): forecaster(0.7).plan(Load(8, 0, waiting, left), costs).max_depth or 0
        for waiting, left in [(0, 4.0), (8000, 4.0), (8000, 400.0)]
    }
    assert drafts[0, 4.0] > 0
    assert drafts[8000, 4.0] == 0
    assert drafts[8000, 400.0] > 0


def test_the_price_of_catching_up_is_paid_out_of_the_same_steps() -> None:
    """Of 64 steps the share x goes to it, so the rest must be 1 / (1 - x) times as fast."""
    costs = cost(16, drafter=0.02)
    step = costs.plain.plain_step(8)
    for share in (0.25, 0.75, 1.5):
        rows = next(n for n in range(9, 10**7, 7) if costs.trees.catch_up(n) > share * 64 * step)
        hurdle = forecaster(0.7)._hurdle(Load(8, waiting=rows), costs)
        least = forecaster(0.7)._hurdle(Load(8), costs)
        assert hurdle == pytest.approx(least / (1 - share) if share < 1 else math.inf, rel=0.01)


def test_steps_of_plain_decoding_do_not_become_rarer_without_end() -> None:
    found = forecaster(0.9)
    found._num_plain = dict.fromkeys(range(4), 10**9)  # A shift by as much takes all memory.
    plain = [step for step in range(600) if not found.plan(Load(2), cost(64)).max_depth]
    assert set(np.diff(plain)) == {PLAIN_STEPS[1]}
