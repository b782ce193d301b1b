# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Costs learned from real steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.forecast import CostCurve, Hinge, OnlineCost, StepCost
from echo_vllm.forecast.online_cost import FADES, REFRESH, USUAL_CONTRAST, Contrast, Step

BASE = StepCost(
    verify=Hinge(k_max=40, gamma=0.02, base=0.01).to_curve(),
    draft_level=CostCurve((1, 64, 256), (0.001, 0.002, 0.008)),
    catch_up=CostCurve((1, 64, 512), (0.001, 0.002, 0.01)),
    other=0.002,
)
ASKED = np.array([1, 3, 7, 20, 50, 130, 300])


def trained(scale: float, outliers: float, seed: int) -> OnlineCost:
    """A cost that saw 600 steps of a machine `scale` times as slow, some of them 10 times."""
    rng = np.random.default_rng(seed)
    online = OnlineCost(BASE)
    for _ in range(600):
        rows, *levels = np.exp2(rng.uniform(0, 9, 4)).astype(int).tolist()
        noise = scale * np.exp(rng.normal(0, 0.05, 3))
        noise[rng.random(3) < outliers] *= 10
        online.observe_verify(rows, BASE.verify(rows) * noise[0])
        online.observe_draft(levels, rows, BASE.draft(levels, rows) * noise[1])
        online.observe_other(BASE.other * noise[2])
    return online


def settled(online: OnlineCost) -> StepCost:
    """The cost when each curve has had its turn."""
    for _ in range(4):
        cost = online.current()
    return cost


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("outliers", [0.0, 0.2])
def test_corrections_converge_to_a_scaled_machine(scale: float, outliers: float) -> None:
    online = trained(scale, outliers, seed=1)
    found = settled(online)
    for name in ("verify", "draft_level", "catch_up"):
        now, base = online.pace * getattr(found, name)(ASKED), getattr(BASE, name)(ASKED)
        assert now == pytest.approx(scale * base, rel=0.1), name
    assert online.pace * found.other == pytest.approx(scale * BASE.other, rel=0.1)


@pytest.mark.parametrize("levels", [[[4]], [[], [4], [4, 4], [4, 4, 4]]], ids=["alike", "varied"])
def test_what_is_fixed_does_not_make_levels_dear(levels: list[list[int]]) -> None:
    """Every drafting takes 4 ms more than its forwards, which take what was measured."""
    online = OnlineCost(BASE)
    rng = np.random.default_rng(0)
    for i in range(200):
        chosen = levels[i % len(levels)]
        noise = np.exp(rng.normal(0, 0.05))
        online.observe_verify(8, BASE.verify(8))
        online.observe_draft(chosen, 2, (BASE.draft(chosen, 2) + 0.004) * noise)
    found = settled(online)
    assert found.draft_fixed == pytest.approx(0.004, rel=0.2)
    assert found.draft_level(4) == pytest.approx(BASE.draft_level(4), rel=0.2)
    assert found.draft([4, 4], 2) == pytest.approx(BASE.draft([4, 4], 2) + 0.004, rel=0.1)


def test_a_bend_that_start_up_did_not_see_is_learned() -> None:
    truth = Hinge(k_max=16, gamma=0.05, base=0.01)
    online = OnlineCost(StepCost(BASE.verify, BASE.draft_level, BASE.catch_up))
    for _ in range(60):
        for rows in (2, 5, 11, 16, 24, 40, 70, 150):
            online.observe_verify(rows, truth(rows))
    asked = np.array([2, 5, 11, 24, 40, 70, 150])
    assert online.pace * online.current().verify(asked) == pytest.approx(truth(asked), rel=0.1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.floats(1e-6, 100), st.integers(1, 300)), max_size=80
    )
)
def test_whatever_was_seen_more_rows_never_take_less_time(
    observations: list[tuple[int, float, int]],
) -> None:
    online = OnlineCost(BASE)
    for rows, seconds, level in observations:
        online.observe_verify(rows, seconds)
        online.observe_draft([level, 2], rows, seconds)
        online.current()
    cost = settled(online)
    for curve in (cost.verify, cost.draft_level, cost.catch_up):
        seconds_of = curve(np.arange(0, 5000, 7))
        assert np.isfinite(seconds_of).all()
        assert (np.diff(seconds_of) >= -1e-9 * seconds_of[1:]).all()


def test_few_observations_say_little() -> None:
    online = OnlineCost(BASE)
    online.observe_verify(8, 10 * BASE.verify(8))
    assert 1 < online.current().verify(8) / BASE.verify(8) < 2


def test_a_correction_fades_with_the_distance() -> None:
    online = OnlineCost(BASE)
    for _ in range(200):
        for rows, times in ((32, 2.0), (256, 1.0), (280, 1.0)):
            online.observe_verify(rows, times * BASE.verify(rows))
    ratio = settled(online).verify(np.array([1, 4, 16, 32, 256])) / BASE.verify(32)
    assert ratio[3] == pytest.approx(2, rel=0.1)
    assert 1 < ratio[0] < 1.4
    assert (np.diff(ratio[:4]) >= 0).all()
    assert ratio[4] == pytest.approx(BASE.verify(256) / BASE.verify(32), rel=0.1)


def test_without_observations_the_cost_is_the_measured_one() -> None:
    online = OnlineCost(BASE)
    assert online.current() is BASE


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_ignored(seconds: float) -> None:
    online = OnlineCost(BASE)
    online.observe_verify(8, seconds)
    online.observe_draft([4], 8, seconds)
    online.observe_verify(0, 1.0)
    online.observe_draft([], 0, 1.0)
    assert online.current() is BASE


def test_the_current_cost_is_kept_between_observations() -> None:
    online = trained(2.0, 0.0, seed=3)
    first = settled(online)
    assert online.current() is first
    online.observe_verify(8, 1.0)
    assert online.current() is first, "one of many observations does not count"
    for _ in range(REFRESH):
        online.observe_verify(8, 1.0)
    assert online.current() is not first


def test_old_observations_are_forgotten() -> None:
    online = OnlineCost(BASE)
    for factor in (5.0, 1.5):
        for _ in range(80):
            online.observe_verify(8, factor * BASE.verify(8))
    found = online.pace * online.current().verify(8)
    assert found == pytest.approx(1.5 * BASE.verify(8), rel=0.05)


def test_a_slow_minute_makes_no_kind_of_step_look_dearer_than_another() -> None:
    online = OnlineCost(BASE)
    for step in range(60):  # The machine is slow while there are trees, and fast afterwards.
        online.observe_verify(40, 3.0 * BASE.verify(40))
        if step % 8 == 0:
            online.observe_verify(20, 3.0 * BASE.verify(20))
    for _ in range(60):
        online.observe_verify(20, BASE.verify(20))
    for cost in (settled(online), online.costs().trees):
        for rows in (20, 40):
            assert cost.verify(rows) == pytest.approx(BASE.verify(rows), rel=0.1)
    assert online.pace == pytest.approx(1.0, rel=0.1)


def test_at_any_pace_what_trees_take_beyond_their_rows_is_learned() -> None:
    rng = np.random.default_rng(5)
    online = OnlineCost(BASE)
    for step in range(600):
        slow = 1.0 + 1.5 * (step // 50 % 2)
        rows, trees = int(rng.integers(20, 60)), bool(step % 20 < 14)
        seconds = slow * (1.4 if trees else 1.0) * BASE.verify(rows)
        online.observe_verify(rows, seconds)
        online.observe_other(slow * BASE.other, trees=trees)
        online.observe_step(rows, [], 0, seconds + slow * BASE.other, trees=trees)
    ratio = online.costs().trees.verify(30) / settled(online).verify(30)
    assert ratio == pytest.approx(1.4, rel=0.1)


@pytest.mark.parametrize("slow", [1.0, 2.5])
def test_what_trees_take_beyond_their_parts_is_a_contrast_of_near_steps(slow: float) -> None:
    """A fifth more, whatever the pace; and nothing where plain steps are slow with them."""
    for more in (1.2, 1.0):
        online, rng = OnlineCost(BASE), np.random.default_rng(3)
        for step in range(400):
            trees = step % 20 < 15
            rows = 24 if trees else 8
            pace = slow * (1.0 + step // 100 % 2) * float(np.exp(rng.normal(0, 0.03)))
            online.observe_verify(rows, pace * BASE.verify(rows))
            seconds = more * BASE.step(rows, [4], 8) if trees else BASE.plain_step(rows)
            online.observe_step(rows, [4] if trees else [], 8 * trees, pace * seconds, trees=trees)
        parts = settled(online)
        ratio = online.costs().trees.step(24, [4], 8) / parts.step(24, [4], 8)
        assert ratio == pytest.approx(more, rel=0.05)


def changes(contrast: Contrast, count: int, more: float, noise: float, seed: int = 0) -> None:
    """`count` rows of ten steps, plain ones and with trees by turns, these exp(`more`) times as
    long as they should be."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        trees = bool(number % 2)
        for _ in range(10):
            ratio = more * trees + float(rng.normal(0, noise))
            step = Step(8, (), 0, BASE.step(8, (), 0) * float(np.exp(ratio)))
            contrast.observe(step, ratio, trees=trees)


def test_a_contrast_fades_that_nobody_sees_again() -> None:
    contrast = Contrast()
    changes(contrast, 20, 0.2, 0.01)
    found, error = contrast.found(BASE, BASE)
    assert found == pytest.approx(0.2, rel=0.1)
    plain = Step(8, (), 0, BASE.step(8, (), 0))
    for _ in range(8 * FADES):
        contrast.observe(plain, 0.0, trees=False)
    found, later = contrast.found(BASE, BASE)
    assert abs(found) < 0.05
    assert error < later <= USUAL_CONTRAST


def test_a_contrast_is_as_sure_as_there_were_changes() -> None:
    """One noisy pause proves little, however many steps there are around it."""
    errors = []
    for count in (1, 3, 9, 17):
        found = []
        for seed in range(40):
            contrast = Contrast()
            changes(contrast, count, 0.0, 0.2, seed)
            found.append(contrast.found(BASE, BASE))
        contrasts, of_each = np.array(found).T
        assert np.abs(contrasts).mean() < of_each.mean()
        errors.append(of_each.mean())
    assert errors[0] == USUAL_CONTRAST
    assert errors == sorted(errors, reverse=True)


def test_what_the_curves_have_learnt_since_is_no_contrast() -> None:
    contrast = Contrast()
    changes(contrast, 20, 0.2, 0.01)
    assert contrast.found(BASE, BASE.scaled(float(np.exp(0.2))))[0] == pytest.approx(0, abs=0.02)


def test_what_plain_steps_teach_holds_for_trees() -> None:
    online = OnlineCost(BASE)
    for _ in range(100):
        online.observe_verify(24, 1.5 * BASE.verify(24))
        online.observe_verify(4, BASE.verify(4))
    plain = settled(online)
    assert plain.verify(24) / plain.verify(4) > 1.3 * BASE.verify(24) / BASE.verify(4)
    assert online.costs().trees.verify(ASKED) == pytest.approx(plain.verify(ASKED))
