# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto` against plain decoding and against always drafting to the best depth, on a synthetic clock
with noise: 1 to 256 requests, several machines, drafters from bad to good."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.policies.auto import AutoPolicy
from tests.policies.serving import Prompts, Serving, best_fixed
from tests.policies.test_policies import policy_of

FLIPS = 6
"""Changes of the decision in a thousand steps, at most."""


def machine(free: float, slope: float, drafter: float) -> StepCost:
    """A target forward of 50 ms up to `free` rows, by `slope` more for each `free` rows beyond; a
    forward of the drafter takes `drafter` of that."""
    rows = (1.0, free, 4 * free, 40 * free)
    seconds = [0.05 * (1 + slope * max(0.0, n - free) / free) for n in rows]
    return StepCost(
        verify=CostCurve(rows, tuple(seconds)),
        draft_level=CostCurve(rows, tuple(drafter * s for s in seconds)),
        catch_up=CostCurve(rows, tuple(drafter * s for s in seconds)),
        other=0.002,
    )


MACHINES = {
    "two-cores": machine(8, 0.35, 0.12),
    "gpu": machine(128, 0.6, 0.08),
    "steep": machine(16, 1.0, 0.1),
    "dear-drafter": machine(32, 0.5, 0.4),
}


def auto(cost: StepCost) -> AutoPolicy:
    policy = policy_of(16, policy="auto", max_depth=4, top_k=3, width=4)
    assert isinstance(policy, AutoPolicy)
    policy.set_cost(cost)
    return policy


def decisions(run: Serving) -> list[bool]:
    """Filled while it serves: whether it drafts from now on."""
    assert isinstance(run.policy, AutoPolicy)
    forecaster, found = run.policy.forecaster, []
    decide = forecaster._decide

    def recording(*args: Any) -> None:
        decide(*args)
        found.append(forecaster._drafting)

    forecaster._decide = recording  # type: ignore[method-assign, assignment]
    return found


def ratio(
    true: StepCost, prompts: Prompts, requests: int, warm_up: int = 500, steps: int = 300
) -> float:
    """Speed in the steady state over the best fixed way's."""
    best, _ = best_fixed(
        lambda: auto(true), lambda policy: Serving(policy, true, prompts, requests), true
    )
    return Serving(auto(true), true, prompts, requests).run(warm_up).speed(steps) / best


@pytest.mark.parametrize(
    ("name", "sure", "requests"),
    [
        ("two-cores", 0.4, 4),
        ("dear-drafter", 0.4, 16),
        ("steep", 0.15, 16),
        ("gpu", 0.15, 256),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                ("two-cores", 0.15, 1),
                ("two-cores", 0.7, 64),
                ("gpu", 0.7, 1),
                ("gpu", 0.7, 16),
                ("gpu", 0.4, 64),
                ("steep", 0.7, 4),
                ("dear-drafter", 0.7, 1),
                ("dear-drafter", 0.15, 256),
            ]
        ),
    ],
)
def test_a_steady_load_is_served_as_fast_as_by_the_best_fixed_way(
    name: str, sure: float, requests: int
) -> None:
    assert ratio(MACHINES[name], Prompts(sure), requests) > 0.985  # Luck is half a percent.


def test_a_burst_that_shrinks_to_one_request_is_drafted_for_when_that_pays() -> None:
    """32 requests of which one is long: plain decoding pays at first, drafting in the end."""
    true = MACHINES["steep"]
    lengths = [64 + 2 * i for i in range(31)] + [800]
    run = Serving(auto(true), true, Prompts(0.6), 32, lengths=lengths).finish()
    plain = Serving(auto(true), true, Prompts(0.6), 32, lengths=lengths)
    plain.dictated = run.policy.plan(plain.load()).__class__(max_depth=0)
    plain.finish()
    assert run.expected_seconds < 0.75 * plain.expected_seconds
    alone = [drafts for requests, drafts, _, _ in run.steps if requests == 1]
    crowd = [drafts for requests, drafts, _, _ in run.steps if requests == 32]
    assert sum(alone) > 0.9 * len(alone)
    assert sum(crowd) < 0.3 * len(crowd)


@pytest.mark.parametrize(
    ("name", "sure"),
    [("steep", 0.3), ("two-cores", 0.3), pytest.param("gpu", 0.5, marks=pytest.mark.full)],
)
def test_the_decision_does_not_flap(name: str, sure: float) -> None:
    """At the load at which drafting and resting are about as good, with noise of a tenth."""
    true = MACHINES[name]
    load = closest(true, Prompts(sure))
    run = Serving(auto(true), true, Prompts(sure), load, noise=0.1)
    found = decisions(run)
    run.run(1000)
    assert sum(a != b for a, b in itertools.pairwise(found)) <= FLIPS


@pytest.mark.parametrize("name", ["two-cores", "steep", "dear-drafter"])
def test_a_new_server_finds_out_cheaply_that_drafting_does_not_pay(name: str) -> None:
    """From the first step on: trials of a few requests, until they have confirmed the costs."""
    true = MACHINES[name]
    run = Serving(auto(true), true, Prompts(0.6), 32, lengths=[128] * 32, comes_again=True).run(300)
    plain = 32 / float(true.plain_step(32))
    assert run.share_drafting(last=300) < 0.01
    assert run.expected_tokens / run.expected_seconds > 0.975 * plain


def closest(true: StepCost, prompts: Prompts) -> int:
    """The first load at which drafting gains less than 2 %."""
    for requests in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192):
        plain = requests / true.plain_step(requests)
        best, _ = best_fixed(
            lambda: auto(true),
            lambda policy, n=requests: Serving(policy, true, prompts, n),  # type: ignore[misc]
            true,
        )
        if best < 1.02 * plain:
            return requests
    raise AssertionError("drafting pays at every load")


@pytest.mark.parametrize(("requests", "drafter"), [(1, 0.8), (32, 0.4)])
def test_at_rest_probes_take_less_than_half_a_percent_of_the_time(
    requests: int, drafter: float
) -> None:
    true = machine(32, 0.5, drafter)
    run = Serving(auto(true), true, Prompts(0.03), requests).run(600)
    before = len(run.steps)
    run.run(1500)
    rests = [s for s in run.steps[before:] if not s[1]]
    assert len(rests) > 1450
    usual = float(true.plain_step(requests))
    more = sum(s for _, _, s, _ in rests) - usual * len(rests)
    probed = sum(s - usual for _, _, s, probes in rests if probes)
    assert 0 < probed < 0.005 * usual * len(rests)
    assert more < 0.015 * usual * len(rests)  # The noise among it.


def test_better_prompts_are_noticed_after_a_rest() -> None:
    """Within 3000 steps, in which probes renew the memory of 16 drafts: each takes as long as three
    with so dear a drafter, and an attempt that came too early doubles the time to the next."""
    true = machine(32, 0.5, 0.6)
    run = Serving(auto(true), true, Prompts(0.03), 4).run(400)
    assert run.share_drafting(last=100) < 0.05
    run.ask(Prompts(0.85))
    run.run(3000)
    assert run.share_drafting(last=100) > 0.9


@pytest.mark.parametrize(("name", "requests"), [("steep", 1), ("dear-drafter", 8)])
def test_worse_prompts_are_noticed_while_it_drafts(name: str, requests: int) -> None:
    """By the first levels of all drafts: the memory of whole ones takes thousands of steps."""
    true, worse = MACHINES[name], Prompts(0.12)
    run = Serving(auto(true), true, Prompts(0.8), requests).run(300)
    assert run.share_drafting(last=100) > 0.8
    run.ask(worse)
    best, _ = best_fixed(
        lambda: auto(true), lambda policy: Serving(policy, true, worse, requests), true
    )
    assert run.run(100).speed(200) > 0.97 * best


def test_what_trees_take_between_steps_counts() -> None:
    """Where they pay by little, a scheduler that takes 20 ms with trees turns it."""
    true = MACHINES["gpu"]
    shares = []
    for more in (0.0, 0.02):
        run = Serving(auto(true), true, Prompts(0.15), 64, more_for_trees=more, noise=0.02)
        shares.append(run.run(500).share_drafting(last=100))
    assert shares[0] > 0.8
    assert shares[1] < 0.2


def test_requests_that_cannot_draft_are_not_counted_on() -> None:
    """Of 64 requests 62 answer by a grammar: drafting for two pays little to the batch."""
    true = MACHINES["gpu"]
    run = Serving(auto(true), true, Prompts(0.6), 64, able=2).run(400)
    assert run.share_drafting(last=100) < 0.2
    every = Serving(auto(true), true, Prompts(0.6), 64).run(300)
    assert every.share_drafting(last=100) > 0.8
