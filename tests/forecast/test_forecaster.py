# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether to draft, and how deep, as the load changes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from echo_vllm.forecast import CostCurve, Costs, StepCost
from echo_vllm.forecast.forecaster import (
    BOUND,
    DOUBTFUL,
    ENOUGH,
    EXPERIMENTS,
    FIRST_PAUSES,
    MOST_PROBES,
    PAUSE,
    PLAIN_STEPS,
    PROBE_STEPS,
    PROBED_NODES,
    RESTING_MEMORY,
    REUSE,
    UNTRIED,
    YOUNG_PAUSES,
    Forecaster,
)
from echo_vllm.forecast.plan import AHEAD, Load
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
        # Both children hang under the best node of the level above.
        found.observe_draft(scores, depths, [1] * len(depths))


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
        empty.observe_draft([-0.1, -0.2, -0.3], [1, 2, 3], [1, 1, 1])
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
    # It gives up later than it resumes: between the two it cannot tell.
    assert down <= up
    best = found.forecast(Load(up, 0), curve)
    assert best.gain <= -BOUND * best.error


def price_of_probes(costs: Costs, requests: int, probes: int) -> float:
    """Of three further levels of a frontier of two, for requests that rested for 48 tokens."""
    cost = costs.trees
    seconds = 3 * cost.draft_level(2 * probes) + cost.catch_up(48 * probes)
    rows = requests + PROBED_NODES * probes
    return seconds + float(cost.verify(rows) - cost.verify(requests))


@pytest.mark.parametrize("requests", [1, 4, 32, 256])
@pytest.mark.parametrize("drafter", [0.2, 0.4])
def test_probes_take_less_than_half_a_percent_of_the_time_at_rest(
    requests: int, drafter: float
) -> None:
    found, curve = forecaster(0.01), cost(16, drafter=drafter)
    step = float(curve.plain.plain_step(requests))
    at_rest = probed = 0.0
    for _ in range(3000):
        plan = found.plan(Load(requests, waiting=48 * requests), curve)
        if found._step < 1000 or plan.max_depth:  # Trials are for a while only.
            continue
        at_rest += step
        if plan.probes:
            probed += price_of_probes(curve, requests, min(plan.probes, requests))
    assert at_rest > 1900 * step
    assert 0 < probed < 0.005 * at_rest


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_better_prompts_are_noticed_once_the_memory_is_of_them(requests: int) -> None:
    """The number of steps follows from the price of a probe and its share of the time."""
    found = forecaster(0.01)
    curve, seen = cost(64, drafter=0.2), forecaster(0.95)
    for _ in range(2000):
        assert (found.plan(Load(requests, waiting=48 * requests), curve).max_depth or 0) == 0
        found.observe_draft(*(x.tolist() for x in found._drafts["best"][0]))
    probes = min(
        (n for n in (1, 2, 4, MOST_PROBES) if n <= requests),
        key=lambda n: price_of_probes(curve, requests, n) / n,
    )
    share = price_of_probes(curve, requests, probes) / float(curve.plain.plain_step(requests))
    most = math.ceil((RESTING_MEMORY / probes + 1) * (share / EXPERIMENTS + PROBE_STEPS))
    better = itertools.cycle([*seen._drafts["best"]])
    for _ in range(most):
        plan = found.plan(Load(requests, waiting=48 * requests), curve)
        if plan.max_depth:
            return
        for draft in itertools.islice(better, min(plan.probes, requests)):
            found.observe_draft(*(x.tolist() for x in draft))
    pytest.fail(f"still resting after {most} steps")


def test_probes_go_round_the_batch() -> None:
    found = forecaster(0.05)
    probed: set[int] = set()
    for _ in range(1600):
        probed.update(found.plan(Load(64, 0), cost(16, drafter=0.2)).probed(64))
    assert probed == set(range(64))


def test_drafting_to_full_depth_has_probes_too() -> None:
    """Otherwise only promising requests would be remembered."""
    found = forecaster(0.97)
    plans = [found.plan(Load(1, 0), cost(64, drafter=0.001)) for _ in range(200)]
    assert {plan.max_depth for plan in plans} == {4}
    assert sum(plan.probes > 0 for plan in plans) >= 5


STEPS = 12000


@pytest.mark.parametrize(("accept", "requests"), [(0.6, 1), (0.6, 16), (0.4, 32)])
def test_steps_of_plain_decoding_are_the_rarer_the_more_they_lose(
    accept: float, requests: int
) -> None:
    found, curve = forecaster(accept), cost(64)
    best = found.forecast(Load(requests), curve)
    assert best.gain > 0
    plain = [i for i in range(STEPS) if not found.plan(Load(requests), curve).max_depth]
    pauses = np.array(plain).reshape(-1, PAUSE)
    assert (np.diff(pauses) == 1).all()
    gaps, lost = np.diff(pauses[:, 0]), PAUSE * (best.speed / best.plain - 1)
    at_most = PAUSE * math.expm1(best.gain + BOUND * best.error)
    assert gaps.min() >= PLAIN_STEPS
    num_young = FIRST_PAUSES - 1 if best.gain < DOUBTFUL else 0
    young, others = gaps[:num_young], gaps[num_young:]
    assert 0 < len(others) * lost <= 1.01 * EXPERIMENTS * STEPS
    assert others.max() <= max(PLAIN_STEPS, 1.1 * at_most / EXPERIMENTS)
    assert (young <= max(PLAIN_STEPS, 1.1 * at_most / (YOUNG_PAUSES * EXPERIMENTS))).all()


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
    assert found.factors()[0] > 0.85


def test_requests_with_a_temperature_are_accepted_by_their_own_measure() -> None:
    """At once when the load changes, and still after many steps without any."""
    found = forecaster(0.6, online=True)

    def factor(num_sampled: int) -> float:
        return found.plan(Load(4, num_sampled=num_sampled), cost(32)).factors[0]

    factor(2)
    for _ in range(400):
        found.observe_acceptance([2.0], [2])
        found.observe_acceptance([2.0], [1], sampled=True)
    assert factor(0) == pytest.approx(1.0)
    for _ in range(4000):
        found.observe_acceptance([2.0], [2])
        found.observe_acceptance([], [], sampled=True)
    assert factor(4) == pytest.approx(0.5, abs=0.05)
    assert factor(1) == pytest.approx(0.875, abs=0.02)


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


def both_kinds(best: float, drawn: float, num_drawn: int = 64) -> Forecaster:
    """Chains of one node, accepted so often where the candidate is the best one, or drawn."""
    found = Forecaster(
        survival=SurvivalModel.default(1),
        drawn=SurvivalModel.default(1),
        max_depth=1,
        frontier=1,
        k_max=None,
        online=True,
    )
    for _ in range(64):
        found.observe_draft([math.log(best)], [1], [1])
    for _ in range(num_drawn):
        found.observe_draft([math.log(drawn)], [1], [1], "drawn")
    return found


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 4])
def test_the_forecast_is_of_the_kinds_of_requests_that_there_are(num_drawn: int) -> None:
    found, costs = both_kinds(0.8, 0.4), cost(32)
    found.plan(Load(4, num_drawn=num_drawn), costs)
    expected = 0.8 + num_drawn / 4 * (0.4 - 0.8)
    assert found._expected.gains[-1] == pytest.approx(expected, abs=0.01)


def test_requests_of_another_kind_are_probed_before_anything_is_drafted_for_them() -> None:
    """What drafts of greedy requests bring says nothing of drawn candidates."""
    found, costs = both_kinds(0.8, 0.4, num_drawn=0), cost(32)
    assert found.plan(Load(4), costs).max_depth
    other = Load(4, num_drawn=4)
    plan = found.plan(other, costs)
    assert (plan.max_depth, plan.probes) == (0, ENOUGH // 2)
    for _ in range(ENOUGH):
        found.observe_draft([math.log(0.02)], [1], [1], "drawn")
    later = [found.plan(other, costs).max_depth for _ in range(20)]
    assert not any(later), "drafting begins anew only where it pays"
    assert found.plan(Load(4), costs).max_depth, "what is known of greedy requests is kept"


def test_requests_that_never_draft_deep_enough_are_not_probed_for_ever() -> None:
    found, costs = both_kinds(0.8, 0.4, num_drawn=0), cost(32)
    plans = [found.plan(Load(4, num_drawn=4), costs) for _ in range(UNTRIED + 20)]
    assert all(plan.probes for plan in plans[:UNTRIED])
    assert any(plan.max_depth for plan in plans[UNTRIED:]), "the others' drafts stand for them"


def test_a_few_requests_of_another_kind_do_not_end_the_drafting() -> None:
    found, costs = both_kinds(0.8, 0.02), cost(32)
    for _ in range(3):
        assert found.plan(Load(16), costs).max_depth
    assert found.plan(Load(16, num_drawn=4), costs).max_depth
    assert not found.plan(Load(16, num_drawn=16), costs).max_depth


@pytest.mark.parametrize("present", [0.35, 0.6, 0.8])
def test_remembered_drafts_count_by_how_the_present_ones_begin(present: float) -> None:
    """Half of them begin with a node of 0.3, half with one of 0.9: mixed as now, whatever was."""
    found = Forecaster(
        survival=SurvivalModel.default(1), max_depth=1, frontier=1, k_max=None, online=True
    )
    for i in range(64):
        found.observe_draft([math.log(0.9 if i % 2 else 0.3)], [1], [1])
    found._drafting = True
    found.observe_first(10_000, 10_000 * present)
    found.forecast(Load(4), cost(32))
    assert found._expected.gains[-1] == pytest.approx(present, abs=0.01)
    found._drafting = False
    found.observe_first(10_000, 0.0)  # At rest the memory is of now.
    found.plan(Load(4), cost(32))
    found._until = 0
    found.forecast(Load(4), cost(32))
    assert found._expected.gains[-1] == pytest.approx(0.6, abs=0.01)


def test_prefill_is_part_of_the_load() -> None:
    found = forecaster(0.7)
    alone, crowded = (found.forecast(Load(8, prefill), cost(64)) for prefill in (0, 2000))
    assert crowded.plain < alone.plain
    assert crowded.speed < alone.speed


def test_prompts_of_one_step_do_not_change_the_decision() -> None:
    """They are there for a step; drafting stops and catches up for many."""
    found = forecaster(0.7)
    for _ in range(20):
        calm = found.plan(Load(8), cost(64))
        found.plan(Load(8, 4000), cost(64))
    assert calm.max_depth
    assert found.plan(Load(8, 4000), cost(64)).reads_prompts


def begins(found: Forecaster, load: Load, costs: Costs) -> bool:
    """Whether it drafts from now on: an experiment is nothing of the kind."""
    found.plan(load, costs)
    return found._drafting


def test_catching_up_must_pay_in_the_tokens_that_are_left() -> None:
    """A little gain is worth a long prompt's pass through the drafter only to a long answer."""
    costs = cost(16, drafter=0.02)
    dear = replace(costs.plain, catch_up=CostCurve((16.0, 800.0), (0.02, 6.0)))
    costs = Costs.of(dear)
    best = forecaster(0.7).forecast(Load(8), costs)
    assert best.gain > 2 * BOUND * best.error
    short = (8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # None is left after four tokens.
    drafts = {
        (waiting, ahead): begins(forecaster(0.7), Load(8, 0, waiting, ahead=ahead), costs)
        for waiting, ahead in [(8, short), (800, short), (800, ())]
    }
    assert drafts == {(8, short): True, (800, short): False, (800, ()): True}


def test_the_price_of_catching_up_is_paid_out_of_the_same_steps() -> None:
    """Of the time up to the horizon the share x goes to it, so the rest must be 1 / (1 - x) times
    as fast."""
    costs = cost(16, drafter=0.02)
    best = forecaster(0.7).forecast(Load(8), costs)
    plain_s = AHEAD[-1] * costs.plain.plain_step(8)
    least = 1 - best.plain / best.speed
    for share in (0.5 * least, 0.95 * least, 1.05 * least, 2 * least):
        tokens = next(n for n in range(9, 10**7, 7) if costs.trees.catch_up(n) > share * plain_s)
        found = forecaster(0.7)
        found._behind = tokens / 8  # A later begin is no better.
        load = Load(8, waiting=tokens)
        assert found._pays(load, costs, found.forecast(load, costs), 0.0) == (share < least)


def test_it_waits_for_the_end_of_requests_that_are_not_worth_catching_up_with() -> None:
    """Of 32 requests all but one end within four tokens."""
    costs = cost(64, drafter=0.05)
    ending = (32.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert begins(forecaster(0.9), Load(32, waiting=32 * 96), costs)
    assert not begins(forecaster(0.9), Load(32, waiting=32 * 96, ahead=ending), costs)
    assert begins(forecaster(0.9), Load(1, waiting=96), costs)


def least_seconds(found: Forecaster, load: Load, costs: Costs, first: bool, current: bool) -> float:
    """The fastest of all ways to draft or to rest in each part of the horizon, `first` in the first
    one: without a rest before, nothing has to be caught up with."""
    plain, drafting = found._seconds_a_token(list(load.ahead), load, costs)
    best = math.inf
    for others in itertools.product([True, False], repeat=len(plain) - 1):
        seconds, is_current, missed = 0.0, current, load.waiting / load.num_decoding
        for i, drafts in enumerate((first, *others)):
            length = AHEAD[i + 1] - AHEAD[i]
            if drafts and not is_current:
                tokens = missed * load.ahead[i]
                seconds += found._catch_up(tokens, load, costs)
            seconds += length * (drafting if drafts else plain)[i]
            is_current = drafts
            missed = min(48.0, load.waiting / load.num_decoding + AHEAD[i + 1])
        best = min(best, seconds)
    return best


def test_the_decision_is_the_best_of_all_ways_through_the_horizon() -> None:
    draw = random.Random(3)
    answers = []
    for accept, waiting in itertools.product([0.3, 0.45, 0.6], [0, 20]):
        found = forecaster(accept)
        for _ in range(30):
            loads = sorted((draw.choice([1, 4, 16, 40, 90]) for _ in AHEAD[1:]), reverse=True)
            load = Load(loads[0], waiting=waiting * loads[0], ahead=tuple(map(float, loads)))
            costs = cost(64, drafter=draw.choice([0.02, 0.1, 0.3]))
            found._best(load, costs)
            ways = [least_seconds(found, load, costs, way, waiting == 0) for way in (True, False)]
            if abs(ways[0] / ways[1] - 1) > 1e-9:
                answers.append(bool(ways[0] < ways[1]))
                best = found.forecast(load, costs)
                assert found._pays(load, costs, best, 0.0) == answers[-1], (load, ways)
    assert min(answers.count(True), answers.count(False)) > 20


def test_only_requests_that_can_draft_count() -> None:
    """Of 16 requests 12 answer by a grammar."""
    costs = cost(64)
    all_draft, few, none = (
        forecaster(0.7).forecast(Load(16, num_drafting=able), costs) for able in ((), (4,), (0,))
    )
    assert all_draft.gain > few.gain > 0
    assert none.depth == 0 or none.gain < 0
    found = forecaster(0.7)
    assert found.plan(Load(16, num_drafting=(0,)), costs).max_depth == 0
    assert found.plan(Load(16, num_drafting=(0,)), costs).probes == 0


def test_what_a_request_has_left_limits_how_deep_it_is_worth_drafting() -> None:
    costs = cost(64, drafter=0.002)
    depths = [
        forecaster(0.9).forecast(Load(16, num_drafting=able), costs).depth
        for able in ((), (16, 16, 0), (16, 0), (16, 4, 0))
    ]
    assert depths == [4, 2, 1, 2]


def test_an_uncertain_forecast_changes_nothing() -> None:
    """Between the bounds a drafter that rests goes on to rest, and one that drafts to draft; to
    rest is the safe way, so the lower bound is the nearer one."""
    costs = cost(32)
    unsure = 0
    for requests in range(1, 257):
        load = Load(requests, waiting=requests)
        best = forecaster(0.5).forecast(load, costs)
        drafting, moved = forecaster(0.5), forecaster(0.5)
        drafting._drafting = moved._drafting = True
        drafting._drafting_at = requests.bit_length()
        moved._drafting_at = 1 + requests.bit_length()
        both = begins(forecaster(0.5), load, costs), begins(drafting, load, costs)
        bound = BOUND * best.error
        if -0.9 * bound < best.gain < 0.9 * bound:
            unsure += 1
            assert both == (False, True)
            # At another load than where it was found to pay, what is likely decides.
            assert begins(moved, load, costs) == (best.gain > 0)
        elif not -1.1 * bound - 0.01 < best.gain < 1.1 * bound + 0.01:
            assert both == (best.gain > 0, best.gain > 0)
    assert unsure > 3


def test_errors_fall_with_what_was_seen() -> None:
    costs, load = cost(32), Load(16)
    few = Forecaster(
        survival=SurvivalModel.default(4), max_depth=4, frontier=2, k_max=None, online=True
    )
    many = forecaster(0.6, online=True)
    for draft in list(many._drafts["best"])[:ENOUGH]:
        few.observe_draft(*(x.tolist() for x in draft[:3]))
    for _ in range(400):
        many.observe_acceptance([10.0, 4.0, 2.0, 1.0], [10, 4, 2, 1])
    assert many.forecast(load, costs).error < 0.6 * few.forecast(load, costs).error


def test_what_a_slot_must_be_worth_is_what_the_last_node_that_pays_is_worth() -> None:
    """Drawn candidates are not chosen by what was drawn: the forecast chooses for them."""
    found = forecaster(0.6)
    least = []
    for requests in (1, 4, 16):
        best = found.forecast(Load(requests), cost(32))
        plan = found.plan(Load(requests), cost(32))
        assert plan.least_worth == best.least, requests
        assert plan.nodes == best.nodes
        # As many of the remembered nodes are worth more as the forecast wants verified.
        gains, levels, *_ = found._order
        count = (gains[levels <= best.depth] > best.least).sum() / len(found._drafts["best"])
        assert count == pytest.approx(best.nodes, abs=0.3)
        least.append(best.least)
    assert least == sorted(least), "rows that cost more must be worth more"
    assert least[0] < least[-1]
    # At rest a probe verifies no more than its floor.
    empty = Forecaster(
        survival=SurvivalModel.default(2), max_depth=2, frontier=1, k_max=None, online=False
    )
    assert empty.plan(Load(2), cost(32)).least_worth == 1.0


def test_both_kinds_of_candidates_are_calibrated_by_their_own_acceptance() -> None:
    found = Forecaster(
        survival=SurvivalModel.default(2),
        drawn=SurvivalModel([((-4.0, 0.0), (0.01, 0.5))]),
        max_depth=2,
        frontier=1,
        k_max=None,
        online=True,
    )
    for kind in ("best", "drawn"):
        for _ in range(ENOUGH):
            found.observe_draft([-0.1, -0.5], [1, 2], [1, 1], kind)
    for _ in range(200):
        found.observe_acceptance([5.0], [10], "drawn")
        found.observe_acceptance([5.0], [5], "best")
    plan = found.plan(Load(1), cost(64))
    assert plan.factors[0] == pytest.approx(1.0)
    assert plan.drawn_factors[0] == pytest.approx(2.0, rel=0.1)
    gains, levels, _, _, is_drawn = found._order
    at_root = gains[(levels == 1) & is_drawn], gains[(levels == 1) & ~is_drawn]
    assert at_root[1] == pytest.approx(math.exp(-0.1), rel=0.01)
    curve = 0.01 + (4.0 - 0.1) / 4.0 * 0.49
    assert at_root[0] == pytest.approx(curve * plan.drawn_factors[0], rel=0.01)
